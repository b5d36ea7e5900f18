"""``groups: auto``: K for every channel, from the Gram tables. Nothing is read but tables, and no delta.

Every unit that is grouped as one (a channel, a matrix, the model) has a curve: with K = 1..N the error of merging its groups,
each expert's relative to the norm of its own delta of that matrix, and the entries it would store. Entries are spent where
they lower the error most, up to the budget or to the knee of the curve of all units together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.engine import Engine
from pipeline.job import Job
from pipeline.kernels.allocation import allocate, group_errors, knee
from pipeline.plan import TensorPlan
from pipeline.recipe import AUTO, ROUNDING
from pipeline.rows import row_counts
from pipeline.stages.labels import GRAM, ClusterTask, delta_squares, equal_rows, keeps_exact, labels_for, read_channels
from storage.parts import arrays_to_bytes, read_arrays
from storage.stores import Store


@dataclass(frozen=True)
class CurveTask:
    """The tensors of a cluster task whose K is to be chosen."""

    cluster: ClusterTask
    weights: tuple[float, ...]
    folder: Store
    """Where curves are written."""


def read_choice(folder: Store, tensor: str) -> NDArray[np.int64]:
    """(channels,) the K chosen for every channel of a tensor."""
    return read_arrays(folder, f"{tensor}.npz")["groups"]


def _curve_key(tensor: str) -> str:
    return f"{tensor}.curve.npz"


def curves_block(task: CurveTask) -> int:
    """Write the curve of every tensor of the block: errors (units, N) float64 and pool rows (units, N) int64."""
    experts, written = len(task.cluster.experts), 0
    for tensor in task.cluster.tensors:
        if tensor.groups != AUTO:
            continue
        shared, weights = tensor.base_rows, np.array(task.weights)
        norms = delta_squares(task.cluster, tensor).sum(axis=0)
        errors, rows = np.empty((shared, experts)), np.empty((shared, experts), np.int64)
        for channels in read_channels(task.cluster, tensor, equal_rows(task.cluster, tensor)[:shared]):
            span = channels.span
            for k in range(1, experts + 1):
                labels = labels_for(task.cluster, channels, k)
                errors[span, k - 1] = group_errors(channels.tables[GRAM], labels, norms, weights)
                keep = np.broadcast_to(keeps_exact(task.cluster, k), (len(labels),))
                rows[span, k - 1] = row_counts(labels, channels.equal, zero=channels.zero, keep=keep)
        if task.cluster.merge.granularity != "channel":
            errors, rows = errors.sum(axis=0, keepdims=True), rows.sum(axis=0, keepdims=True)
        task.folder.put(_curve_key(tensor.name), arrays_to_bytes({"errors": errors, "rows": rows}))
        written += 1
    return written


def _curves(job: Job, folder: Store, tensors: Sequence[TensorPlan]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Errors and entries of all units, tensor by tensor; one unit for the whole model where it is grouped as one."""
    errors, entries = [], []
    for tensor in tensors:
        stored = read_arrays(folder, _curve_key(tensor.name))
        errors.append(stored["errors"])
        entries.append(stored["rows"] * tensor.width)
    if job.recipe.merge.granularity == "model":
        return np.sum(errors, axis=0), np.sum(entries, axis=0)
    return np.concatenate(errors), np.concatenate(entries)


def _fixed_entries(job: Job) -> int:
    """Entries of the merged tensors whose K a rule sets."""
    return sum(t.groups * t.base_rows * t.width for t in job.plan.merged if t.groups != AUTO)


def choose_groups(job: Job, engine: Engine, tasks: Sequence[ClusterTask], folder: Store) -> tuple[str, ...]:
    """Write K per channel of every tensor with ``groups: auto``; what a user should know of it.

    The plan has seen to it that the budget covers what has to be stored.
    """
    weights = tuple(job.recipe.experts[name].weight for name in job.plan.experts)
    asked = [task for task in tasks if any(tensor.groups == AUTO for tensor in task.tensors)]
    engine.run(
        "choose", curves_block, [CurveTask(task, weights, folder) for task in asked], [task.tensors[0].name for task in asked]
    )
    tensors = [tensor for tensor in job.plan.merged if tensor.groups == AUTO]
    errors, entries = _curves(job, folder, tensors)
    everything = sum(tensor.base_rows * tensor.width for tensor in job.plan.merged) * len(job.plan.experts)
    if job.recipe.merge.budget is None:
        found = knee(errors, entries)
        budget, why = found.budget, f"no budget: {found.why}"
    else:
        budget = int(job.recipe.merge.budget * everything * (1 + ROUNDING)) - _fixed_entries(job)
        why = f"budget {job.recipe.merge.budget} of the experts' entries in merged tensors"
    if len(errors) == 1:  # nothing to weigh it against: the least error that fits, be it off the curve
        chosen = np.array([np.where(entries[0] <= budget, errors[0], np.inf).argmin() + 1])
    else:
        chosen = allocate(errors, entries, budget)
    _write_choice(job, folder, tensors, chosen)
    return (_summary(why, chosen, errors, entries, _fixed_entries(job), everything),)


def _write_choice(job: Job, folder: Store, tensors: Sequence[TensorPlan], chosen: NDArray[np.int64]) -> None:
    at = 0
    for tensor in tensors:
        if job.recipe.merge.granularity == "channel":
            mine = chosen[at : at + tensor.base_rows]
            at += tensor.base_rows
        else:
            mine = np.repeat(chosen[at : at + 1], tensor.base_rows)
            at += job.recipe.merge.granularity == "layer"
        folder.put(f"{tensor.name}.npz", arrays_to_bytes({"groups": mine}))


def _summary(
    why: str,
    chosen: NDArray[np.int64],
    errors: NDArray[np.float64],
    entries: NDArray[np.int64],
    fixed: int,
    everything: int,
) -> str:
    places = (np.arange(len(chosen)), chosen - 1)
    shares = ", ".join(f"K={k} for {100 * (chosen == k).mean():.1f} %" for k in np.unique(chosen))
    stored, left = (
        (int(entries[places].sum()) + fixed) / everything,
        float(errors[places].sum() / max(errors[:, 0].sum(), 1e-300)),
    )
    rest = f"{100 * stored:.1f} % of the merged entries, {100 * left:.1f} % of the error of one model"
    return f"groups: auto: {why}; {shares}; {rest}"
