"""Cluster: from the tables of pairs and the row digests to the row table of every tensor. No delta is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.engine import Engine
from pipeline.job import Job
from pipeline.plan import TensorPlan
from pipeline.recipe import AUTO
from pipeline.roles import layer_of
from pipeline.rows import RowTable, build_table
from pipeline.stages.choice import choose_groups, chosen_path
from pipeline.stages.labels import (
    ClusterTask,
    added,
    delta_squares,
    equal_rows,
    keeps_exact,
    labels_for,
    read_channels,
    table_sums,
)
from pipeline.stages.similarity import clustering_of, table_order
from storage.deltas import expert_group, table_group


def table_path(folder: Path, tensor: str) -> Path:
    """The file of a tensor's row table inside a job's work folder."""
    return folder / f"{tensor}.npz"


def _table(task: ClusterTask, tensor: TensorPlan) -> RowTable:
    rows, count = tensor.rows, len(task.experts)
    labels = np.broadcast_to(np.arange(count), (rows, count)).copy()
    zero = np.zeros((rows, count), bool)
    keep = np.ones(rows, bool)
    if tensor.policy != "merge":
        if tensor.policy == "base":
            labels[:], zero[:], keep[:] = 0, True, False
        return build_table(labels, equal_rows(task, tensor), zero=zero, keep=keep)
    equal, shared = equal_rows(task, tensor), tensor.base_rows
    groups: int | NDArray[np.integer[Any]]
    if tensor.groups == AUTO:
        if task.chosen is None:
            raise AssertionError("groups: auto needs a choice")
        groups = np.load(chosen_path(task.chosen, tensor.name), allow_pickle=False)
    else:
        groups = tensor.groups
    for channels in read_channels(task, tensor, equal[:shared]):
        span = channels.span
        labels[span] = labels_for(task, channels, groups if isinstance(groups, int) else groups[span])
        zero[span] = channels.zero
    keep[:shared] = keeps_exact(task, groups)
    return build_table(labels, equal, zero=zero, keep=keep)


@dataclass(frozen=True)
class ClusterReceipt:
    """What came of a block."""

    rows: Mapping[str, int]
    """Pool rows per tensor."""
    delta_squares: NDArray[np.float64]
    """(experts,) sum of squares of the delta over merged tensors."""


def cluster_block(task: ClusterTask) -> ClusterReceipt:
    """Write the row tables of a block's tensors."""
    counts, norms = {}, np.zeros(len(task.experts))
    for tensor in task.tensors:
        table = _table(task, tensor)
        table.save(table_path(task.folder, tensor.name))
        counts[tensor.name] = len(table)
        if tensor.policy == "merge":
            norms += delta_squares(task, tensor).sum(axis=0)
    return ClusterReceipt(counts, norms)


@dataclass(frozen=True)
class Grouping:
    """What the stage came to."""

    rows: Mapping[str, int]
    """Pool rows per tensor."""
    delta_squares: tuple[float, ...]
    """Per expert the sum of squares of its delta over merged tensors."""
    notes: tuple[str, ...]
    """What a user should know of the choice of K."""


def cluster(job: Job, engine: Engine) -> Grouping:
    """Group the experts of every channel."""
    folder = job.work / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    order = table_order(job)
    table = table_group(job.deltas, job.base.id, [job.experts[name].id for name in order]).path
    groups = tuple(expert_group(job.deltas, job.base.id, source.id).path for source in job.experts.values())
    positions = tuple(order.index(name) for name in job.plan.experts)
    layers: dict[str, list[TensorPlan]] = {}
    for tensor in job.plan.tensors.values():
        layers.setdefault(layer_of(tensor.name), []).append(tensor)
    tasks = [
        ClusterTask(
            tuple(tensors), job.plan.experts, groups, table, positions, job.recipe.merge, clustering_of(job), folder
        )
        for tensors in layers.values()
    ]  # fmt: skip
    if job.recipe.merge.granularity == "model" and job.plan.clustered:
        summed = [task for task in tasks if any(tensor.is_clustered for tensor in task.tensors)]
        labels = [layer_of(task.tensors[0].name) for task in summed]
        whole = added(engine.run("sum", table_sums, summed, labels))
        tasks = [replace(task, whole=whole) for task in tasks]
    notes: tuple[str, ...] = ()
    if any(tensor.groups == AUTO for tensor in job.plan.merged):
        chosen = job.work / "groups"
        notes = choose_groups(job, engine, tasks, chosen)
        tasks = [replace(task, chosen=chosen) for task in tasks]
    receipts = engine.run("cluster", cluster_block, tasks, list(layers))
    squares = np.sum([receipt.delta_squares for receipt in receipts], axis=0)
    return Grouping({name: rows for receipt in receipts for name, rows in receipt.rows.items()}, tuple(squares.tolist()), notes)
