"""Groups of up to four members in one loop: everything between reading bits and writing bits stays in registers.

Members come as tuples of rows, whose length the compiler knows and unrolls. A group of one is given its row twice, the second
time with weight 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.kernels.compiled import merged_in, regrouping
from pipeline.kernels.fused.floats import infinite, narrow, plus, widen

ZERO, ONE = np.float32(0), np.float32(1)


@merged_in
def elected(up: Any, down: Any, weight_up: Any, weight_down: Any, mean: bool) -> Any:
    """Of one entry the larger mass with its sign, + where both are equal; divided by the weights behind it if asked."""
    positive = up >= -down
    mass, weight = (up if positive else down), (weight_up if positive else weight_down)
    return mass / (weight if mean and weight > 0 else ONE)


@merged_in
def add_whole(base: Any, rows: Any, weights: Any, factor: Any, out: Any) -> bool:
    """Write base + factor * sum(w d), rounded once, into ``out``; whether any value is not finite."""
    overflow = False
    for j in range(len(base)):
        origin, total = widen(base[j]), ZERO
        for m in range(len(rows)):
            total += weights[m] * (widen(plus(base[j], rows[m][j])) - origin)
        value = narrow(origin + total * factor, base[j])
        out[j] = value
        overflow |= infinite(value)
    return overflow


@merged_in
def add_masked(base: Any, rows: Any, weights: Any, words: Any, limit: Any, scales: Any, factor: Any, out: Any) -> bool:
    """The same with entries whose word is below the limit rescaled and the others dropped."""
    overflow = False
    for j in range(len(base)):
        origin, total = widen(base[j]), ZERO
        for m in range(len(rows)):
            delta = widen(plus(base[j], rows[m][j])) - origin
            total += weights[m] * (delta * scales[m] if words[m][j] < limit else ZERO)
        value = narrow(origin + total * factor, base[j])
        out[j] = value
        overflow |= infinite(value)
    return overflow


@merged_in
def elect_trimmed(base: Any, rows: Any, weights: Any, thresholds: Any, mean: bool, factor: Any, out: Any) -> bool:
    """Write base + factor * what the members with the elected sign add up to, entries below the thresholds left out."""
    overflow = False
    for j in range(len(base)):
        origin = widen(base[j])
        up, down, weight_up, weight_down = ZERO, ZERO, ZERO, ZERO
        for m in range(len(rows)):
            delta = widen(plus(base[j], rows[m][j])) - origin
            value = delta * weights[m] if abs(delta) >= thresholds[m] else ZERO
            up += value if value > 0 else ZERO
            down += value if value < 0 else ZERO
            weight_up += weights[m] if value > 0 else ZERO
            weight_down += weights[m] if value < 0 else ZERO
        result = narrow(origin + elected(up, down, weight_up, weight_down, mean) * factor, base[j])
        out[j] = result
        overflow |= infinite(result)
    return overflow


@merged_in
def elect_masked(
    base: Any, rows: Any, weights: Any, words: Any, limit: Any, scales: Any, mean: bool, factor: Any, out: Any
) -> bool:
    """The same with random masks in place of thresholds."""
    overflow = False
    for j in range(len(base)):
        origin = widen(base[j])
        up, down, weight_up, weight_down = ZERO, ZERO, ZERO, ZERO
        for m in range(len(rows)):
            delta = widen(plus(base[j], rows[m][j])) - origin
            value = weights[m] * (delta * scales[m]) if words[m][j] < limit else ZERO
            up += value if value > 0 else ZERO
            down += value if value < 0 else ZERO
            weight_up += weights[m] if value > 0 else ZERO
            weight_down += weights[m] if value < 0 else ZERO
        result = narrow(origin + elected(up, down, weight_up, weight_down, mean) * factor, base[j])
        out[j] = result
        overflow |= infinite(result)
    return overflow


@regrouping
def distance(base: Any, stored: Any, out: Any) -> float:
    """Squared distance of a written tile to the expert's own."""
    total = ZERO
    for j in range(len(base)):
        difference = widen(out[j]) - widen(plus(base[j], stored[j]))
        total += difference * difference
    return float(total)
