"""Channel Merging's clustering: per output channel, k-means over the experts' delta rows, from Gram matrices alone.

k-means on L2-normalised rows minimises sum_n |x_n|^2 - sum_C (1/|C|) sum_{a,b in C} <x_a, x_b>, so with the Gram matrix
normalised to cosines the optimum over all partitions into exactly K groups is one matrix product and an argmax
(arXiv 2412.15283, section 3.2, names the algorithm; the enumeration is exact and needs no seed).
"""

from __future__ import annotations

from functools import cache

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
def _averaging(count: int, groups: int) -> NDArray[np.float64]:
    """(partitions, count * count): per partition the matrix sum_C 1_C 1_C^T / |C|, flattened."""
    labels = partitions(count, groups)
    same = labels[:, :, None] == labels[:, None, :]
    matrices: NDArray[np.float64] = same / same.sum(axis=2, keepdims=True)
    return matrices.reshape(len(labels), count * count)


def cosines(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gram matrices (…, N, N) normalised to cosines; 0 where a norm is 0."""
    norms = np.sqrt(np.diagonal(gram, axis1=-2, axis2=-1))
    scale = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
    result: NDArray[np.float64] = gram * scale[..., :, None] * scale[..., None, :]
    return result


def best_partition(similarity: NDArray[np.float64], groups: int) -> NDArray[np.uint8]:
    """(rows, N) uint8 labels: per row the best of all partitions into exactly ``groups`` groups.

    ``similarity``: (rows, N, N) float64. Scores within ``TIE`` of the best count as equal.
    """
    rows, count, _ = similarity.shape
    labels, averaging = partitions(count, groups), _averaging(count, groups)
    out = np.empty((rows, count), np.uint8)
    step = max(1, SCORES_AT_ONCE // len(labels))
    for start in range(0, rows, step):
        part = similarity[start : start + step]
        scores = part.reshape(len(part), count * count) @ averaging.T
        best = scores.max(axis=1, keepdims=True)
        out[start : start + step] = labels[np.argmax(scores >= best - TIE * np.abs(best), axis=1)]
    return out


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


def cluster_channels(gram: NDArray[np.float64], groups: int) -> NDArray[np.uint8]:
    """(rows, N) uint8 restricted-growth labels of cosine k-means into ``groups`` groups.

    ``gram``: (rows, N, N) float64, experts in order of name. Experts whose delta is zero form a group of their own,
    one of the K, when K > 1 and another delta is not zero; the rest is clustered into the groups that remain.
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
        labels[:, members] = best_partition(cosines(gram[np.ix_(here, members, members)]), remaining)
        out[here] = growth_labels(labels)
    return out
