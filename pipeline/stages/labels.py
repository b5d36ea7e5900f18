"""Which experts share a group: everything a tensor's grouping depends on, and the labels that come of it. No delta is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.kernels.clustering import Clustering, cluster_channels
from pipeline.kernels.fused.philox import first_words
from pipeline.kernels.masks import mask_key
from pipeline.plan import TensorPlan
from pipeline.recipe import AUTO, MergeSection
from pipeline.rows import first_equal
from storage.arrays import ArrayGroup
from storage.deltas import digest_array, squares_array, table_array

GRAM = "gram"
Sums = Mapping[str, NDArray[np.float64]]
"""Table -> its sum over channels or tensors, without the axis of channels."""


@dataclass(frozen=True)
class ClusterTask:
    """Whole tensors of one layer."""

    tensors: tuple[TensorPlan, ...]
    experts: tuple[str, ...]
    groups: tuple[Path, ...]
    """Delta groups in order of the experts' names."""
    table: Path
    positions: tuple[int, ...]
    """Where each expert, in order of name, stands in the tables."""
    merge: MergeSection
    clustering: Clustering
    folder: Path
    """Where row tables are written."""
    whole: Sums | None = None
    """The sums over all merged matrices, for granularity model."""
    chosen: Path | None = None
    """Where the K of every channel lies, for ``groups: auto``."""


@dataclass(frozen=True)
class Channels:
    """What is known of one merged tensor's rows of the base, experts in order of name."""

    tensor: TensorPlan
    tables: Mapping[str, NDArray[np.float64]]
    """(rows, N, N) or (rows, N, 1) float64; of the Gram matrices, where they are not read, the diagonal alone."""
    equal: NDArray[np.int16]
    """(rows, N) see ``first_equal``; over all rows of the experts."""
    zero: NDArray[np.bool_]
    """(rows, N) whether the expert's row is the base's."""


def delta_squares(task: ClusterTask, tensor: TensorPlan) -> NDArray[np.float64]:
    """(rows of the base, N) |delta|^2."""
    read = [ArrayGroup(group).read(squares_array(tensor.name), 0, tensor.base_rows) for group in task.groups]
    return np.stack(read, axis=1)


def equal_rows(task: ClusterTask, tensor: TensorPlan) -> NDArray[np.int16]:
    digests = [
        ArrayGroup(group).read(digest_array(tensor.name), 0, tensor.experts[name].rows) if name in tensor.experts else None
        for name, group in zip(task.experts, task.groups, strict=True)
    ]
    return first_equal(digests, tensor.rows)


def _tables(task: ClusterTask, tensor: TensorPlan, squares: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """The tables that grouping this tensor reads, in order of the experts' names."""
    count = len(task.experts)
    diagonal = np.zeros((len(squares), count, count))
    diagonal[:, range(count), range(count)] = squares
    found = {GRAM: diagonal}
    if not tensor.is_clustered:
        return found
    needed = {task.clustering.table} if task.clustering.kind != "random" else set()
    places = list(task.positions)
    for kind in needed | {GRAM} if tensor.groups == AUTO else needed:
        stored = ArrayGroup(task.table).read(table_array(kind, tensor.name), 0, tensor.base_rows)
        found[kind] = stored[:, places] if kind == "sums" else stored[:, places][:, :, places]
    return found


def read_channels(task: ClusterTask, tensor: TensorPlan) -> Channels:
    """Everything a merged tensor's grouping depends on."""
    squares = delta_squares(task, tensor)
    return Channels(tensor, _tables(task, tensor, squares), equal_rows(task, tensor), squares == 0)


def sums_of(tables: Mapping[str, NDArray[np.float64]]) -> Sums:
    """Every table summed over channels: granularity layer sees a matrix as one channel."""
    return {kind: found.sum(axis=0) for kind, found in tables.items()}


def table_sums(task: ClusterTask) -> Sums:
    """The sums over the block's tensors that are to be grouped."""
    return added([sums_of(_tables(task, t, delta_squares(task, t))) for t in task.tensors if t.is_clustered])


def added(parts: Sequence[Sums]) -> Sums:
    """Sums of sums; all are of the same tables."""
    return {kind: np.sum([part[kind] for part in parts], axis=0) for kind in parts[0]}


def labels_for(task: ClusterTask, channels: Channels, groups: int | NDArray[np.integer[Any]]) -> NDArray[np.uint8]:
    """(rows of the base, N) growth strings at the recipe's granularity, with K or a K for every channel."""
    merge, rows, experts = task.merge, channels.tensor.base_rows, len(task.experts)
    if isinstance(groups, int) and groups in (1, experts):
        alone = np.arange(experts, dtype=np.uint8) if groups == experts else np.zeros(experts, np.uint8)
        return np.broadcast_to(alone, (rows, experts))
    # no expert has an empty name: these draws are no expert's mask
    key = mask_key(merge.seed, "", "" if merge.granularity == "model" else channels.tensor.name)
    whole: Mapping[str, NDArray[np.float64]] = channels.tables
    count = rows
    if merge.granularity != "channel":
        sums = sums_of(channels.tables) if merge.granularity == "layer" else task.whole
        if sums is None:
            raise AssertionError("granularity model needs the sums over the model")
        whole, count = {kind: found[None] for kind, found in sums.items()}, 1
        groups = groups if isinstance(groups, int) else groups[:1]
    draws = first_words(key, count)
    table = whole.get(task.clustering.table)
    if table is not None and task.clustering.table == "sums":
        table = table[..., 0]
    found = cluster_channels(whole[GRAM], groups, task.clustering, draws, table)
    return found if count == rows else np.repeat(found, rows, axis=0)


def keeps_exact(task: ClusterTask, groups: NDArray[np.integer[Any]] | int) -> NDArray[np.bool_] | bool:
    """Whether a group whose members' bits are equal keeps the exact row."""
    return np.asarray(groups) >= len(task.experts) if task.merge.singleton != "keep" else True
