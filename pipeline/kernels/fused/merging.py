"""Pool rows in one pass: base and stored differences in, finished rows out, all arithmetic in tiles that stay in cache."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.kernels.compiled import compiled, merged_in, over_rows, unowned
from pipeline.kernels.forms import COMBINED, COPY_BASE, ELECT, MASK, TRIM, Combining, PoolRows, Pruning
from pipeline.kernels.fused.floats import infinite, narrow, plus, widen
from pipeline.kernels.fused.groups import add_masked, add_whole, distance, elect_masked, elect_trimmed, elected
from pipeline.kernels.fused.philox import fill_words

SMALL = 4
"""Members of a group that go through one loop."""
TILE = 1024
"""Columns worked on at once: a tile of every array together fits a core's first-level cache."""


@merged_in
def _masked(base: Any, stored: Any, words: Any, limit: Any, scale: Any, delta: Any) -> None:
    for j in range(len(base)):
        change = widen(plus(base[j], stored[j])) - widen(base[j])
        delta[j] = change * scale if words[j] < limit else np.float32(0)


@merged_in
def _trimmed(base: Any, stored: Any, threshold: Any, delta: Any) -> None:
    for j in range(len(base)):
        change = widen(plus(base[j], stored[j])) - widen(base[j])
        delta[j] = change if abs(change) >= threshold else np.float32(0)


@merged_in
def _sum(delta: Any, weight: Any, total: Any) -> None:
    for j in range(len(delta)):
        total[j] += weight * delta[j]


@merged_in
def _weigh(delta: Any, weight: Any, up: Any, down: Any, weight_up: Any, weight_down: Any) -> None:
    """Add to the masses of both signs and to the weights behind them."""
    for j in range(len(delta)):
        value = delta[j] * weight
        up[j] += value if value > 0 else np.float32(0)
        down[j] += value if value < 0 else np.float32(0)
        weight_up[j] += weight if value > 0 else np.float32(0)
        weight_down[j] += weight if value < 0 else np.float32(0)


@merged_in
def _elect(up: Any, down: Any, weight_up: Any, weight_down: Any, mean: bool) -> None:
    """What is elected into ``up``."""
    for j in range(len(up)):
        up[j] = elected(up[j], down[j], weight_up[j], weight_down[j], mean)


@merged_in
def _count_infinite(row: Any) -> int:
    count = 0
    for j in range(len(row)):
        count += infinite(row[j])
    return count


@merged_in
def _write(base: Any, total: Any, factor: Any, out: Any) -> int:
    """Base + factor * total, rounded once; the number of values that are not finite."""
    overflow = False
    for j in range(len(base)):
        value = narrow(widen(base[j]) + total[j] * factor, base[j])
        out[j] = value
        overflow |= infinite(value)
    return _count_infinite(out) if overflow else 0  # counting in the loop above would cost it its vectors


@merged_in
def _copy(kind: int, base: Any, stored: Any, at: int, channel: int, left: int, who: Any, out: Any) -> None:
    """A tile of the base's own row, or of the first user's."""
    if kind == COPY_BASE:
        out[:] = base
        return
    expert = 0
    while not (who >> np.uint64(expert)) & np.uint64(1):
        expert += 1
    source = stored[expert, at + channel, left : left + len(base)]
    for j in range(len(base)):
        out[j] = plus(base[j], source[j])


@merged_in
def _add_distances(base: Any, stored: Any, at: int, channel: int, left: int, who: Any, out: Any, errors: Any) -> None:
    for expert in range(len(stored)):
        if (who >> np.uint64(expert)) & np.uint64(1):
            errors[channel, expert] += distance(base, stored[expert, at + channel, left : left + len(base)], out)


@merged_in
def _group(
    base: Any, rows: Any, weights: Any, scales: Any, thresholds: Any, words: Any, limit: Any, kind: int, elect: bool,
    mean: bool, factor: Any, out: Any,
) -> int:  # fmt: skip
    """A tile of a group of two to four members, given as tuples; the number of values that are not finite."""
    if elect and kind == MASK:
        overflow = elect_masked(base, rows, weights, words, limit, scales, mean, factor, out)
    elif elect:
        overflow = elect_trimmed(base, rows, weights, thresholds, mean, factor, out)
    elif kind == MASK:
        overflow = add_masked(base, rows, weights, words, limit, scales, factor, out)
    else:
        overflow = add_whole(base, rows, weights, factor, out)
    return _count_infinite(out) if overflow else 0


@merged_in
def _large_group(
    base: Any, stored: Any, at: int, channel: int, left: int, who: Any, weights: Any, scales: Any, thresholds: Any, words: Any,
    limit: Any, kind: int, elect: bool, mean: bool, factor: Any, tiles: Any, out: Any,
) -> int:  # fmt: skip
    """The same for any number of members, one after the other into sums that stay in cache."""
    count = len(base)
    delta, total, down, weight_up, weight_down = (
        tiles[0, :count], tiles[1, :count], tiles[2, :count], tiles[3, :count], tiles[4, :count]
    )  # fmt: skip
    tiles[1:] = 0
    for expert in range(len(stored)):
        if not (who >> np.uint64(expert)) & np.uint64(1):
            continue
        source = stored[expert, at + channel, left : left + count]
        if kind == MASK:
            _masked(base, source, words[expert], limit, scales[expert], delta)
        else:
            _trimmed(base, source, thresholds[expert], delta)
        if elect:
            _weigh(delta, weights[expert], total, down, weight_up, weight_down)
        else:
            _sum(delta, weights[expert], total)
    if elect:
        _elect(total, down, weight_up, weight_down, mean)
    return _write(base, total, factor, out)


@merged_in
def _draw_words(who: Any, keys: Any, element: int, count: int, words: Any) -> int:
    """Random words of every member's tile, one row each; where in its row the tile begins."""
    before = element % 4
    for expert in range(len(keys)):
        if (who >> np.uint64(expert)) & np.uint64(1):
            fill_words(keys[expert], element - before, words[expert, : (before + count + 3) // 4 * 4])
    return before


@merged_in
def _chosen(who: Any, experts: int, places: Any) -> int:
    """The members' positions into ``places``, the last repeated up to four; their number."""
    size = 0
    for expert in range(experts):
        if (who >> np.uint64(expert)) & np.uint64(1):
            if size < SMALL:
                places[size] = expert
            size += 1
    for place in range(size, SMALL):
        places[place] = places[size - 1]
    return size


@merged_in
def _merged_tile(
    base: Any, stored: Any, at: int, channel: int, left: int, who: Any, weights: Any, scales: Any, thresholds: Any, keys: Any,
    words: Any, limit: Any, kind: int, elect: bool, mean: bool, element: int, factor: Any, places: Any, tiles: Any, out: Any,
) -> int:  # fmt: skip
    """A tile of a merged row; the number of values that are not finite."""
    count = len(base)
    before = _draw_words(who, keys, element, count, words) if kind == MASK else 0
    drawn = words[:, before : before + count]
    size = _chosen(who, len(stored), places)
    if size > SMALL:
        return _large_group(
            base, stored, at, channel, left, who, weights, scales, thresholds, drawn, limit, kind, elect, mean, factor, tiles,
            out,
        )  # fmt: skip
    a, b, c, d = places[0], places[1], places[2], places[3]
    row, last, until = at + channel, left + count, before + count
    first, second = stored[a, row, left:last], stored[b, row, left:last]
    third, fourth = stored[c, row, left:last], stored[d, row, left:last]
    w, x, y, z = words[a, before:until], words[b, before:until], words[c, before:until], words[d, before:until]
    if size <= 2:
        other = weights[b] if size == 2 else np.float32(0)
        return _group(
            base, (first, second), (weights[a], other), (scales[a], scales[b]), (thresholds[a], thresholds[b]), (w, x),
            limit, kind, elect, mean, factor, out,
        )  # fmt: skip
    if size == 3:
        return _group(
            base, (first, second, third), (weights[a], weights[b], weights[c]), (scales[a], scales[b], scales[c]),
            (thresholds[a], thresholds[b], thresholds[c]), (w, x, y), limit, kind, elect, mean, factor, out,
        )  # fmt: skip
    return _group(
        base, (first, second, third, fourth), (weights[a], weights[b], weights[c], weights[d]),
        (scales[a], scales[b], scales[c], scales[d]), (thresholds[a], thresholds[b], thresholds[c], thresholds[d]),
        (w, x, y, z), limit, kind, elect, mean, factor, out,
    )  # fmt: skip


@compiled
def _merge_range(
    base: Any, stored: Any, at: int, rows: PoolRows, pruning: Pruning, combining: Combining, out: Any, errors: Any, bad: Any,
    start: int, stop: int,
) -> None:  # fmt: skip
    base, stored, out, errors, bad = unowned(base), unowned(stored), unowned(out), unowned(errors), unowned(bad)
    starts, users, kinds = unowned(rows.starts), unowned(rows.users), unowned(rows.kinds)
    places, factors, weights = unowned(rows.places), unowned(rows.factors), unowned(combining.weights)
    keys, scales, thresholds = unowned(pruning.keys), unowned(pruning.scales), unowned(pruning.thresholds)
    width, experts, limit = base.shape[1], len(stored), np.uint32(pruning.limit)
    owners = np.empty((5, TILE), np.float32), np.empty((experts, TILE + 8), np.uint32), np.empty(SMALL, np.int64)
    tiles, words, chosen = unowned(owners[0]), unowned(owners[1]), unowned(owners[2])
    for channel in range(start, stop):
        weight = weights[channel * (len(weights) > 1)]
        threshold = thresholds[channel * (len(thresholds) > 1)]
        for left in range(0, width, TILE):
            count = min(TILE, width - left)
            own = base[channel, left : left + count]
            for row in range(starts[channel], starts[channel + 1]):
                target, who = out[places[row], left : left + count], users[row]
                if kinds[row] != COMBINED:
                    _copy(kinds[row], own, stored, at, channel, left, who, target)
                    continue
                element = pruning.first + channel * width + left
                bad[channel] += _merged_tile(
                    own, stored, at, channel, left, who, weight, scales, threshold, keys, words, limit, pruning.kind,
                    combining.kind == ELECT, combining.mean, element, factors[row], chosen, tiles, target,
                )  # fmt: skip
                _add_distances(own, stored, at, channel, left, who, target, errors)
    owners[0][0, 0] = owners[1][0, 0] = owners[2][0] = 0  # their last use: until here they live


def merge_rows(
    base: NDArray[Any], stored: NDArray[Any], at: int, rows: PoolRows, pruning: Pruning, combining: Combining,
    out: NDArray[Any], threads: int = 1,
) -> tuple[NDArray[np.float64], int]:  # fmt: skip
    """Write the pool rows of a slice; squared errors (channels, experts) and the number of values that are not finite.

    ``base``: (channels, width) tagged bits (see ``floats``); ``stored``: (experts, channels of a chunk, width) differences,
    signed integers of the same size, the slice's from channel ``at`` on; ``out``: (pool rows, width), as ``base``. Sums run
    in order of experts in float32, are multiplied once and rounded once: the same bits as the torch path on a CPU (arXiv
    2412.15283, Eq. 3).
    """
    if pruning.kind != TRIM:
        pruning = pruning._replace(thresholds=np.zeros((1, len(stored)), np.float32))
    errors = np.zeros((len(base), len(stored)))
    bad = np.zeros(len(base), np.int64)

    def work(start: int, stop: int) -> None:
        _merge_range(base, stored, at, rows, pruning, combining, out, errors, bad, start, stop)

    over_rows(work, len(base), threads)
    return errors, int(bad.sum())
