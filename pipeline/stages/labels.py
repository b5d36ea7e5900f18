"""Which experts share a group: everything a tensor's grouping depends on, and the labels that come of it. No delta is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.kernels.clustering import Clustering, cluster_channels
from pipeline.kernels.fused.philox import first_words
from pipeline.kernels.masks import mask_key
from pipeline.plan import TensorPlan
from pipeline.recipe import AUTO, MergeSection
from pipeline.rows import first_equal
from storage.arrays import ArrayGroup, each
from storage.deltas import digest_array, digest_spec, squares_array, squares_spec, table_array, table_spec
from storage.stores import Store

GRAM = "gram"
TABLE_ENTRIES = 1 << 20
"""Entries of one table held at once: 8 MiB of each."""
Sums = Mapping[str, NDArray[np.float64]]
"""Table -> its sum over channels or tensors, without the axis of channels."""


@dataclass(frozen=True)
class ClusterTask:
    """Whole tensors of one layer."""

    tensors: tuple[TensorPlan, ...]
    experts: tuple[str, ...]
    groups: tuple[ArrayGroup, ...]
    """Delta groups in order of the experts' names."""
    table: ArrayGroup
    positions: tuple[int, ...]
    """Where each expert, in order of name, stands in the tables."""
    merge: MergeSection
    clustering: Clustering
    folder: Store
    """Where row tables are written."""
    whole: Sums | None = None
    """The sums over all merged matrices, for granularity model."""
    chosen: Store | None = None
    """Where the K of every channel lies, for ``groups: auto``."""


@dataclass(frozen=True)
class Channels:
    """What is known of some consecutive rows of one merged tensor, experts in order of name."""

    tensor: TensorPlan
    first: int
    """Channel of the first row."""
    tables: Mapping[str, NDArray[np.float64]]
    """(rows, N, N) or (rows, N, 1) float64; of the Gram matrices, where they are not read, the diagonal alone."""
    whole: Sums | None
    """The sums over what is grouped as one, when that is more than a channel."""
    equal: NDArray[np.int16]
    """(rows, N) see ``first_equal``."""
    zero: NDArray[np.bool_]
    """(rows, N) whether the expert's row is the base's."""

    @property
    def span(self) -> slice:
        """Their place among the tensor's rows."""
        return slice(self.first, self.first + len(self.zero))


def delta_squares(task: ClusterTask, tensor: TensorPlan) -> NDArray[np.float64]:
    """(rows of the base, N) |delta|^2."""

    def one(n: int) -> NDArray[Any]:
        spec = squares_spec(tensor.experts[task.experts[n]])
        return task.groups[n].read(squares_array(tensor.name), spec, 0, tensor.base_rows)

    return np.stack(each(one, list(range(len(task.groups))), at_once=not task.table.store.is_local), axis=1)


def equal_rows(task: ClusterTask, tensor: TensorPlan) -> NDArray[np.int16]:

    def one(n: int) -> NDArray[Any] | None:
        info = tensor.experts.get(task.experts[n])
        return None if info is None else task.groups[n].read(digest_array(tensor.name), digest_spec(info), 0, info.rows)

    digests = each(one, list(range(len(task.groups))), at_once=not task.table.store.is_local)
    return first_equal(digests, tensor.rows)


def _tables(
    task: ClusterTask, tensor: TensorPlan, squares: NDArray[np.float64], start: int, stop: int
) -> dict[str, NDArray[np.float64]]:
    """The tables of rows [start, stop) that grouping this tensor reads, in order of the experts' names."""
    count = len(task.experts)
    diagonal = np.zeros((stop - start, count, count))
    diagonal[:, range(count), range(count)] = squares[start:stop]
    found = {GRAM: diagonal}
    if not tensor.is_clustered:
        return found
    needed = {task.clustering.table} if task.clustering.kind != "random" else set()
    places = list(task.positions)
    if tensor.base is None:
        raise AssertionError(f"{tensor.name}: a merged tensor has a base")
    for kind in needed | {GRAM} if tensor.groups == AUTO else needed:
        spec = table_spec(tensor.base, count, kind)
        stored = task.table.read(table_array(kind, tensor.name), spec, start, stop)
        found[kind] = stored[:, places] if kind == "sums" else stored[:, places][:, :, places]
    return found


def _ranges(task: ClusterTask, tensor: TensorPlan) -> list[tuple[int, int]]:
    """Rows whose tables are held at once: as many whatever the budget, so that sums over them always add up alike."""
    step = max(1, TABLE_ENTRIES // len(task.experts) ** 2)
    return [(start, min(start + step, tensor.base_rows)) for start in range(0, tensor.base_rows, step)]


def _sums(task: ClusterTask, tensor: TensorPlan, squares: NDArray[np.float64]) -> Sums:
    """Every table summed over channels: granularity layer sees a matrix as one channel."""
    parts = [_tables(task, tensor, squares, start, stop) for start, stop in _ranges(task, tensor)]
    return added([{kind: found.sum(axis=0) for kind, found in part.items()} for part in parts])


def read_channels(task: ClusterTask, tensor: TensorPlan, equal: NDArray[np.int16]) -> Iterator[Channels]:
    """Everything a merged tensor's grouping depends on, some of the base's rows at a time."""
    squares = delta_squares(task, tensor)
    whole = task.whole
    if task.merge.granularity == "layer" and tensor.is_clustered:
        whole = _sums(task, tensor, squares)
    for start, stop in _ranges(task, tensor):
        tables = _tables(task, tensor, squares, start, stop)
        yield Channels(tensor, start, tables, whole, equal[start:stop], squares[start:stop] == 0)


def table_sums(task: ClusterTask) -> Sums:
    """The sums over the block's tensors that are to be grouped."""
    return added([_sums(task, tensor, delta_squares(task, tensor)) for tensor in task.tensors if tensor.is_clustered])


def added(parts: Sequence[Sums]) -> Sums:
    """Sums of sums; all are of the same tables."""
    return {kind: np.sum([part[kind] for part in parts], axis=0) for kind in parts[0]}


def labels_for(task: ClusterTask, channels: Channels, groups: int | NDArray[np.integer[Any]]) -> NDArray[np.uint8]:
    """(rows, N) growth strings at the recipe's granularity, with K or a K for every one of these channels."""
    merge, rows, experts = task.merge, len(channels.zero), len(task.experts)
    if isinstance(groups, int) and groups in (1, experts):
        alone = np.arange(experts, dtype=np.uint8) if groups == experts else np.zeros(experts, np.uint8)
        return np.broadcast_to(alone, (rows, experts))
    # no expert has an empty name: these draws are no expert's mask
    key = mask_key(merge.seed, "", "" if merge.granularity == "model" else channels.tensor.name)
    tables, first, count = channels.tables, channels.first, rows
    if merge.granularity != "channel":
        if channels.whole is None:
            raise AssertionError(f"granularity {merge.granularity} needs the sums")
        tables, first, count = {kind: found[None] for kind, found in channels.whole.items()}, 0, 1
        groups = groups if isinstance(groups, int) else groups[:1]
    table = tables.get(task.clustering.table)
    if table is not None and task.clustering.table == "sums":
        table = table[..., 0]
    found = cluster_channels(tables[GRAM], groups, task.clustering, first_words(key, first, count), table)
    return found if merge.granularity == "channel" else np.repeat(found, rows, axis=0)


def keeps_exact(task: ClusterTask, groups: NDArray[np.integer[Any]] | int) -> NDArray[np.bool_] | bool:
    """Whether a group whose members' bits are equal keeps the exact row."""
    return np.asarray(groups) >= len(task.experts) if task.merge.singleton != "keep" else True
