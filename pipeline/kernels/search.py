"""Clustering above the number of experts whose partitions can be enumerated: seeded local search, seeded draws.

From the same tables of pairs as the enumeration and with the same criteria. A channel's result depends on its table and its
32-bit draw only. Every function here that draws takes ``state``, one uint64 that it moves on.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pipeline.kernels.compiled import compiled
from pipeline.kernels.partitions import KMEANS, MEDOIDS, OBJECTIVES, TIE, grow

RESTARTS: Final = 16
"""Of 9 and 10 random deltas, 8 restarts miss the optimum in up to 5 channels of 100, 16 in up to 2."""
IMPROVES: Final = 1e-9
"""A step counts when it gains this share of the whole: far below a tie, far above rounding, so that no search circles."""

# splitmix64 (Steele, Lea, Flood 2014)
_STEP: Final = np.uint64(0x9E3779B97F4A7C15)
_FIRST: Final = np.uint64(0xBF58476D1CE4E5B9)
_SECOND: Final = np.uint64(0x94D049BB133111EB)


@compiled
def _random(state: NDArray[np.uint64]) -> Any:
    """64 random bits."""
    state[0] += _STEP
    word = state[0]
    word = (word ^ (word >> np.uint64(30))) * _FIRST
    word = (word ^ (word >> np.uint64(27))) * _SECOND
    return word ^ (word >> np.uint64(31))


@compiled
def _seed(state: NDArray[np.uint64], draw: int, stream: int) -> None:
    # the draw's hash, not the draw: states of neighbours must not be neighbours in one sequence
    state[0] = np.uint64(draw) | (np.uint64(stream) << np.uint64(32))
    state[0] = _random(state)


@compiled
def _below(state: NDArray[np.uint64], bound: int) -> Any:
    """A random integer from 0 to ``bound`` - 1."""
    return np.int64(((_random(state) >> np.uint64(32)) * np.uint64(bound)) >> np.uint64(32))


@compiled
def _unit(state: NDArray[np.uint64]) -> Any:
    """A random number in [0, 1)."""
    return np.float64(_random(state) >> np.uint64(11)) * 2.0**-53


@compiled
def _random_items(count: int, state: NDArray[np.uint64], items: NDArray[np.int64]) -> None:
    """Fill ``items`` with different numbers below ``count``, every choice and order equally likely."""
    order = np.arange(count)
    for i in range(len(items)):
        other = i + _below(state, count - i)
        order[i], order[other] = order[other], order[i]
        items[i] = order[i]


@compiled
def _spread_items(distances: NDArray[np.float64], state: NDArray[np.uint64], items: NDArray[np.int64]) -> None:
    """Fill ``items`` as k-means++ does: each further one with a chance in proportion to its distance from those before."""
    count = len(distances)
    items[0] = _below(state, count)
    near = distances[items[0]].copy()
    taken = np.zeros(count, np.bool_)
    for i in range(1, len(items)):
        taken[items[i - 1]] = True
        near[items[i - 1]] = 0.0
        left = _unit(state) * near.sum()
        chosen = -1
        for n in range(count):
            if taken[n]:
                continue
            # the first free one stands if all are copies of items that are taken, the last if rounding leaves a rest
            if chosen < 0 or near[n] > 0:
                chosen = n
            left -= near[n]
            if left < 0:
                break
        items[i] = chosen
        near = np.minimum(near, distances[chosen])


@compiled
def _assign(distances: NDArray[np.float64], items: NDArray[np.int64], labels: NDArray[np.int64]) -> None:
    """Label everything with its nearest of ``items``, which keep themselves: no group is empty."""
    for n in range(len(distances)):
        labels[n] = 0
        for group in range(1, len(items)):
            if distances[n, items[group]] < distances[n, items[labels[n]]]:
                labels[n] = group
    for group in range(len(items)):
        labels[items[group]] = group


@compiled
def _scatter(groups: int, state: NDArray[np.uint64], items: NDArray[np.int64], labels: NDArray[np.int64]) -> None:
    """Label everything at random but ``items``, which keep themselves."""
    for n in range(len(labels)):
        labels[n] = _below(state, groups)
    for group in range(groups):
        labels[items[group]] = group


@compiled
def _value(objective: int, total: float, size: int) -> float:
    """A group's part of the score, from the sum over all pairs of its members."""
    if objective == KMEANS:
        return total / size
    return math.sqrt(max(total, 0.0))


@compiled
def _move(
    similarity: NDArray[np.float64],
    n: int,
    target: int,
    labels: NDArray[np.int64],
    sizes: NDArray[np.int64],
    totals: NDArray[np.float64],
    links: NDArray[np.float64],
) -> None:
    """Put expert ``n`` into group ``target``. ``links``: its sums with every group; ``totals``: of groups with themselves."""
    source = labels[n]
    totals[source] += similarity[n, n] - 2 * links[n, source]
    totals[target] += similarity[n, n] + 2 * links[n, target]
    sizes[source] -= 1
    sizes[target] += 1
    labels[n] = target
    for m in range(len(similarity)):
        links[m, source] -= similarity[m, n]
        links[m, target] += similarity[m, n]


@compiled
def _best_move(
    n: int,
    objective: int,
    own: float,
    source: int,
    sizes: NDArray[np.int64],
    totals: NDArray[np.float64],
    links: NDArray[np.float64],
    least: float,
) -> int:
    """The group where expert ``n`` raises the score the most, by more than ``least``; -1 where none does."""
    if sizes[source] == 1:
        return -1
    target = -1
    without = _value(objective, totals[source] - 2 * links[n, source] + own, sizes[source] - 1)
    lost = _value(objective, totals[source], sizes[source]) - without
    for group in range(len(sizes)):
        within = _value(objective, totals[group] + 2 * links[n, group] + own, sizes[group] + 1)
        gain = within - _value(objective, totals[group], sizes[group]) - lost
        if group != source and gain > least:
            target, least = group, gain
    return target


@compiled
def _best_swap(
    n: int,
    objective: int,
    similarity: NDArray[np.float64],
    labels: NDArray[np.int64],
    sizes: NDArray[np.int64],
    totals: NDArray[np.float64],
    links: NDArray[np.float64],
    least: float,
) -> int:
    """The expert to change places with ``n`` that raises the score the most, by more than ``least``; -1 for none."""
    partner = -1
    a = labels[n]
    left = totals[a] - 2 * links[n, a] + similarity[n, n]
    before = _value(objective, totals[a], sizes[a])
    for m in range(len(similarity)):
        b = labels[m]
        if b == a:
            continue
        here = left + 2 * (links[m, a] - similarity[n, m]) + similarity[m, m]
        there = totals[b] - 2 * links[m, b] + similarity[m, m] + 2 * (links[n, b] - similarity[n, m]) + similarity[n, n]
        after = _value(objective, here, sizes[a]) + _value(objective, there, sizes[b])
        gain = after - before - _value(objective, totals[b], sizes[b])
        if gain > least:
            partner, least = m, gain
    return partner


@compiled
def _improve(similarity: NDArray[np.float64], groups: int, objective: int, labels: NDArray[np.int64]) -> None:
    """Move single experts while the score rises (Hartigan), and where that rests, let two change places.

    Single moves leave behind optima that Lloyd's rounds stop at. Changes of places matter for spherical k-means: its best
    groups are of equal size, and a single move must break that first.
    """
    count = len(similarity)
    links = np.zeros((count, groups))
    sizes = np.zeros(groups, np.int64)
    totals = np.zeros(groups)
    least = 0.0
    for n in range(count):
        sizes[labels[n]] += 1
        least += IMPROVES * _value(objective, similarity[n, n], 1)
        for m in range(count):
            links[n, labels[m]] += similarity[n, m]
    for n in range(count):
        totals[labels[n]] += links[n, labels[n]]
    n, rested, swaps = 0, 0, False
    while rested < count or not swaps:
        if rested >= count:
            swaps, rested = True, 0
        rested += 1
        if swaps:
            partner = _best_swap(n, objective, similarity, labels, sizes, totals, links, least)
            if partner >= 0:
                source, target = labels[n], labels[partner]
                _move(similarity, n, target, labels, sizes, totals, links)
                _move(similarity, partner, source, labels, sizes, totals, links)
                swaps, rested = False, 0
        else:
            target = _best_move(n, objective, similarity[n, n], labels[n], sizes, totals, links, least)
            if target >= 0:
                _move(similarity, n, target, labels, sizes, totals, links)
                rested = 0
        n = (n + 1) % count


@compiled
def _nearest_two(
    distances: NDArray[np.float64], medoids: NDArray[np.int64], near: NDArray[np.int64], two: NDArray[np.float64]
) -> float:
    """Every expert's nearest medoid, its distance and that of the second, and the sum of the first."""
    total = 0.0
    for n in range(len(distances)):
        two[n, 0] = two[n, 1] = np.inf
        for group in range(len(medoids)):
            distance = distances[n, medoids[group]]
            if distance < two[n, 0]:
                near[n] = group
                two[n, 1] = two[n, 0]
                two[n, 0] = distance
            elif distance < two[n, 1]:
                two[n, 1] = distance
        total += two[n, 0]
    return total


@compiled
def _exchange_medoids(distances: NDArray[np.float64], medoids: NDArray[np.int64]) -> None:
    """Exchange single medoids while the cost falls (PAM; all exchanges for one candidate at once, as FastPAM)."""
    count = len(distances)
    near = np.zeros(count, np.int64)
    two = np.empty((count, 2))
    changes = np.empty(len(medoids))
    total = _nearest_two(distances, medoids, near, two)
    rested = 0
    n = 0
    while rested < count:
        shared = 0.0
        changes[:] = 0.0
        for m in range(count):
            distance = distances[m, n]
            if distance < two[m, 0]:
                shared += distance - two[m, 0]
            else:
                changes[near[m]] += min(distance, two[m, 1]) - two[m, 0]
        group = np.argmin(changes)
        rested += 1
        # a medoid as candidate brings nothing: the least change is then that of its own exchange, 0
        if shared + changes[group] < -IMPROVES * total:
            medoids[group] = n
            total = _nearest_two(distances, medoids, near, two)
            rested = 0
        n = (n + 1) % count


@compiled
def _score(table: NDArray[np.float64], labels: NDArray[np.uint8], groups: int, objective: int) -> float:
    """A growth string's score, summed in the order of the string alone: equal strings score equal to the bit."""
    count = len(table)
    score = 0.0
    for group in range(groups):
        total, size, cost = 0.0, 0, np.inf
        for n in range(count):
            if labels[n] != group:
                continue
            link = 0.0
            for m in range(count):
                if labels[m] == group:
                    link += table[m, n]
            size += 1
            total += link
            cost = min(cost, link)
        score += -cost if objective == MEDOIDS else _value(objective, total, size)
    return score


@compiled
def _first_of_the_best(found: NDArray[np.uint8], scores: NDArray[np.float64], tie: float) -> int:
    """The smallest string among those within ``tie`` of the best score."""
    best = scores.max()
    chosen = -1
    for i in range(len(found)):
        if not scores[i] >= best - tie * abs(best):
            continue
        if chosen < 0:
            chosen = i
            continue
        for n in range(found.shape[1]):
            if found[i, n] != found[chosen, n]:
                if found[i, n] < found[chosen, n]:
                    chosen = i
                break
    return max(chosen, 0)


@compiled
def _search(
    tables: NDArray[np.float64],
    draws: NDArray[np.int64],
    groups: int,
    objective: int,
    restarts: int,
    tie: float,
    out: NDArray[np.uint8],
) -> None:
    count = tables.shape[1]
    state = np.empty(1, np.uint64)
    items = np.empty(groups, np.int64)
    labels = np.empty((restarts, count), np.int64)
    found = np.empty((restarts, count), np.uint8)
    scores = np.empty(restarts)
    distances = np.empty((count, count))
    for row in range(len(tables)):
        table = tables[row]
        for n in range(count):
            for m in range(count):
                pair = table[n, n] + table[m, m] - 2 * table[n, m]
                distances[n, m] = table[n, m] if objective == MEDOIDS else max(pair, 0.0)
        for restart in range(restarts):
            _seed(state, draws[row], restart)
            # two kinds of start: spread ones find groups far apart, random ones what those always miss
            if restart % 2:
                _random_items(count, state, items)
            else:
                _spread_items(distances, state, items)
            if objective == MEDOIDS:
                _exchange_medoids(distances, items)
                _assign(distances, items, labels[restart])
            else:
                if restart % 2:
                    _scatter(groups, state, items, labels[restart])
                else:
                    _assign(distances, items, labels[restart])
                _improve(table, groups, objective, labels[restart])
        grow(labels, found)
        for restart in range(restarts):
            scores[restart] = _score(table, found[restart], groups, objective)
        out[row] = found[_first_of_the_best(found, scores, tie)]


def searched_partition(
    table: NDArray[np.float64], groups: int, objective: str, draws: NDArray[np.integer[Any]], restarts: int = RESTARTS
) -> NDArray[np.uint8]:
    """(rows, N) uint8 growth strings: per row the best of ``restarts`` local optima with exactly ``groups`` groups.

    As ``partitions.best_partition``, from the same tables and for the same objectives, without its bound on N and without
    its guarantee: kernel k-means and its spherical form move single experts (Hartigan and Wong 1979), medoids are exchanged
    one by one (Kaufman and Rousseeuw's PAM). Ties are broken among the optima that were found.
    """
    out = np.empty(table.shape[:2], np.uint8)
    tables = np.ascontiguousarray(table, np.float64)
    _search(tables, draws.astype(np.int64), groups, OBJECTIVES[objective], restarts, TIE, out)
    return out


@cache
def _chances(count: int, groups: int) -> NDArray[np.float64]:
    """[n, k]: the share of the partitions of n items into k blocks in which the last item is alone, S(n-1,k-1) / S(n,k)."""
    stirling = [[0] * (groups + 1) for _ in range(count + 1)]
    stirling[0][0] = 1
    chances = np.zeros((count + 1, groups + 1))
    for n in range(1, count + 1):
        for k in range(1, min(n, groups) + 1):
            stirling[n][k] = stirling[n - 1][k - 1] + k * stirling[n - 1][k]
            chances[n, k] = stirling[n - 1][k - 1] / stirling[n][k]
    return chances


@compiled
def _sample(draws: NDArray[np.int64], groups: int, chances: NDArray[np.float64], out: NDArray[np.uint8]) -> None:
    state = np.empty(1, np.uint64)
    for row in range(len(out)):
        _seed(state, draws[row], 0)
        blocks = groups
        for n in range(out.shape[1], 0, -1):
            if _unit(state) < chances[n, blocks]:
                blocks -= 1
                out[row, n - 1] = blocks
            else:
                out[row, n - 1] = _below(state, blocks)


def sampled_partition(draws: NDArray[np.integer[Any]], count: int, groups: int) -> NDArray[np.uint8]:
    """(rows, N) uint8 growth strings: per row a partition seeded by its 32-bit draw, each as likely as the others.

    The last item is alone in its block in S(n-1,k-1) of the S(n,k) partitions (Stirling numbers of the second kind), and in
    the others it is in any of the k blocks of the rest; so for the item before it, and so on.
    """
    out = np.empty((len(draws), count), np.uint8)
    _sample(draws.astype(np.int64), groups, _chances(count, groups), out)
    return out
