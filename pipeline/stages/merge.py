"""Merge: compute the pool rows of every block and write them where they belong in the pool's files."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import memory
from pipeline.job import Job
from pipeline.kernels.bits import cast, to_float
from pipeline.kernels.forms import COMBINED, SUM, WHOLE, Combining, PoolRows, Pruning, in_order_of_channel
from pipeline.kernels.fused import merging as fused
from pipeline.kernels.fused.floats import tagged
from pipeline.kernels.methods.byom import Rows, residue
from pipeline.ledger import Work
from pipeline.plan import Block, TensorPlan
from pipeline.recipe import MergeSection
from pipeline.rows import RowTable
from pipeline.stages.groups import Merging
from pipeline.stages.pool import ResidueTarget, Target
from pipeline.stages.slices import FUSED, Slice, bytes_of, chunks, device_of
from storage.arrays import ArrayGroup
from storage.errors import CheckpointError
from storage.parts import LocalRows, PartRows, sync_data
from storage.stores import Store

NOTHING_PRUNED = Pruning(WHOLE, np.zeros((1, 2), np.uint32), 0, np.ones(1, np.float32), np.zeros((1, 1), np.float32), 0)
NOTHING_COMBINED = Combining(SUM, False, np.ones((1, 1), np.float32))


@dataclass(frozen=True)
class MergeTask:
    """Pieces of one layer, and where to write their pool rows."""

    block: Block
    tensors: Mapping[str, TensorPlan]
    targets: Mapping[str, Target]
    """Tensor -> where its pool rows go."""
    residues: Mapping[str, Mapping[str, ResidueTarget]]
    """Tensor -> expert -> where the entries that it keeps for itself go."""
    tables: Store
    experts: tuple[str, ...]
    groups: tuple[ArrayGroup, ...]
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
    error_squares: list[float]
    """Per expert the sum of squares of (rebuilt - expert) over merged tensors."""
    non_finite: list[tuple[str, int]]
    """(tensor, count) of values in pool rows that are no numbers, though every source value was one."""
    parts: list[str]
    """Keys of the parts written, where rows do not go into the pool's file itself."""


class _PoolWriter:
    """Writes the pool rows of one tensor, slice by slice."""

    def __init__(self, task: MergeTask, tensor: TensorPlan, first: int) -> None:
        self.task = task
        self.tensor = tensor
        self.table = RowTable.load(task.tables, tensor.name)
        device = device_of(task.kernel)
        self.merging = Merging(task.merge, task.experts, task.weights, task.kernel == FUSED, device)
        self.target = task.targets[tensor.name]
        self.kept = task.residues.get(tensor.name, {})
        self._open(first)
        self.parts: list[str] = []
        self.written = 0
        self.error_squares = np.zeros(len(task.experts))
        self.non_finite = 0

    def cuts(self, chunk: Slice, step: int) -> list[tuple[int, int]]:
        """Ranges of a chunk's rows of at most ``step``, none of which crosses the base's last row or a part's first."""
        starts = self.target.part_starts
        borders = starts[(starts > chunk.first) & (starts < chunk.first + len(chunk))]
        return _cuts(len(chunk), step, [self.tensor.base_rows - chunk.first, *(borders - chunk.first).tolist()])

    def _open(self, first: int) -> None:
        self.rows = self.target.open(first)
        self.residues = {name: target.open(first) for name, target in self.kept.items()}

    @property
    def _outs(self) -> list[LocalRows | PartRows]:
        return [self.rows, *(part for pair in self.residues.values() for part in pair)]

    @property
    def files(self) -> set[Path]:
        """Local files that rows went into."""
        return {out.path for out in self._outs if isinstance(out, LocalRows)}

    def finish(self) -> None:
        """Write out what is held back."""
        for out in self._outs:
            if isinstance(out, PartRows) and out.places:
                out.finish()
                self.parts.append(out.key)

    def write(self, part: Slice) -> None:
        """Write all pool rows whose channel lies in the slice."""
        if part.first in self.target.part_starts:
            self.finish()
            self._open(part.first)
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
        self.rows.write(picked, out)
        self.written += out.nbytes
        for n, name in enumerate(self.task.experts):
            if name in self.kept and part.first < self.tensor.base_rows:
                self.error_squares[n] += self._write_residue(part, n, rows, out)
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

    def _write_residue(self, part: Slice, n: int, rows: PoolRows, out: NDArray[Any]) -> float:
        """Write what an expert keeps of a slice; the squared error that is left."""
        bits, dtype, name = part.own(self.task.experts)[n], self.tensor.dtype, self.task.experts[n]
        if bits is None:
            raise AssertionError(f"{self.tensor.name}: a merged tensor has rows of every expert")
        mine = (rows.users >> np.uint64(n) & np.uint64(1)).astype(bool)  # one row per channel, in order
        shared, own = out[rows.places[mine]], cast(bits, part.dtype(name), dtype)
        delta = part.deltas([name], self.merging.device, [part.stored[n]])[0]
        both = Rows(bits, part.dtype(name), delta, shared, dtype, rows.kinds[mine] != COMBINED)
        columns, values = residue(both, self.kept[name].count, self.task.merge.residual, self.merging.device)
        channels = np.arange(part.first, part.first + len(part), dtype=np.int64)
        for rows_out, found in zip(self.residues[name], (columns, values), strict=True):
            rows_out.write(channels, found)
        self.written += columns.nbytes + values.nbytes
        rebuilt = shared.copy()
        np.put_along_axis(rebuilt, columns.astype(np.int64), values, axis=1)
        return float((to_float(rebuilt, dtype) - to_float(own, dtype)).double().square().sum())


def _cuts(rows: int, step: int, borders: Sequence[int]) -> list[tuple[int, int]]:
    """Cut [0, rows) into ranges of at most ``step`` rows, none of which crosses a border."""
    edges = sorted({0, rows, *range(0, rows, step), *(border for border in borders if 0 < border < rows)})
    return list(pairwise(edges))


def merge_block(task: MergeTask) -> MergeReceipt:
    """Write the pool rows of a block's channels. The same block twice writes the same bytes."""
    read = written = 0
    errors = np.zeros(len(task.experts))
    bad: list[tuple[str, int]] = []
    parts: list[str] = []
    files: set[Path] = set()
    for piece in task.block.pieces:
        tensor = task.tensors[piece.tensor]
        writer = _PoolWriter(task, tensor, piece.start)
        step = memory.slice_rows(task.memory, tensor.chunk_rows, tensor.width, len(task.experts))
        for chunk in chunks(piece, tensor.chunk_rows, tensor, task.experts, task.groups):
            read += bytes_of(chunk)
            for low, high in writer.cuts(chunk, step):
                writer.write(chunk.cut(low, high))
        writer.finish()
        written += writer.written
        errors += writer.error_squares
        parts += writer.parts
        files |= writer.files
        if writer.non_finite:
            bad.append((tensor.name, writer.non_finite))
    sync_data(files)
    return MergeReceipt(read, written, errors.tolist(), bad, parts)


WORK: Work[MergeTask, MergeReceipt] = Work("merge", merge_block, priority=3)


def check_finite(job: Job, receipts: Iterable[MergeReceipt]) -> None:
    """CheckpointError when merged or cast values are no numbers."""
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
