"""Merge: compute the pool rows of every block and write them where they belong in the pool's files."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import memory
from pipeline.engine import Engine
from pipeline.job import Job
from pipeline.kernels.bits import cast, to_float
from pipeline.kernels.forms import COMBINED, SUM, WHOLE, Combining, PoolRows, Pruning, in_order_of_channel
from pipeline.kernels.fused import merging as fused
from pipeline.kernels.fused.floats import tagged
from pipeline.kernels.methods.byom import Rows, kept_per_row, residue
from pipeline.plan import Block, TensorPlan
from pipeline.recipe import MergeSection
from pipeline.rows import RowTable
from pipeline.stages.cluster import table_path
from pipeline.stages.groups import Merging
from pipeline.stages.similarity import Measured
from pipeline.stages.slices import FUSED, Slice, bytes_of, chunks, device_of
from storage.arrays import ArrayGroup
from storage.deltas import expert_group
from storage.errors import CheckpointError
from storage.layout import DTYPES, RESIDUE_FILE, SHARD_BYTES
from storage.safetensors_file import Slot, allocate, shard_name, shards, write_at

NOTHING_PRUNED = Pruning(WHOLE, np.zeros((1, 2), np.uint32), 0, np.ones(1, np.float32), np.zeros((1, 1), np.float32), 0)
NOTHING_COMBINED = Combining(SUM, False, np.ones((1, 1), np.float32))


@dataclass(frozen=True)
class Pool:
    """Where the pool's rows lie: known before anything is merged."""

    files: Mapping[str, tuple[Slot, ...]]
    offsets: Mapping[str, tuple[str, int]]
    """Tensor -> its file and the byte offset of its first row."""
    residues: Mapping[str, Mapping[str, Residue]]
    """Tensor -> expert -> where the entries that it keeps for itself go."""


@dataclass(frozen=True)
class Residue:
    """Where one expert's kept entries of one tensor lie."""

    path: Path
    columns: int
    """Byte offset of the columns, (rows, count) int32."""
    values: int
    """Byte offset of the values, (rows, count) in the pool's type."""
    count: int


@dataclass(frozen=True)
class MergeTask:
    """Pieces of one layer, and where to write their pool rows."""

    block: Block
    tensors: Mapping[str, TensorPlan]
    targets: Mapping[str, tuple[Path, int]]
    """Tensor -> pool file and byte offset."""
    residues: Mapping[str, Mapping[str, Residue]]
    tables: Path
    experts: tuple[str, ...]
    groups: tuple[Path, ...]
    weights: tuple[float, ...]
    merge: MergeSection
    thresholds: Mapping[str, tuple[float, ...]]
    scales: Mapping[str, tuple[float, ...]]
    memory: int
    kernel: str
    threads: int


@dataclass(frozen=True)
class MergeReceipt:
    """What a merge task did."""

    bytes_read: int
    bytes_written: int
    error_squares: tuple[float, ...]
    """Per expert the sum of squares of (rebuilt - expert) over merged tensors."""
    non_finite: tuple[tuple[str, int], ...]
    """(tensor, count) of values in pool rows that are no numbers, though every source value was one."""


class _PoolWriter:
    """Writes the pool rows of one tensor, slice by slice."""

    def __init__(self, task: MergeTask, tensor: TensorPlan) -> None:
        self.task = task
        self.tensor = tensor
        self.table = RowTable.load(table_path(task.tables, tensor.name))
        device = device_of(task.kernel)
        self.merging = Merging(task.merge, task.experts, task.weights, task.kernel == FUSED, device)
        self.file, self.offset = task.targets[tensor.name]
        self.row_bytes = tensor.width * DTYPES[tensor.dtype].size
        self.written = 0
        self.error_squares = np.zeros(len(task.experts))
        self.non_finite = 0

    def write(self, part: Slice) -> None:
        """Write all pool rows whose channel lies in the slice."""
        channel = self.table.channel
        picked = np.flatnonzero((channel >= part.first) & (channel < part.first + len(part)))
        if not len(picked):
            return
        users = self.table.users[picked]
        local = channel[picked].astype(np.int64) - part.first
        rows = in_order_of_channel(local, users, self.table.kind[picked], self.merging.factors(users), len(part))
        out = np.empty((len(picked), self.tensor.width), part.base.dtype)
        errors, bad = self._merge(part, rows, out)
        self.non_finite += bad
        # rows of one set of users are consecutive in the pool
        for run in np.split(np.arange(len(picked)), np.flatnonzero(np.diff(picked) != 1) + 1):
            write_at(self.file, self.offset + int(picked[run[0]]) * self.row_bytes, out[run[0] : run[-1] + 1])
        self.written += out.nbytes
        kept = self.task.residues.get(self.tensor.name, {})
        for n, name in enumerate(self.task.experts):
            if name in kept and part.first < self.tensor.base_rows:
                self.error_squares[n] += self._write_residue(part, n, rows, out, kept[name])
            else:
                self.error_squares[n] += math.fsum(errors[:, n])

    def _merge(self, part: Slice, rows: PoolRows, out: NDArray[Any]) -> tuple[NDArray[np.float64], int]:
        """Fill ``out``; squared errors (channels, experts) and the number of values that are not finite."""
        task, merging = self.task, self.merging
        combined = bool((rows.kinds == COMBINED).any())
        pruning, combining = NOTHING_PRUNED, NOTHING_COMBINED
        if combined:
            name = self.tensor.name
            pruning = merging.pruning(part, task.thresholds.get(name, ()), task.scales.get(name, ()))
            combining = merging.combining(part, rows, task.threads)
        dtype = self.tensor.dtype
        if part.stack is not None and (merging.is_fused(part) or not combined):
            base, target = tagged(part.base, dtype), tagged(out, dtype)
            return fused.merge_rows(base, part.stack, part.at, rows, pruning, combining, target, task.threads)
        from pipeline.kernels.merging import merge_rows

        dtypes = [part.dtype(name) for name in task.experts]
        own = part.own(task.experts)
        known = part.float_deltas(merging.device) if combined else {}
        return merge_rows(part.base, own, dtypes, dtype, rows, merging.method, pruning, combining, out, merging.device, known)

    def _write_residue(self, part: Slice, n: int, rows: PoolRows, out: NDArray[Any], place: Residue) -> float:
        """Write what an expert keeps of a slice; the squared error that is left."""
        bits, dtype, name = part.own(self.task.experts)[n], self.tensor.dtype, self.task.experts[n]
        if bits is None:
            raise AssertionError(f"{self.tensor.name}: a merged tensor has rows of every expert")
        mine = (rows.users >> np.uint64(n) & np.uint64(1)).astype(bool)  # one row per channel, in order
        shared, own = out[rows.places[mine]], cast(bits, part.dtype(name), dtype)
        delta = part.deltas([name], self.merging.device, [part.stored[n]])[0]
        both = Rows(bits, part.dtype(name), delta, shared, dtype, rows.kinds[mine] != COMBINED)
        columns, values = residue(both, place.count, self.task.merge.residual, self.merging.device)
        for offset, found in ((place.columns, columns), (place.values, values)):
            write_at(place.path, offset + part.first * place.count * found.itemsize, found)
        self.written += columns.nbytes + values.nbytes
        rebuilt = shared.copy()
        np.put_along_axis(rebuilt, columns.astype(np.int64), values, axis=1)
        return float((to_float(rebuilt, dtype) - to_float(own, dtype)).double().square().sum())


def _cuts(rows: int, step: int, border: int) -> list[tuple[int, int]]:
    """Cut [0, rows) into ranges of at most ``step`` rows, none of which crosses the border."""
    edges = sorted({0, rows, *range(0, rows, step), *([border] if 0 < border < rows else [])})
    return list(pairwise(edges))


def merge_block(task: MergeTask) -> MergeReceipt:
    """Write the pool rows of a block's channels. The same block twice writes the same bytes."""
    groups = [ArrayGroup(path) for path in task.groups]
    read = written = 0
    errors = np.zeros(len(task.experts))
    bad: list[tuple[str, int]] = []
    for piece in task.block.pieces:
        tensor = task.tensors[piece.tensor]
        writer = _PoolWriter(task, tensor)
        rows_at_once = memory.slice_rows(task.memory, tensor.chunk_rows, tensor.width, len(task.experts))
        for chunk in chunks(piece, tensor.chunk_rows, tensor, task.experts, groups):
            read += bytes_of(chunk)
            for low, high in _cuts(len(chunk), rows_at_once, tensor.base_rows - chunk.first):
                writer.write(chunk.cut(low, high))
        written += writer.written
        errors += writer.error_squares
        if writer.non_finite:
            bad.append((tensor.name, writer.non_finite))
    return MergeReceipt(read, written, tuple(errors), tuple(bad))


def _lay_out_residues(job: Job) -> dict[str, dict[str, Residue]]:
    """Allocate a file per expert for the entries it keeps, where the method keeps any."""
    section = job.recipe.merge
    tensors = job.plan.combined if section.method == "byom" else []
    found: dict[str, dict[str, Residue]] = {tensor.name: {} for tensor in tensors}
    for name in job.plan.experts if tensors else ():
        slots: list[Slot] = []
        counts: dict[str, int] = {}
        for tensor in tensors:
            counts[tensor.name] = count = kept_per_row(section.keep, tensor.width)
            shape = (tensor.base_rows, count)
            slots += [Slot(f"{tensor.name}.columns", "I32", shape), Slot(f"{tensor.name}.values", tensor.dtype, shape)]
        path = job.staged / "experts" / name / RESIDUE_FILE
        path.parent.mkdir(parents=True)
        places = allocate(path, slots)
        for kept, count in counts.items():
            found[kept][name] = Residue(path, places[f"{kept}.columns"], places[f"{kept}.values"], count)
    return found


def lay_out(job: Job, rows: Mapping[str, int]) -> Pool:
    """Deal the tensors to the pool's files and allocate them."""
    slots = [Slot(tensor.name, tensor.dtype, (rows[tensor.name], tensor.width)) for tensor in job.plan.tensors.values()]
    dealt = shards(slots, SHARD_BYTES)
    files = {shard_name("pool", i, len(dealt)): tuple(group) for i, group in enumerate(dealt, 1)}
    job.staged.mkdir(parents=True)
    offsets = {}
    for name, group in files.items():
        for tensor, offset in allocate(job.staged / name, group).items():
            offsets[tensor] = (name, offset)
    return Pool(files, offsets, _lay_out_residues(job))


def merge(job: Job, engine: Engine, pool: Pool, measured: Measured) -> list[MergeReceipt]:
    """Fill the pool."""
    blocks = job.plan.blocks(job.plan.tensors.values())
    groups = tuple(expert_group(job.deltas, job.base.id, source.id).path for source in job.experts.values())
    weights = tuple(job.recipe.experts[name].weight for name in job.plan.experts)
    tasks = []
    for block in blocks:
        tensors = {piece.tensor: job.plan.tensors[piece.tensor] for piece in block.pieces}
        targets = {name: (job.staged / pool.offsets[name][0], pool.offsets[name][1]) for name in tensors}
        tasks.append(
            MergeTask(
                block, tensors, targets, {name: pool.residues[name] for name in tensors if name in pool.residues},
                job.work / "tables", job.plan.experts, groups, weights, job.recipe.merge,
                {name: measured.thresholds[name] for name in tensors if name in measured.thresholds},
                {name: measured.scales[name] for name in tensors if name in measured.scales},
                job.plan.memory, job.recipe.cluster.kernel, engine.threads,
            )
        )  # fmt: skip
    receipts = engine.run("merge", merge_block, tasks, [block.label for block in blocks])
    counts: Counter[str] = Counter()
    for receipt in receipts:
        counts.update(dict(receipt.non_finite))
    if counts:
        remedy = "lower merge.scaling or the experts' weights, or make the tensor private; a private one overflows when cast"
        raise CheckpointError.listing(
            f"values overflow in the base's data type; {remedy}",
            [
                f"tensor {name}: {count} merged or cast values are not finite in {job.plan.tensors[name].dtype}"
                for name, count in counts.items()
            ],
        )
    return receipts
