"""Channel Merging's clustering: per output channel, k-means over the experts' delta rows, from Gram matrices alone.

k-means on L2-normalised rows minimises sum_n |x_n|^2 - sum_C (1/|C|) sum_{a,b in C} <x_a, x_b>, so with the Gram matrix
normalised to cosines the optimum over all partitions into exactly K groups is a sum per subset of experts and an argmax
(arXiv 2412.15283, section 3.2, names the algorithm; the enumeration is exact and needs no seed).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_EXPERTS = 8
"""Partitions are enumerated up to here: 1701 of 8 experts into 4 groups."""
SCORES_AT_ONCE = 1 << 20
TIE = 1e-5
"""Partitions that score within this share of the best are tied; the smallest restricted-growth string wins."""


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


def _subset_sums(similarity: NDArray[np.float64]) -> NDArray[np.float64]:
    """(rows, 2^N): for every subset of the experts the sum of all similarities inside it, |sum of its vectors|^2."""
    rows, count, _ = similarity.shape
    sums = np.zeros((rows, 1 << count))
    for subset in range(1, 1 << count):
        last = subset.bit_length() - 1
        rest = [n for n in range(last) if subset >> n & 1]
        cross = similarity[:, rest, last].sum(axis=1)
        sums[:, subset] = sums[:, subset & ~(1 << last)] + similarity[:, last, last] + 2 * cross
    return sums


def cosines(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gram matrices (…, N, N) normalised to cosines; 0 where a norm is 0."""
    norms = np.sqrt(np.diagonal(gram, axis1=-2, axis2=-1))
    scale = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
    result: NDArray[np.float64] = gram * scale[..., :, None] * scale[..., None, :]
    return result


def best_partition(similarity: NDArray[np.float64], groups: int, objective: str) -> NDArray[np.uint8]:
    """(rows, N) uint8 labels: per row the best of all partitions into exactly ``groups`` groups.

    ``similarity``: (rows, N, N) float64. ``objective``: kmeans maximises sum_C |sum x|^2 / |C|, which is k-means' own;
    spherical maximises sum_C |sum x|, the length of the groups' mean directions, and prefers groups of equal size where
    deltas are nearly orthogonal. Scores within ``TIE`` of the best count as equal.
    """
    rows, count, _ = similarity.shape
    labels, blocks = partitions(count, groups), _blocks(count, groups)
    sizes = np.array([max(1, subset.bit_count()) for subset in range(1 << count)])
    out = np.empty((rows, count), np.uint8)
    step = max(1, SCORES_AT_ONCE // len(labels))
    for start in range(0, rows, step):
        sums = _subset_sums(similarity[start : start + step])
        values = sums / sizes if objective == "kmeans" else np.sqrt(np.maximum(sums, 0))
        scores = sum((values[:, blocks[:, group]] for group in range(1, groups)), values[:, blocks[:, 0]])
        best = scores.max(axis=1, keepdims=True)
        out[start : start + step] = labels[np.argmax(scores >= best - TIE * np.abs(best), axis=1)]
    return out


def drawn_partition(draws: NDArray[np.integer[Any]], count: int, groups: int) -> NDArray[np.uint8]:
    """(rows, N) uint8 labels: per row the partition that its 32-bit draw picks, each as likely as the others."""
    labels = partitions(count, groups)
    picked: NDArray[np.uint8] = labels[(draws.astype(np.uint64) * np.uint64(len(labels))) >> np.uint64(32)]
    return picked


def growth_labels(labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The same grouping (rows, N) as restricted-growth strings."""
    out = np.zeros_like(labels)
    used = np.zeros(len(labels), np.uint8)
    for n in range(labels.shape[1]):
        fresh = np.ones(len(labels), bool)
        for m in range(n):
            same = labels[:, m] == labels[:, n]
            out[same, n] = out[same, m]
            fresh &= ~same
        out[fresh, n] = used[fresh]
        used += fresh
    return out


@dataclass(frozen=True)
class Clustering:
    """What makes a good grouping."""

    kind: str
    """kmeans, spherical or random."""
    metric: str
    """cosine: rows are normalised first; euclidean: they are not. Chance needs neither."""


def cluster_channels(
    gram: NDArray[np.float64], groups: int, clustering: Clustering, draws: NDArray[np.integer[Any]]
) -> NDArray[np.uint8]:
    """(rows, N) uint8 restricted-growth labels of a clustering into ``groups`` groups.

    ``gram``: (rows, N, N) float64, experts in order of name; ``draws``: (rows,) 32-bit random numbers, used by ``random``.
    Experts whose delta is zero form a group of their own, one of the K, when K > 1 and another delta is not zero; the
    rest is clustered into the groups that remain.
    """
    rows, count, _ = gram.shape
    if groups >= count:
        return np.broadcast_to(np.arange(count, dtype=np.uint8), (rows, count)).copy()
    out = np.zeros((rows, count), np.uint8)
    if groups == 1:
        return out
    changed = np.diagonal(gram, axis1=1, axis2=2) > 0
    patterns, kinds = np.unique(changed, axis=0, return_inverse=True)
    for kind, pattern in enumerate(patterns):
        members = np.flatnonzero(pattern)
        if not len(members):
            continue
        here = np.flatnonzero(kinds.reshape(-1) == kind)
        remaining = min(groups - (len(members) < count), len(members))
        labels = np.full((len(here), count), 255, np.uint8)
        if clustering.kind == "random":
            labels[:, members] = drawn_partition(draws[here], len(members), remaining)
        else:
            similarity = gram[np.ix_(here, members, members)]
            similarity = cosines(similarity) if clustering.metric == "cosine" else similarity
            labels[:, members] = best_partition(similarity, remaining, clustering.kind)
        out[here] = growth_labels(labels)
    return out
