"""How many groups each channel gets under a budget of stored entries (recipe: ``groups: auto``).

A unit, a channel say, has a curve: stored entries and error with K = 1, 2, ... groups. Of each curve only the lower convex
envelope is used, whose steps bring ever less per entry; taken over all units in order of gain per entry, they are the best
buy for every budget that ends at a step (the knapsack's linear relaxation).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pipeline.kernels.compiled import compiled

FLAT: Final = 1e-9
"""Points nearer to the chord than this are on it: rounding, not a knee."""


@compiled
def _group_errors(
    gram: NDArray[np.float64],
    labels: NDArray[np.uint8],
    norms: NDArray[np.float64],
    weights: NDArray[np.float64],
    out: NDArray[np.float64],
) -> None:
    count = gram.shape[1]
    links = np.empty(count)
    totals = np.empty(256)
    spreads = np.empty(256)
    for row in range(len(gram)):
        totals[:] = 0.0
        spreads[:] = 0.0
        for n in range(count):
            totals[labels[row, n]] += weights[n]
        for n in range(count):
            # distances of pairs rather than products: 0 to the bit for deltas that are equal
            links[n] = 0.0
            for m in range(count):
                if labels[row, m] == labels[row, n]:
                    pair = gram[row, n, n] + gram[row, m, m] - 2 * gram[row, n, m]
                    links[n] += weights[m] / totals[labels[row, n]] * pair
            spreads[labels[row, n]] += weights[n] / totals[labels[row, n]] * links[n]
        out[row] = 0.0
        for n in range(count):
            if norms[n] > 0:
                out[row] += max(links[n] - spreads[labels[row, n]] / 2, 0.0) / norms[n]


def group_errors(
    gram: NDArray[np.float64], labels: NDArray[np.uint8], norms: NDArray[np.float64], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(rows,) float64: how far the experts of each channel are from their groups' weighted means, sum_n |d_n - c|^2 / norms[n].

    ``gram``: (rows, N, N) float64; ``labels``: (rows, N) uint8; ``norms``: (N,) squared norm of each expert's delta of the
    whole matrix, so that an expert far from the base does not outvote the others, 0 for an expert that counts for nothing;
    ``weights``: (N,) > 0, c = sum(w d) / sum(w) over the group, which is Eq. 3 of arXiv 2412.15283 with the mean for its
    factor. With D_ab = |d_a - d_b|^2 it is |d_n - c|^2 = sum_a p_a D_na - sum_ab p_a p_b D_ab / 2, p = w / sum(w). A group
    of one, or of equal deltas, adds exactly 0.
    """
    if not (weights > 0).all():
        raise ValueError(f"weights must be above 0, not {weights.tolist()}")
    out = np.empty(len(gram))
    table, groups = np.ascontiguousarray(gram, np.float64), np.ascontiguousarray(labels, np.uint8)
    _group_errors(table, groups, norms.astype(np.float64), weights.astype(np.float64), out)
    return out


@compiled
def _envelope(errors: NDArray[np.float64], entries: NDArray[np.int64], chain: NDArray[np.int64]) -> int:
    """Write the indices of one unit's envelope to ``chain``, cheapest first; their number."""
    best = 0
    for k in range(1, len(errors)):
        if entries[k] < entries[best] or (entries[k] == entries[best] and errors[k] < errors[best]):
            best = k
    length = 0
    while best >= 0:
        here = best
        chain[length] = here
        length += 1
        best, steepest = -1, 0.0
        for k in range(len(errors)):
            if entries[k] > entries[here] and errors[k] < errors[here]:
                slope = (errors[here] - errors[k]) / (entries[k] - entries[here])
                # of points on one line the nearest: the others are steps of their own
                if slope > steepest or (slope == steepest and best >= 0 and entries[k] < entries[best]):
                    best, steepest = k, slope
    return length


@compiled
def _starts(
    errors: NDArray[np.float64], entries: NDArray[np.int64], start: NDArray[np.int64], counts: NDArray[np.int64]
) -> None:
    """Every unit's cheapest index and the number of steps from there."""
    chain = np.empty(errors.shape[1], np.int64)
    for unit in range(len(errors)):
        counts[unit] = _envelope(errors[unit], entries[unit], chain) - 1
        start[unit] = chain[0]


@compiled
def _steps(
    errors: NDArray[np.float64],
    entries: NDArray[np.int64],
    units: NDArray[np.int32],
    targets: NDArray[np.uint8],
    ratios: NDArray[np.float64],
) -> None:
    """All units' steps in order: unit, index after the step, gain per entry."""
    chain = np.empty(errors.shape[1], np.int64)
    at = 0
    for unit in range(len(errors)):
        length = _envelope(errors[unit], entries[unit], chain)
        limit = np.inf
        for i in range(1, length):
            a, b = chain[i - 1], chain[i]
            # rounding must not put a step before the one it stands on
            limit = min(limit, (errors[unit, a] - errors[unit, b]) / (entries[unit, b] - entries[unit, a]))
            units[at], targets[at], ratios[at] = unit, b, limit
            at += 1


@compiled
def _take(
    entries: NDArray[np.int64],
    units: NDArray[np.int32],
    targets: NDArray[np.uint8],
    order: NDArray[np.int64],
    left: int,
    chosen: NDArray[np.int64],
) -> None:
    """Move ``chosen`` along the steps in order, each that fits into what is left."""
    for step in order:
        unit = units[step]
        # from where the unit stands: behind a step that did not fit, no further one of the unit can
        cost = entries[unit, targets[step]] - entries[unit, chosen[unit]]
        if cost <= left:
            left -= cost
            chosen[unit] = targets[step]


@dataclass(frozen=True)
class _Sorted:
    """The steps of all units, best gain per entry first."""

    start: NDArray[np.int64]
    """(units,) index, K - 1, of every unit's cheapest point."""
    units: NDArray[np.int32]
    targets: NDArray[np.uint8]
    """Index in its unit where the step leads."""
    order: NDArray[np.int64]
    """The steps' positions, gain per entry descending, then unit, then the order within the unit."""


def _sorted_steps(errors: NDArray[np.float64], entries: NDArray[np.int64]) -> _Sorted:
    if errors.shape != entries.shape or errors.ndim != 2 or not 1 <= errors.shape[1] <= 256:
        raise ValueError(f"errors {errors.shape} and entries {entries.shape} must both be (units, N), N from 1 to 256")
    start = np.empty(len(errors), np.int64)
    counts = np.empty(len(errors), np.int64)
    _starts(errors, entries, start, counts)
    total = int(counts.sum())
    units, targets, ratios = np.empty(total, np.int32), np.empty(total, np.uint8), np.empty(total)
    _steps(errors, entries, units, targets, ratios)
    np.negative(ratios, out=ratios)
    return _Sorted(start, units, targets, np.argsort(ratios, kind="stable"))


def _at(table: NDArray[np.generic], index: NDArray[np.int64]) -> NDArray[np.generic]:
    return np.take_along_axis(table, index[:, None], axis=1)[:, 0]


def allocate(errors: NDArray[np.float64], entries: NDArray[np.int64], budget: int) -> NDArray[np.int64]:
    """(units,) int64: K of every unit, from 1 to N, such that errors are small and all entries together within ``budget``.

    ``errors``: (units, N) float64, ``entries``: (units, N) int64, the error and the stored entries of a unit with K = 1..N.
    Entries need not rise with K. All units start at their cheapest K (of equals the least error, then the least K); steps of
    their envelopes are taken in order of gain per entry, then of unit. Where one does not fit its unit stands still, and
    later ones that fit are still taken: the error is within the gain of that one step of the best that is possible, and
    never rises with the budget. Steps that gain nothing are not taken. ValueError if the cheapest does not fit.
    """
    errors, entries = np.ascontiguousarray(errors, np.float64), np.ascontiguousarray(entries, np.int64)
    steps = _sorted_steps(errors, entries)
    least = int(_at(entries, steps.start).sum())
    if budget < least:
        raise ValueError(f"a budget of {budget} entries is below {least}, the least that {len(errors)} units need")
    chosen = steps.start.copy()
    _take(entries, steps.units, steps.targets, steps.order, budget - least, chosen)
    chosen += 1
    return chosen


@dataclass(frozen=True)
class Knee:
    """The budget past which an entry buys less than the average one."""

    budget: int
    """Entries over all units; ``allocate`` with it takes exactly the steps up to the knee."""
    share: float
    """The budget in entries of the full cost: that of all steps that lower the error."""
    remaining: float
    """The error at the knee in the error of the cheapest choice, 0..1; 0 if that has none."""
    why: str
    """One sentence with the numbers."""


def _curve(
    errors: NDArray[np.float64], entries: NDArray[np.int64], steps: _Sorted
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Entries and error of all units together before the first step and after each."""
    units, targets = steps.units, steps.targets
    costs, gains = entries[units, targets], errors[units, targets]
    # a step starts where the one before it in its unit ended: the steps are still in order of unit here
    first = np.ones(len(units), bool)
    first[1:] = units[1:] != units[:-1]
    before = np.empty(len(units), np.int64)
    before[1:] = targets[:-1]
    before[first] = steps.start[units[first]]
    costs = (costs - entries[units, before])[steps.order]
    gains = (errors[units, before] - gains)[steps.order]
    spent = np.concatenate([[_at(entries, steps.start).sum()], costs]).cumsum()
    # from the last: small errors at the end are not what is left of large ones
    least = errors[np.arange(len(errors)), _last(steps, first)].sum()
    left = np.concatenate([[least], gains[::-1]]).cumsum()[::-1]
    return spent, left


def _last(steps: _Sorted, first: NDArray[np.bool_]) -> NDArray[np.int64]:
    """(units,) index of every unit with all its steps taken."""
    last = steps.start.copy()
    ends = np.ones(len(first), bool)
    ends[:-1] = first[1:]
    last[steps.units[ends]] = steps.targets[ends]
    return last


def knee(errors: NDArray[np.float64], entries: NDArray[np.int64]) -> Knee:
    """Where the curve of error over entries is furthest below its chord, both scaled to 0..1.

    Arguments as for ``allocate``, with one unit or more. The curve is that of the sorted steps, from all units at their
    cheapest to all steps taken; it is convex, so right of the knee an entry buys less than on average. The first point of
    equals; the cheapest where no point is below the chord (one step only, or steps that are all alike) or nothing is to
    be gained.
    """
    if not len(errors):
        raise ValueError("no unit to allocate for")
    errors, entries = np.ascontiguousarray(errors, np.float64), np.ascontiguousarray(entries, np.int64)
    steps = _sorted_steps(errors, entries)
    spent, left = _curve(errors, entries, steps)
    cheapest, full = int(spent[0]), int(spent[-1])
    if len(spent) == 1:
        rest = float(left[0])
        state = "has no error" if rest <= 0 else "has an error that no further entry lowers"
        return Knee(full, 1.0, float(rest > 0), f"the cheapest choice, {full} entries, {state}: nothing to buy")
    below = 1 - (spent - cheapest) / (full - cheapest) - (left - left[-1]) / (left[0] - left[-1])
    at = int(below.argmax())
    if below[at] <= FLAT:
        why = (
            f"every step from {cheapest} entries (the cheapest) to {full} (the full cost) lowers the error by as much per "
            f"entry, so none is better than the others ({len(steps.order)} steps): the cheapest"
        )
        return Knee(cheapest, cheapest / full, 1.0, why)
    budget, share, remaining = int(spent[at]), spent[at] / full, left[at] / left[0]
    extra = (budget - cheapest) / (full - cheapest)
    why = (
        f"{budget} entries are {share:.1%} of the full cost of {full}: of what can be bought beyond the cheapest "
        f"({cheapest} entries), {extra:.1%} leaves {remaining:.1%} of the error, and no entry after that lowers it by more "
        "than the average one"
    )
    return Knee(budget, float(share), float(remaining), why)
