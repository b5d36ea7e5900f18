"""What turns scores into shares that can be believed: a temperature, and thresholds for the fallback. Both from validation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from serving.choice import Link, log_shares

LOWEST, HIGHEST = 0.02, 50.0
"""Bounds of the temperature."""
TEMPERATURE_PLACES = 4
"""Decimals of the temperature: the minimum is flat, and what lies beyond them differs from machine to machine."""
FEWEST = 20
"""Queries, and right answers of one expert, from which something is concluded."""
LOST = 0.05
"""Share of an expert's right answers that its threshold ``auto`` may give up."""
CAP = 0.99
"""The highest threshold ``auto``: queries of the expert's own kind that are a little unusual still find it."""
THRESHOLD_PLACES = 4

Floats = NDArray[np.float64]
Threshold = float | Literal["auto"] | Mapping[str, float]


def loss(logits: Floats, labels: NDArray[Any], link: Link, temperature: float) -> float:
    """Mean negative logarithm of the right expert's share, in nats."""
    return float(-log_shares(logits, link, temperature)[np.arange(len(labels)), labels].mean())


def fit_temperature(logits: Floats, labels: NDArray[Any], link: Link) -> float:
    """The temperature of the smallest loss on validation: above 1 it takes back confidence, below 1 it adds some.

    1 when nothing can be concluded: from fewer than ``FEWEST`` queries or of one expert alone, from scores that are not finite,
    and where every answer is right or every one is wrong, so that the loss has no minimum.
    """
    if len(labels) < FEWEST or logits.shape[1] < 2 or not np.isfinite(logits).all():
        return 1.0
    is_right = logits.argmax(axis=1) == labels
    if is_right.all() or not is_right.any():
        return 1.0
    found = minimize_scalar(
        lambda exponent: loss(logits, labels, link, math.exp(exponent)),
        bounds=(math.log(LOWEST), math.log(HIGHEST)),
        method="bounded",
        options={"xatol": 1e-6},
    )
    temperature = round(math.exp(float(found.x)), TEMPERATURE_PLACES)
    return temperature if loss(logits, labels, link, temperature) < loss(logits, labels, link, 1.0) else 1.0


def auto_thresholds(shares: Floats, labels: NDArray[Any], experts: Sequence[str]) -> dict[str, float]:
    """Per expert the largest share that at least 95 % of its right answers reach, from 1 / experts (no bound) to ``CAP``.

    An expert with fewer than ``FEWEST`` right answers is given no bound.
    """
    least = 1 / len(experts)
    chosen, best = shares.argmax(axis=1), shares.max(axis=1)
    found = {}
    for place, expert in enumerate(experts):
        right = np.sort(best[(labels == place) & (chosen == place)])
        if len(right) < FEWEST:
            found[expert] = 0.0
            continue
        bound = float(right[math.floor(LOST * len(right))])
        bound = math.floor(bound * 10**THRESHOLD_PLACES) / 10**THRESHOLD_PLACES
        found[expert] = min(CAP, bound) if bound > least else 0.0
    return found


def thresholds_of(asked: Threshold, shares: Floats, labels: NDArray[Any], experts: Sequence[str]) -> dict[str, float]:
    """A threshold per expert, as the recipe asks: one for all, some by name (the others have none), or from validation."""
    if asked == "auto":
        return auto_thresholds(shares, labels, experts)
    if isinstance(asked, Mapping):
        return {expert: float(asked.get(expert, 0.0)) for expert in experts}
    return dict.fromkeys(experts, float(asked))
