"""Ingest: stream every expert's difference to the base into the delta store, tensor by tensor, chunk by chunk.

A base whose rows are not at hand in a local file is brought there first, as differences to nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from pipeline import memory
from pipeline.engine import Engine
from pipeline.job import Job, Source, check_unchanged
from pipeline.kernels.bits import as_numbers, cast
from pipeline.kernels.fused.floats import tagged
from pipeline.kernels.fused.sizes import count_infinite, measure
from pipeline.kernels.lowrank import added, delta_rows, embedding_delta_rows
from pipeline.kernels.sizes import BINS
from pipeline.plan import Block, plan_blocks
from storage.arrays import ArrayGroup, ChunkDigests
from storage.checkpoint import check_adapter
from storage.deltas import (
    base_group,
    create_expert_group,
    difference,
    digest_array,
    expert_group,
    group_layout,
    is_whole,
    magnitudes_array,
    row_digests,
    squares_array,
)
from storage.errors import CheckpointError
from storage.layout import DELTA_FORMAT, DTYPES
from storage.tensors import BaseRows, LowRank, TensorInfo, keeping_matrix, padded_rows


@dataclass(frozen=True)
class ChunkStatistics:
    """What is learnt of one chunk while it passes."""

    delta_squares: float
    """Sum of squares of the delta over the rows that the base has; 0 for types that are not numbers to merge."""
    base_squares: float
    largest: float
    """Largest |delta|."""
    unchanged: int
    """Entries whose bits equal the base's."""
    shared: int
    """Entries that the base has too."""
    entries: int
    non_finite: int
    """NaNs and infinities in the expert."""
    base_non_finite: int


@dataclass(frozen=True)
class IngestTask:
    """Pieces of one expert, or of the base."""

    group: Path
    block: Block
    sources: Mapping[str, tuple[TensorInfo, TensorInfo | None]]
    """Tensor -> the expert's rows and the base's; of the base itself, its rows and nothing."""


@dataclass(frozen=True)
class IngestReceipt:
    """What an ingest task wrote and saw."""

    chunks: ChunkDigests
    statistics: list[tuple[str, int, ChunkStatistics]]
    """(tensor, first row, statistics) per chunk."""
    bytes_read: int
    bytes_written: int


@dataclass(frozen=True)
class StageResult:
    """What a stage moved."""

    bytes_read: int
    bytes_written: int
    reused: int = 0
    """Parts found finished from an earlier run."""


@dataclass(frozen=True)
class Chunk:
    """One chunk of one expert's tensor, as raw bits (rows, width), and the base's rows beside it."""

    expert: NDArray[Any]
    dtype: str
    base: NDArray[Any]
    base_dtype: str
    base_rows: int
    """Rows the base has; the rest of ``base`` is zeros."""
    delta: NDArray[np.float32] | None
    """(rows, width) of a LoRA adapter, which is more exact than the difference of the bits."""

    @property
    def differences(self) -> NDArray[Any]:
        """(rows, width) wrapping integers: the bits less the base's."""
        return difference(self.expert, cast(self.base, self.base_dtype, self.dtype))


Factors = dict[TensorInfo, NDArray[np.float32]]
"""Factors of adapters that a task needs for more than one chunk."""


def read_chunk(info: TensorInfo, base: TensorInfo | None, start: int, stop: int, kept: Factors) -> Chunk:
    """Rows [start, stop) of an expert, a whole chunk, with the base's."""
    rows, dtype = padded_rows(base, start, stop, info)
    base_rows = max(0, min(stop, base.rows if base else 0) - start)
    delta = None
    if isinstance(info.data, BaseRows):
        bits = cast(rows, dtype, info.dtype)
    elif isinstance(info.data, LowRank):
        delta = _low_rank_delta(info.data, start, stop, kept)
        bits = added(rows, dtype, delta)
    else:
        bits = info.read(start, stop)
    return Chunk(bits, info.dtype, rows, dtype, base_rows, delta)


def _low_rank_delta(data: LowRank, start: int, stop: int, kept: Factors) -> NDArray[np.float32]:
    """The rows of a chunk of scale * (B A): with other rows at once a product may round otherwise."""

    def whole(factor: TensorInfo) -> NDArray[np.float32]:
        if factor not in kept:
            kept[factor] = as_numbers(factor.read(0, factor.rows), factor.dtype)
        return kept[factor]

    if data.transposed:  # an embedding's: rows are columns of A
        return embedding_delta_rows(np.ascontiguousarray(whole(data.a)[:, start:stop]), whole(data.b), data.scale)
    return delta_rows(whole(data.a), as_numbers(data.b.read(start, stop), data.b.dtype), data.scale)


def measured(chunk: Chunk, differences: NDArray[Any]) -> tuple[ChunkStatistics, NDArray[np.float64], NDArray[np.uint32]]:
    """Statistics of a chunk and its differences, |delta|^2 per row (rows,), counts by size (1, BINS).

    Squares and counts are zeros when anything is not finite.
    """
    squares, base_squares = np.zeros(len(chunk.expert)), np.zeros(len(chunk.expert))
    counts = np.zeros(BINS, np.int64)
    bad = base_bad = 0
    largest = 0.0
    if DTYPES[chunk.dtype].mergeable:
        expert, base = tagged(chunk.expert, chunk.dtype), tagged(chunk.base, chunk.base_dtype)
        bad, base_bad = count_infinite(expert), count_infinite(base)
        if not bad and not base_bad:
            if chunk.delta is not None:
                measure(base, base, 0, np.zeros_like(squares), base_squares, np.zeros_like(counts))
                delta = chunk.delta.view(np.uint32)
                expert, base = tagged(delta, "F32"), tagged(np.zeros_like(delta), "F32")
            ignored = base_squares if chunk.delta is None else np.zeros_like(squares)
            largest = measure(expert, base, chunk.base_rows, squares, ignored, counts)
    shared = differences[: chunk.base_rows]
    unchanged = shared.size - int(np.count_nonzero(shared))
    found = ChunkStatistics(
        float(squares[: chunk.base_rows].sum()), float(base_squares.sum()), largest, unchanged, shared.size, chunk.expert.size,
        bad, base_bad,
    )  # fmt: skip
    return found, squares, counts.astype(np.uint32)[None]


def ingest_block(task: IngestTask) -> IngestReceipt:
    """Write the differences of a block. The same block twice writes the same bytes."""
    group = ArrayGroup(task.group)
    chunks: ChunkDigests = {}
    statistics = []
    read = 0
    for piece in task.block.pieces:
        info, base = task.sources[piece.tensor]
        kept: Factors = {}
        with keeping_matrix():
            for start in range(piece.start, piece.stop, info.chunk_rows):
                chunk = read_chunk(info, base, start, min(start + info.chunk_rows, piece.stop), kept)
                differences = chunk.differences
                found, squares, counts = measured(chunk, differences)
                statistics.append((piece.tensor, start, found))
                chunks.update(group.write(piece.tensor, start, differences if chunk.delta is None else chunk.delta))
                chunks.update(group.write(digest_array(piece.tensor), start, row_digests(chunk.expert, info.dtype)))
                if DTYPES[info.dtype].mergeable:
                    chunks.update(group.write(squares_array(piece.tensor), start, squares))
                    chunks.update(group.write(magnitudes_array(piece.tensor), start // info.chunk_rows, counts))
                read += chunk.expert.nbytes + (0 if base is None else chunk.base.nbytes)
    return IngestReceipt(chunks, statistics, read, sum(size for size, _ in chunks.values()))


def combined(parts: Sequence[ChunkStatistics]) -> dict[str, float | None]:
    """Statistics of a tensor from those of its chunks, in order; None where float32 cannot hold a difference."""
    shared = sum(part.shared for part in parts)
    found = {
        "delta_norm": math.sqrt(sum(part.delta_squares for part in parts)),
        "base_norm": math.sqrt(sum(part.base_squares for part in parts)),
        "largest": max(part.largest for part in parts),
        "unchanged_share": sum(part.unchanged for part in parts) / max(shared, 1),
    }
    return {name: value if math.isfinite(value) else None for name, value in found.items()}


def _non_finite(label: str, receipts: Sequence[IngestReceipt]) -> list[str]:
    """Problems with values that are no numbers, per tensor."""
    problems = []
    counts: dict[str, list[int]] = {}
    for receipt in receipts:
        for tensor, _, part in receipt.statistics:
            found = counts.setdefault(tensor, [0, 0, 0])
            found[0] += part.non_finite
            found[1] += part.base_non_finite
            found[2] += part.entries
    for tensor, (bad, base_bad, entries) in counts.items():
        for whose, count in ((label, bad), ("base", base_bad)):
            if count:
                problems.append(f"{whose}: tensor {tensor}: {count} of {entries} values are NaN or infinite; expected none")
    return problems


def _finish(group: ArrayGroup, receipts: Sequence[IngestReceipt], layout: str) -> None:
    """Declare a source ingested."""
    parts: dict[str, list[tuple[int, ChunkStatistics]]] = {}
    chunks: ChunkDigests = {}
    for receipt in receipts:
        chunks.update(receipt.chunks)
        for tensor, start, part in receipt.statistics:
            parts.setdefault(tensor, []).append((start, part))
    in_order = {t: [part for _, part in sorted(found, key=lambda item: item[0])] for t, found in parts.items()}
    statistics = {tensor: combined(found) for tensor, found in in_order.items()}
    group.finish(chunks, {"format": DELTA_FORMAT, "layout": layout, "statistics": statistics})


@dataclass(frozen=True)
class _Ingested:
    """One source on its way into the store."""

    label: str
    source: Source
    group: ArrayGroup
    held: Mapping[str, tuple[TensorInfo, TensorInfo | None]]
    """Array -> its rows and the base's."""

    @property
    def infos(self) -> dict[str, TensorInfo]:
        return {name: info for name, (info, _) in self.held.items()}


def _sources(job: Job) -> list[_Ingested]:
    """What is to be in the store: the base where it is kept there, then the experts, each once."""
    found = []
    if job.stored_base:
        held: dict[str, tuple[TensorInfo, TensorInfo | None]] = {name: (info, None) for name, info in job.stored_base.items()}
        found.append(_Ingested("base", job.base, base_group(job.deltas, job.base.id), held))
    names = {source.id: name for name, source in job.experts.items()}  # an expert may stand under two names
    for identity, name in names.items():
        held = {t.name: (t.experts[name], t.base) for t in job.plan.tensors.values() if name in t.experts}
        found.append(_Ingested(f"expert {name}", job.experts[name], expert_group(job.deltas, job.base.id, identity), held))
    return found


def _check_copies(label: str, copies: Sequence[tuple[TensorInfo, TensorInfo]]) -> None:
    """CheckpointError when a head that a config ties to the embedding is another one: leaving it out would change the model."""
    for copy, info in copies:
        for start in range(0, copy.rows, copy.chunk_rows):
            stop = min(start + copy.chunk_rows, copy.rows)
            alike = (copy.dtype, copy.shape) == (info.dtype, info.shape)
            if not alike or not np.array_equal(copy.read(start, stop), info.read(start, stop)):
                raise CheckpointError(
                    f"{label}: tensor {copy.name}: its config ties it to {info.name}, but the two differ. Set "
                    "tie_word_embeddings to false in its config.json if both are meant, or remove the one that is not."
                )


def _bring_in(job: Job, engine: Engine, one: _Ingested) -> tuple[list[IngestReceipt], list[str]]:
    """Bring one source into the store. Receipts, and problems with its values; with any, it stays incomplete."""
    create_expert_group(one.group, one.infos, one.source.id)
    _check_copies(one.label, one.source.copies)
    if one.source.is_adapter:
        bases = {tensor.name: tensor.base for tensor in job.plan.tensors.values() if tensor.base is not None}
        check_adapter(one.label, one.source.folder, bases)
    blocks = plan_blocks(one.infos.values(), memory.block_elements(job.plan.memory, 1))
    tasks = [IngestTask(one.group.path, block, {p.tensor: one.held[p.tensor] for p in block.pieces}) for block in blocks]
    receipts = engine.run(f"ingest {one.label.removeprefix('expert ')}", ingest_block, tasks, [block.label for block in blocks])
    problems = _non_finite(one.label, receipts)
    if not problems:
        check_unchanged("base", job.base)
        check_unchanged(one.label, one.source)
        _finish(one.group, receipts, group_layout(one.infos))
    return receipts, problems


def ingest(job: Job, engine: Engine) -> StageResult:
    """Bring every expert's deltas into the store; those that are there already are not read again.

    Experts are finished one after the other, so that a failure keeps those before it.
    """
    sources = _sources(job)
    (job.deltas / job.base.id).mkdir(parents=True, exist_ok=True)
    receipts: list[IngestReceipt] = []
    problems: dict[str, None] = {}
    reused = 0
    with ExitStack() as locks:
        for path in sorted(one.group.path for one in sources):  # one order for all runs: two of them cannot wait for each other
            locks.enter_context(FileLock(path.with_name(f".{path.name}.lock")))
        for one in sources:
            if is_whole(one.group, one.infos):
                reused += 1
                continue
            found, wrong = _bring_in(job, engine, one)
            receipts += found
            problems |= dict.fromkeys(wrong)
            if wrong and one.label == "base":
                break
    if problems:
        raise CheckpointError.listing("weights that are not numbers cannot be merged; train or download them again", problems)
    if reused == len(sources):
        engine.reporter.start("ingest", 0)
    return StageResult(sum(r.bytes_read for r in receipts), sum(r.bytes_written for r in receipts), reused)
