"""Cluster: from the Gram table and the row digests to the row table of every tensor. No delta is read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.engine import Engine
from pipeline.job import Job
from pipeline.kernels.clustering import Clustering, cluster_channels
from pipeline.kernels.masks import mask_key, philox
from pipeline.plan import TensorPlan
from pipeline.recipe import MergeSection
from pipeline.roles import layer_of
from pipeline.rows import RowTable, build_table, first_equal
from pipeline.stages.similarity import table_order
from storage.arrays import ArrayGroup
from storage.deltas import digest_array, expert_group, gram_group


@dataclass(frozen=True)
class ClusterTask:
    """Whole tensors of one layer."""

    tensors: tuple[TensorPlan, ...]
    experts: tuple[str, ...]
    groups: tuple[Path, ...]
    """Delta groups in order of the experts' names."""
    table: Path
    positions: tuple[int, ...]
    """Where each expert, in order of name, stands in the Gram table."""
    merge: MergeSection
    whole: NDArray[np.float64] | None
    """(N, N) the sum over all merged matrices, for granularity model."""
    folder: Path
    """Where row tables are written."""


def table_path(folder: Path, tensor: str) -> Path:
    """The file of a tensor's row table inside a job's work folder."""
    return folder / f"{tensor}.npz"


def _gram(task: ClusterTask, tensor: TensorPlan) -> NDArray[np.float64]:
    """(rows of the base, N, N) in order of the experts' names."""
    stored = ArrayGroup(task.table).read(tensor.name, 0, tensor.base_rows)
    return np.asarray(stored[:, task.positions][:, :, task.positions], np.float64)


def gram_sums(task: ClusterTask) -> NDArray[np.float64]:
    """(N, N) the sum of the block's Gram matrices, over channels and tensors."""
    total: NDArray[np.float64] = np.sum(
        [_gram(task, tensor).sum(axis=0) for tensor in task.tensors if tensor.policy == "merge"], axis=0
    )
    return total


def _labels(task: ClusterTask, tensor: TensorPlan, gram: NDArray[np.float64]) -> NDArray[np.uint8]:
    """(rows, N) growth strings at the recipe's granularity."""
    merge = task.merge
    clustering = Clustering(merge.clustering, merge.metric)
    # no expert has an empty name: these draws are no expert's mask
    key = mask_key(merge.seed, "", "" if merge.granularity == "model" else tensor.name)
    draws = philox(torch.arange(len(gram)), key)[:, 0].numpy()
    if merge.granularity == "channel":
        return cluster_channels(gram, tensor.groups, clustering, draws)
    one = gram.sum(axis=0) if merge.granularity == "layer" else task.whole
    if one is None:
        raise AssertionError("granularity model needs the sum over the model")
    return np.repeat(cluster_channels(one[None], tensor.groups, clustering, draws[:1]), len(gram), axis=0)


def _table(task: ClusterTask, tensor: TensorPlan) -> RowTable:
    rows, count = tensor.rows, len(task.experts)
    digests = [
        ArrayGroup(group).read(digest_array(tensor.name), 0, tensor.experts[name].rows) if name in tensor.experts else None
        for name, group in zip(task.experts, task.groups, strict=True)
    ]
    labels = np.broadcast_to(np.arange(count), (rows, count)).copy()
    zero = np.zeros((rows, count), bool)
    keep = np.ones(rows, bool)
    if tensor.policy == "base":
        labels[:], zero[:], keep[:] = 0, True, False
    elif tensor.policy == "merge":
        shared = tensor.base_rows
        gram = _gram(task, tensor)
        labels[:shared] = _labels(task, tensor, gram)
        zero[:shared] = np.diagonal(gram, axis1=1, axis2=2) == 0
        keep[:shared] = task.merge.singleton == "keep" or tensor.groups >= count
    return build_table(labels, first_equal(digests, rows), zero=zero, keep=keep)


def cluster_block(task: ClusterTask) -> dict[str, int]:
    """Write the row tables of a block's tensors; the number of pool rows of each."""
    counts = {}
    for tensor in task.tensors:
        table = _table(task, tensor)
        table.save(table_path(task.folder, tensor.name))
        counts[tensor.name] = len(table)
    return counts


def cluster(job: Job, engine: Engine) -> dict[str, int]:
    """Group the experts of every channel; the number of pool rows per tensor."""
    folder = job.work / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    order = table_order(job)
    table = gram_group(job.deltas, job.base.id, [job.experts[name].id for name in order]).path
    groups = tuple(expert_group(job.deltas, job.base.id, source.id).path for source in job.experts.values())
    positions = tuple(order.index(name) for name in job.plan.experts)
    layers: dict[str, list[TensorPlan]] = {}
    for tensor in job.plan.tensors.values():
        layers.setdefault(layer_of(tensor.name), []).append(tensor)
    tasks = [
        ClusterTask(tuple(tensors), job.plan.experts, groups, table, positions, job.recipe.merge, None, folder)
        for tensors in layers.values()
    ]
    if job.recipe.merge.granularity == "model" and job.plan.merged:
        summed = [task for task in tasks if any(tensor.policy == "merge" for tensor in task.tensors)]
        labels = [layer_of(task.tensors[0].name) for task in summed]
        whole = np.sum(engine.run("sum", gram_sums, summed, labels), axis=0)
        tasks = [replace(task, whole=whole) for task in tasks]
    receipts = engine.run("cluster", cluster_block, tasks, list(layers))
    return {name: rows for receipt in receipts for name, rows in receipt.items()}
