"""Partitions of a few experts: enumerated, scored against a table of pairs, the best of all taken.

Every criterion of Channel Merging's clustering (arXiv 2412.15283, section 3.2) is a sum over the groups of a value that the
group's members alone decide, so a channel costs one value per subset of its experts and one sum per partition.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pipeline.kernels.compiled import compiled

ENUMERATED: Final = 8
"""Partitions are enumerated up to here: 1701 of 8 experts into 4 groups."""
TIE: Final = 1e-5
"""Partitions that score within this share of the best are tied; the smallest restricted-growth string wins."""

KMEANS: Final = 0
SPHERICAL: Final = 1
MEDOIDS: Final = 2
OBJECTIVES: Final = {"kmeans": KMEANS, "spherical": SPHERICAL, "medoids": MEDOIDS}


@cache
def partitions(count: int, groups: int) -> NDArray[np.uint8]:
    """(partitions, count) uint8: all partitions of ``count`` items into exactly ``groups`` blocks, in ascending order.

    They are restricted-growth strings: label 0 first, each new label one more than the largest before.
    """
    found: list[tuple[int, ...]] = []

    def grow(labels: tuple[int, ...], used: int) -> None:
        if len(labels) == count:
            if used == groups:
                found.append(labels)
            return
        for label in range(min(used + 1, groups)):
            grow((*labels, label), max(used, label + 1))

    grow((), 0)
    return np.array(found, dtype=np.uint8).reshape(len(found), count)


@cache
def _blocks(count: int, groups: int) -> NDArray[np.intp]:
    """(partitions, groups): every partition's blocks as bit sets of their members."""
    labels = partitions(count, groups)
    bits = np.left_shift(1, np.arange(count))
    return np.stack([((labels == group) * bits).sum(axis=1) for group in range(groups)], axis=1)


@compiled
def _subset_values(
    table: NDArray[np.float64],
    objective: int,
    links: NDArray[np.float64],
    sums: NDArray[np.float64],
    values: NDArray[np.float64],
) -> None:
    """What every subset of the experts, a bit set, is worth as a group; ``links`` and ``sums`` are room to work in."""
    count = len(table)
    links[0], sums[0], values[0] = 0.0, 0.0, 0.0
    for subset in range(1, 1 << count):
        last = 0
        while subset >> (last + 1):
            last += 1
        rest = subset ^ (1 << last)
        size = 0
        nearest = np.inf
        for n in range(count):
            links[subset, n] = links[rest, n] + table[last, n]
            if subset >> n & 1:
                size += 1
                nearest = min(nearest, links[subset, n])
        sums[subset] = sums[rest] + table[last, last] + 2 * links[rest, last]
        if objective == KMEANS:
            values[subset] = sums[subset] / size
        elif objective == SPHERICAL:
            values[subset] = np.sqrt(max(sums[subset], 0.0))
        else:
            values[subset] = -nearest


@compiled
def _best(tables: NDArray[np.float64], blocks: NDArray[np.intp], objective: int, tie: float, out: NDArray[np.intp]) -> None:
    """Per row the first partition whose score is within ``tie`` of the best."""
    count, total = tables.shape[1], len(blocks)
    links = np.empty((1 << count, count))
    sums = np.empty(1 << count)
    values = np.empty(1 << count)
    scores = np.empty(total)
    for row in range(len(tables)):
        _subset_values(tables[row], objective, links, sums, values)
        best = -np.inf
        for partition in range(total):
            score = values[blocks[partition, 0]]
            for group in range(1, blocks.shape[1]):
                score += values[blocks[partition, group]]
            scores[partition] = score
            best = max(best, score)
        least = best - tie * abs(best)
        chosen = 0
        while chosen < total - 1 and not scores[chosen] >= least:
            chosen += 1
        out[row] = chosen


def best_partition(table: NDArray[np.float64], groups: int, objective: str) -> NDArray[np.uint8]:
    """(rows, N) uint8 labels: per row the best of all partitions into exactly ``groups`` groups. N <= ``ENUMERATED``.

    ``table``: (rows, N, N) float64, inner products or, for medoids, distances. ``objective``: kmeans maximises
    sum_C |sum x|^2 / |C|, which is k-means' own; spherical maximises sum_C |sum x|, the length of the groups' mean
    directions, and prefers groups of equal size where deltas are nearly orthogonal; medoids minimises
    sum_C min_m sum_a D_am, m and a in C. Scores within ``TIE`` of the best count as equal; medoids' score is its cost,
    which is a sum of distances and so as exact as they are, however small beside the deltas.
    """
    chosen = np.empty(len(table), np.intp)
    _best(np.ascontiguousarray(table, np.float64), _blocks(table.shape[1], groups), OBJECTIVES[objective], TIE, chosen)
    return partitions(table.shape[1], groups)[chosen]


def drawn_partition(draws: NDArray[np.integer[Any]], count: int, groups: int) -> NDArray[np.uint8]:
    """(rows, N) uint8 labels: per row the partition that its 32-bit draw picks, each as likely as the others."""
    labels = partitions(count, groups)
    picked: NDArray[np.uint8] = labels[(draws.astype(np.uint64) * np.uint64(len(labels))) >> np.uint64(32)]
    return picked


@compiled
def grow(labels: NDArray[np.integer[Any]], out: NDArray[np.uint8]) -> None:
    """Write each row of ``labels``, numbers below 256, as a restricted-growth string."""
    names = np.empty(256, np.int64)
    for row in range(len(labels)):
        names[:] = -1
        used = 0
        for n in range(labels.shape[1]):
            label = labels[row, n]
            if names[label] < 0:
                names[label] = used
                used += 1
            out[row, n] = names[label]


def growth_labels(labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The same grouping (rows, N) as restricted-growth strings."""
    out = np.empty_like(labels)
    grow(labels, out)
    return out
