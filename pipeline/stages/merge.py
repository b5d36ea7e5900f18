"""Merge: compute the pool rows of every block and write them where they belong in the pool's files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline import memory
from pipeline.engine import Engine
from pipeline.job import Job
from pipeline.kernels.bits import cast, count_non_finite, from_float, to_float
from pipeline.kernels.masks import mask_key
from pipeline.kernels.merging import combine, dare
from pipeline.plan import Block, TensorPlan
from pipeline.recipe import MergeSection
from pipeline.rows import Kind, RowTable, members
from pipeline.stages.cluster import table_path
from pipeline.stages.similarity import expert_bits
from storage.arrays import ArrayGroup
from storage.checkpoint import padded_rows
from storage.deltas import expert_group
from storage.errors import CheckpointError
from storage.layout import DTYPES, SHARD_BYTES
from storage.safetensors_file import Slot, allocate, shard_name, shards, write_at


@dataclass(frozen=True)
class Pool:
    """Where the pool's rows lie: known before anything is merged."""

    files: Mapping[str, tuple[Slot, ...]]
    offsets: Mapping[str, tuple[str, int]]
    """Tensor -> its file and the byte offset of its first row."""


@dataclass(frozen=True)
class MergeTask:
    """Pieces of one layer, and where to write their pool rows."""

    block: Block
    tensors: Mapping[str, TensorPlan]
    targets: Mapping[str, tuple[Path, int]]
    """Tensor -> pool file and byte offset."""
    tables: Path
    experts: tuple[str, ...]
    groups: tuple[Path, ...]
    weights: tuple[float, ...]
    merge: MergeSection
    memory: int


@dataclass(frozen=True)
class MergeReceipt:
    """What a merge task did."""

    bytes_read: int
    bytes_written: int
    error_squares: tuple[float, ...]
    """Per expert the sum of squares of (rebuilt - expert) over merged tensors."""
    delta_squares: tuple[float, ...]
    """Per expert the sum of squares of its delta over merged tensors."""
    non_finite: tuple[tuple[str, int], ...]
    """(tensor, count) of values in pool rows that are no numbers, though every source value was one."""


@dataclass
class _Slice:
    """Some rows of one tensor, with everything a merge of them needs."""

    tensor: TensorPlan
    first: int
    """Channel of the first row."""
    base: NDArray[Any]
    """(rows, width) raw bits; 0 where the base has no such row."""
    own: Sequence[NDArray[Any] | None]
    """Per expert (its rows, width) raw bits in the pool's type, or None when it has none of these rows."""
    deltas: Sequence[torch.Tensor | None]
    """Per expert (rows, width) float32, or None where nothing is merged."""
    pruned: Sequence[torch.Tensor | None]


def _pruned(delta: torch.Tensor, expert: str, tensor: TensorPlan, first: int, merge: MergeSection) -> torch.Tensor:
    """An expert's delta after the recipe's pruning."""
    if merge.method == "dare":
        return dare(delta, mask_key(merge.seed, expert, tensor.name), first * tensor.width, merge.density)
    return delta


def _merged_rows(part: _Slice, local: NDArray[np.intp], who: list[int], task: MergeTask) -> NDArray[Any]:
    """Raw bits of merged rows: base + combined deltas, rounded once (Eq. 3)."""
    index = torch.from_numpy(local)
    chosen = [part.pruned[n] for n in who]
    scaling = None if task.merge.scaling == "mean" else float(task.merge.scaling)
    combined = combine([d[index] for d in chosen if d is not None], [task.weights[n] for n in who], scaling)
    dtype = part.tensor.dtype
    return from_float(to_float(part.base[local], dtype, str(combined.device)) + combined, dtype)


def _span_rows(
    part: _Slice, channels: NDArray[np.int32], kinds: NDArray[np.uint8], who: list[int], task: MergeTask
) -> NDArray[Any]:
    """(rows, width) raw bits of consecutive pool rows of one set of users."""
    local = channels.astype(np.intp) - part.first
    out = np.empty((len(local), part.tensor.width), part.base.dtype)
    exact, merged, base = (kinds == kind for kind in (Kind.EXACT, Kind.MERGED, Kind.BASE))
    if exact.any():
        source = part.own[who[0]]
        if source is None:
            raise AssertionError(f"{part.tensor.name}: a row table names an expert without rows")
        out[exact] = source[local[exact]]
    if base.any():
        out[base] = part.base[local[base]]
    if merged.any():
        out[merged] = _merged_rows(part, local[merged], who, task)
    return out


def _errors(part: _Slice, rebuilt: NDArray[Any], local: NDArray[np.intp], expert: int) -> float:
    """Sum of squares of (rebuilt - expert) over these rows."""
    own = part.own[expert]
    if own is None or part.deltas[expert] is None:
        return 0.0
    dtype = part.tensor.dtype
    return float((to_float(rebuilt, dtype) - to_float(own[local], dtype)).double().square().sum())


class _PoolWriter:
    """Writes the pool rows of one tensor, slice by slice."""

    def __init__(self, task: MergeTask, tensor: TensorPlan) -> None:
        self.task = task
        self.tensor = tensor
        self.table = RowTable.load(table_path(task.tables, tensor.name))
        self.spans = [(members(users), a, b) for users, a, b in self.table.spans()]
        self.file, self.offset = task.targets[tensor.name]
        self.row_bytes = tensor.width * DTYPES[tensor.dtype].size
        self.written = 0
        self.error_squares = np.zeros(len(task.experts))
        self.non_finite = 0

    def write(self, part: _Slice) -> None:
        """Write all pool rows whose channel lies in the slice: in every span they are consecutive."""
        stop = part.first + len(part.base)
        for who, a, b in self.spans:
            channels = self.table.channel[a:b]
            low, high = np.searchsorted(channels, [part.first, stop])
            if low == high:
                continue
            kinds = self.table.kind[a + low : a + high]
            rows = _span_rows(part, channels[low:high], kinds, who, self.task)
            write_at(self.file, self.offset + (a + int(low)) * self.row_bytes, rows)
            self.written += rows.nbytes
            self.non_finite += count_non_finite(rows, self.tensor.dtype)
            local = channels[low:high].astype(np.intp) - part.first
            for n in who:
                self.error_squares[n] += _errors(part, rows, local, n)


def _prepare(
    task: MergeTask, tensor: TensorPlan, first: int, base: NDArray[Any], stored: Sequence[NDArray[Any] | None]
) -> _Slice:
    """Experts' rows, deltas and pruned deltas of one slice."""
    own: list[NDArray[Any] | None] = []
    deltas: list[torch.Tensor | None] = []
    pruned: list[torch.Tensor | None] = []
    # rows beyond the base's are new, not merged
    mergeable = tensor.policy == "merge" and first < tensor.base_rows
    reference = to_float(base, tensor.dtype) if mergeable else None
    for name, part in zip(task.experts, stored, strict=True):
        if part is None or not len(part):
            own.append(None)
            deltas.append(None)
            pruned.append(None)
            continue
        dtype = tensor.experts[name].dtype
        bits = expert_bits(base[: len(part)], tensor.dtype, part, dtype)
        own.append(cast(bits, dtype, tensor.dtype))
        delta = to_float(bits, dtype) - reference[: len(bits)] if reference is not None else None
        deltas.append(delta)
        pruned.append(None if delta is None else _pruned(delta, name, tensor, first, task.merge))
    return _Slice(tensor, first, base, own, deltas, pruned)


def _cuts(start: int, stop: int, step: int, border: int) -> list[tuple[int, int]]:
    """Cut [start, stop) into ranges of at most ``step`` rows, none of which crosses the border."""
    edges = sorted({start, stop, *range(start, stop, step), *([border] if start < border < stop else [])})
    return list(pairwise(edges))


def merge_block(task: MergeTask) -> MergeReceipt:
    """Write the pool rows of a block's channels. The same block twice writes the same bytes."""
    groups = [ArrayGroup(path) for path in task.groups]
    read = written = 0
    errors, norms = np.zeros(len(task.experts)), np.zeros(len(task.experts))
    bad: list[tuple[str, int]] = []
    for piece in task.block.pieces:
        tensor = task.tensors[piece.tensor]
        writer = _PoolWriter(task, tensor)
        rows_at_once = memory.slice_rows(task.memory, tensor.chunk_rows, tensor.width, len(task.experts))
        for start in range(piece.start, piece.stop, tensor.chunk_rows):
            stop = min(start + tensor.chunk_rows, piece.stop)
            base, _ = padded_rows(tensor.base, start, stop, tensor.reference)
            stored: list[NDArray[Any] | None] = []
            for name, group in zip(task.experts, groups, strict=True):
                info = tensor.experts.get(name)
                stored.append(group.read(tensor.name, start, min(stop, info.rows)) if info and start < info.rows else None)
            read += base.nbytes + sum(part.nbytes for part in stored if part is not None)
            for low, high in _cuts(start, stop, rows_at_once, tensor.base_rows):
                cut = slice(low - start, high - start)
                part = _prepare(task, tensor, low, base[cut], [None if s is None else s[cut] for s in stored])
                writer.write(part)
                norms += [0.0 if d is None else float(d.double().square().sum()) for d in part.deltas]
        written += writer.written
        errors += writer.error_squares
        if writer.non_finite:
            bad.append((tensor.name, writer.non_finite))
    return MergeReceipt(read, written, tuple(errors), tuple(norms), tuple(bad))


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
    return Pool(files, offsets)


def merge(job: Job, engine: Engine, pool: Pool) -> list[MergeReceipt]:
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
                block,
                tensors,
                targets,
                job.work / "tables",
                job.plan.experts,
                groups,
                weights,
                job.recipe.merge,
                job.plan.memory,
            )
        )
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
