"""Cluster: from the tables of pairs and the row digests to the row table of every tensor. No delta is read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.engine import Engine
from pipeline.job import Job
from pipeline.ledger import Item, Ledger, Work, block_key
from pipeline.plan import TensorPlan
from pipeline.recipe import AUTO
from pipeline.roles import layer_of
from pipeline.rows import RowTable, build_table, table_key
from pipeline.stages.choice import choose_groups, read_choice
from pipeline.stages.labels import (
    ClusterTask,
    Sums,
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
from storage.stores import Store


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
        groups = read_choice(task.chosen, tensor.name)
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

    rows: dict[str, int]
    """Pool rows per tensor."""
    delta_squares: list[float]
    """Per expert the sum of squares of its delta over merged tensors."""


def cluster_block(task: ClusterTask) -> ClusterReceipt:
    """Write the row tables of a block's tensors."""
    counts, norms = {}, np.zeros(len(task.experts))
    for tensor in task.tensors:
        table = _table(task, tensor)
        table.save(task.folder, tensor.name)
        counts[tensor.name] = len(table)
        if tensor.policy == "merge":
            norms += delta_squares(task, tensor).sum(axis=0)
    return ClusterReceipt(counts, norms.tolist())


WORK: Work[ClusterTask, ClusterReceipt] = Work("cluster", cluster_block, priority=2)


def looks_at_all(job: Job) -> bool:
    """Whether how one tensor's experts are grouped depends on other tensors."""
    merge = job.recipe.merge
    return (merge.granularity == "model" and bool(job.plan.clustered)) or any(t.groups == AUTO for t in job.plan.merged)


class Grouping:
    """The groups of every channel's experts, wave by wave."""

    def __init__(self, job: Job, engine: Engine) -> None:
        self.job = job
        self.engine = engine
        self.rows: dict[str, int] = {}
        """Pool rows per tensor."""
        self.notes: tuple[str, ...] = ()
        """What a user should know of the choice of K."""
        self.receipts: list[ClusterReceipt] = []
        self._whole: Sums | None = None
        self._chosen: Store | None = None

    @property
    def tables(self) -> Store:
        """Where row tables lie."""
        return self.job.work.under("tables")

    @property
    def delta_squares(self) -> tuple[float, ...]:
        """Per expert the sum of squares of its delta over merged tensors."""
        return tuple(np.sum([receipt.delta_squares for receipt in self.receipts], axis=0).tolist())

    def _tasks(self, tensors: Iterable[TensorPlan]) -> dict[str, ClusterTask]:
        """A task per layer."""
        job, order = self.job, table_order(self.job)
        table = table_group(job.deltas, job.base.id, [job.experts[name].id for name in order])
        groups = tuple(expert_group(job.deltas, job.base.id, source.id) for source in job.experts.values())
        positions = tuple(order.index(name) for name in job.plan.experts)
        layers: dict[str, list[TensorPlan]] = {}
        for tensor in tensors:
            layers.setdefault(layer_of(tensor.name), []).append(tensor)
        return {
            layer: ClusterTask(
                tuple(held), job.plan.experts, groups, table, positions, job.recipe.merge, clustering_of(job), self.tables,
                self._whole, self._chosen,
            )
            for layer, held in layers.items()
        }  # fmt: skip

    def look_at_all(self) -> None:
        """Find out what the grouping of any tensor depends on, once everything is measured."""
        job = self.job
        if job.recipe.merge.granularity == "model" and job.plan.clustered:
            tasks = self._tasks(job.plan.clustered)
            self._whole = added(self.engine.run("sum", table_sums, list(tasks.values()), list(tasks)))
        if any(tensor.groups == AUTO for tensor in job.plan.merged):
            chosen = job.work.under("groups")
            self.notes = choose_groups(job, self.engine, list(self._tasks(job.plan.tensors.values()).values()), chosen)
            self._chosen = chosen

    def wave(self, tensors: Sequence[TensorPlan]) -> None:
        """Group the experts of these tensors' channels."""
        ledger = Ledger(self.job.receipts.under("cluster"), ClusterReceipt)
        items = [
            Item(task, layer, block_key([tensor.name for tensor in task.tensors]), ledger)
            for layer, task in self._tasks(tensors).items()
        ]
        written = self.tables.sizes()
        receipts, _ = WORK.resume(
            self.engine, items, lambda _, receipt: all(table_key(name) in written for name in receipt.rows)
        )
        self.receipts += receipts
        for receipt in receipts:
            self.rows |= receipt.rows
