"""The second pass: equal questions brought together, one of each kept; quotas; groups of questions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router_training.questions import DIGEST_BYTES
from router_training.runs import write_ipc

OUTSIDE = -1
"""The label of queries of no expert's kind."""


@dataclass(frozen=True)
class Settled:
    """What a range of buckets came to; its kept rows are in a file, in order of rank."""

    name: str
    available: NDArray[np.int64]
    """Rows that are left, by label; outside comes last."""
    kept: NDArray[np.int64]
    """By source: rows that are left."""
    repeated: NDArray[np.int64]
    """By source: rows that repeat a question of the same expert."""
    shared: NDArray[np.int64]
    """By source: rows whose question stands under several experts, or outside and under one."""
    ambiguous: int
    """Questions that stand under several experts."""


def _table(folder: Path, runs: Sequence[str], first: int, last: int) -> Any:
    """The rows of a range of buckets of all runs, in order of rank, label and text."""
    import pyarrow as pa

    batches = []
    for name in runs:
        with pa.memory_map(str(folder / name)) as file, pa.ipc.open_file(file) as reader:
            batches += [reader.get_batch(bucket) for bucket in range(first, last)]
    return pa.Table.from_batches(batches)


def settle(folder: Path, runs: Sequence[str], first: int, last: int, labels: Sequence[int], experts: int) -> Settled:
    """Settle the buckets [first, last) of all runs. ``labels``: of every source, its expert's position or ``OUTSIDE``.

    Of the rows of one question under one expert the one of the smallest text stays; a question that stands under several
    experts says nothing of either, and one that stands outside too is the expert's.
    """
    import pyarrow as pa

    table = _table(folder, runs, first, last)
    table = table.append_column("label", pa.array(np.asarray(labels, np.int32)[table["source"].to_numpy()], pa.int32()))
    keys = ("high", "low", "label", "text", "source", "language")
    table = table.sort_by([(key, "ascending") for key in keys])
    high, low, label, source = (table[key].to_numpy() for key in ("high", "low", "label", "source"))
    count = len(high)
    new = np.ones(count, bool)
    new[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    starts = np.flatnonzero(new)
    question = np.cumsum(new) - 1
    inner = label != OUTSIDE
    least = np.minimum.reduceat(np.where(inner, label, experts), starts)[question] if count else label
    most = np.maximum.reduceat(label, starts)[question] if count else label
    ambiguous = (most != least) & (most != OUTSIDE)
    shared = ambiguous | (~inner & (most != OUTSIDE))
    leads = new.copy()
    leads[1:] |= label[1:] != label[:-1]
    kept = leads & ~shared
    name = f"settled-{first:03}-{last:03}.arrow"
    columns = ("high", "low", "group_high", "group_low", "label", "language", "text")
    rest = table.select(columns).filter(pa.array(kept))
    write_ipc(folder / name, rest.combine_chunks().to_batches(), rest.schema)

    def by_source(chosen: NDArray[np.bool_]) -> NDArray[np.int64]:
        return np.bincount(source[chosen], minlength=len(labels)).astype(np.int64)

    return Settled(
        name,
        np.bincount(label[kept] % (experts + 1), minlength=experts + 1).astype(np.int64),
        by_source(kept), by_source(~kept & ~shared), by_source(shared),
        int((ambiguous & new).sum()),
    )  # fmt: skip


def quotas(available: Sequence[int], total: int | None) -> list[int]:
    """How many rows every expert gives to a total: all the same, and what one lacks is given by the others.

    What cannot be divided goes to the first. All rows where there is no total, or not so many.
    """
    if total is None or total >= sum(available):
        return list(available)
    given = [0] * len(available)
    left = total
    while left:
        open_to = [expert for expert, rows in enumerate(available) if given[expert] < rows]
        share = left // len(open_to)
        for expert in open_to if share else open_to[:left]:
            more = min(max(share, 1), available[expert] - given[expert])
            given[expert] += more
            left -= more
    return given


@dataclass(frozen=True)
class Components:
    """Which groups of questions belong together, because a question of one is named as another's."""

    nodes: NDArray[np.bytes_]
    """Digests that are linked, in order."""
    roots: NDArray[np.bytes_]
    """The smallest digest of a group that each is linked with, directly or by others."""

    def roots_of(self, groups: NDArray[np.bytes_]) -> NDArray[np.bytes_]:
        """The digest that decides for each group."""
        if not len(self.nodes):
            return groups
        found = np.minimum(np.searchsorted(self.nodes, groups), len(self.nodes) - 1)
        return np.where(self.nodes[found] == groups, self.roots[found], groups)


def joined(links: Iterable[NDArray[np.bytes_]]) -> Components:
    """The components of a graph of digests; ``links``: arrays (n, 2) of a question and the group it is said to belong to.

    A component goes by a group, not by one of its questions: more phrasings do not move it to the other part of the data.
    """
    import scipy.sparse
    import scipy.sparse.csgraph

    pairs = np.concatenate([np.empty((0, 2), f"S{DIGEST_BYTES}"), *links])
    nodes, ends = np.unique(pairs, return_inverse=True)
    ends = ends.reshape(-1, 2)
    graph = scipy.sparse.coo_array((np.ones(len(ends), np.int8), (ends[:, 0], ends[:, 1])), shape=(len(nodes), len(nodes)))
    if not len(nodes):
        return Components(nodes, nodes)
    _, labels = scipy.sparse.csgraph.connected_components(graph, directed=False)
    groups = np.unique(ends[:, 1])  # every component has one
    _, first = np.unique(labels[groups], return_index=True)
    return Components(nodes, nodes[groups[first]][labels])
