"""Channel Merging's clustering: per output channel, groups of experts from tables of pairs of their delta rows alone.

k-means on L2-normalised rows minimises sum_n |x_n|^2 - sum_C (1/|C|) sum_{a,b in C} <x_a, x_b>, so with the Gram matrix
normalised to cosines a partition's score is a sum over its groups, and no row of weights is read again (arXiv 2412.15283,
section 3.2, names the algorithm). Up to ``ENUMERATED`` experts the optimum over all partitions into exactly K groups is
found by enumeration, exactly and without a seed (``partitions``); above, a seeded local search finds a good one
(``search``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pipeline.kernels.partitions import ENUMERATED, best_partition, drawn_partition, growth_labels
from pipeline.kernels.search import sampled_partition, searched_partition

MAX_EXPERTS: Final = 64


@dataclass(frozen=True)
class Clustering:
    """What makes a good grouping. The paper names k-means, sign and random, and the three metrics (its Tables 4 to 6)."""

    kind: str
    """kmeans, spherical, sign or random.

    The paper's sign groups parameters "based on having the same sign", which is not defined for a row of them: see ``sign``.
    """
    metric: str
    """cosine: rows are normalised first; euclidean: they are not; manhattan: medoids under the L1 distance, for kmeans.

    Chance and the mass of signs need none.
    """
    sign: str = "vector"
    """How kind sign reads the signs of a row: vector, k-means on sgn(delta); mass, two groups by whether sum_j delta_j >= 0."""

    def __post_init__(self) -> None:
        if self.metric == "manhattan" and (self.kind == "spherical" or self.table == "sign"):
            raise ValueError(f"clustering {self.kind} has no metric manhattan: use cosine or euclidean")

    @property
    def table(self) -> str:
        """The table of the similarity pass that is read beside the diagonal of the Gram matrices.

        gram: the Gram matrices (rows, N, N) of the deltas; l1: (rows, N, N) distances sum_j |d_a - d_b|; sign: the Gram
        matrices of sgn(delta); sums: (rows, N) sum_j delta_j.
        """
        if self.kind == "sign":
            return "sums" if self.sign == "mass" else "sign"
        return "l1" if self.kind == "kmeans" and self.metric == "manhattan" else "gram"


def cosines(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gram matrices (…, N, N) normalised to cosines; 0 where a norm is 0."""
    norms = np.sqrt(np.diagonal(gram, axis1=-2, axis2=-1))
    scale = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
    result: NDArray[np.float64] = gram * scale[..., :, None] * scale[..., None, :]
    return result


def _clustered(
    table: NDArray[np.float64], groups: int, clustering: Clustering, draws: NDArray[np.integer[Any]]
) -> NDArray[np.uint8]:
    """(rows, N) labels in exactly ``groups`` groups, 1 <= groups <= N, of experts whose deltas are not zero."""
    rows, count = table.shape[:2]
    if groups == 1:
        return np.zeros((rows, count), np.uint8)
    if clustering.table == "sums":
        return (table < 0).astype(np.uint8)
    if groups == count:
        return np.broadcast_to(np.arange(count, dtype=np.uint8), (rows, count)).copy()
    if clustering.kind == "random":
        return (drawn_partition if count <= ENUMERATED else sampled_partition)(draws, count, groups)
    objective = "kmeans" if clustering.kind == "sign" else clustering.kind
    if clustering.table == "l1":
        objective = "medoids"
    elif clustering.metric == "cosine":
        table = cosines(table)
    if count <= ENUMERATED:
        return best_partition(table, groups, objective)
    return searched_partition(table, groups, objective, draws)


def _checked(
    gram: NDArray[np.float64], groups: NDArray[np.int64], clustering: Clustering, table: NDArray[np.float64] | None
) -> NDArray[np.float64]:
    """The table that is read, of the right shape; or ValueError."""
    rows, count, _ = gram.shape
    if count > MAX_EXPERTS:
        raise ValueError(f"{count} experts: at most {MAX_EXPERTS} can be clustered")
    if rows and groups.min() < 1:
        raise ValueError(f"{groups.min()} groups: a channel needs at least 1")
    if clustering.table == "sums" and ((groups > 2) & (groups < count)).any():
        raise ValueError("the signs of sums make two groups: K must be 1, 2 or the number of experts")
    if clustering.table == "gram":
        return gram
    expected = (rows, count) if clustering.table == "sums" else gram.shape
    if table is None or table.shape != expected:
        found = None if table is None else table.shape
        raise ValueError(f"clustering reads the table {clustering.table} of shape {expected}, not {found}")
    return table


def cluster_channels(
    gram: NDArray[np.float64],
    groups: int | NDArray[np.integer[Any]],
    clustering: Clustering,
    draws: NDArray[np.integer[Any]],
    table: NDArray[np.float64] | None = None,
) -> NDArray[np.uint8]:
    """(rows, N) uint8 restricted-growth labels of a clustering into ``groups`` groups.

    ``gram``: (rows, N, N) float64, experts in order of name, N <= ``MAX_EXPERTS``; its diagonal tells which deltas are zero.
    ``groups``: K, or (rows,) a K for each channel. ``draws``: (rows,) 32-bit random numbers, used by ``random`` and above
    ``ENUMERATED`` experts. ``table``: float64, the table ``clustering.table`` names where that is not the Gram matrices.
    A channel's labels depend on its own entries of these only. ValueError for what does not fit together.

    Experts whose delta is zero form a group of their own, one of the K, when K > 1 and another delta is not zero; the
    rest is clustered into the groups that remain. Exactly K groups come out, except: fewer where fewer than K - 1 deltas
    are not zero, and the mass of signs makes one group of sums that agree.
    """
    rows, count, _ = gram.shape
    wanted = np.broadcast_to(np.asarray(groups, np.int64), (rows,))
    read = _checked(gram, wanted, clustering, table)
    changed = np.diagonal(gram, axis1=1, axis2=2) > 0
    # K first, then one bit per expert: channels alike in both are one call
    members_of = np.where(changed, np.left_shift(np.uint64(1), np.arange(count, dtype=np.uint64)), np.uint64(0)).sum(axis=1)
    alike = np.stack([np.minimum(wanted, count).astype(np.uint64), members_of], axis=1)
    kinds, kind_of = np.unique(alike, axis=0, return_inverse=True)
    out = np.zeros((rows, count), np.uint8)
    for kind, (k, _) in enumerate(kinds.astype(object)):
        here = np.flatnonzero(kind_of.reshape(-1) == kind)
        members = np.flatnonzero(changed[here[0]])
        if k == count:
            out[here] = np.arange(count)
        elif k > 1 and len(members):
            remaining = min(k - (len(members) < count), len(members))
            picked = read[np.ix_(here, members)] if read.ndim == 2 else read[np.ix_(here, members, members)]
            labels = np.full((len(here), count), 255, np.uint8)
            labels[:, members] = _clustered(picked, remaining, clustering, draws[here])
            out[here] = growth_labels(labels)
    return out
