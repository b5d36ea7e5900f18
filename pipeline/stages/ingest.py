"""Ingest: stream every expert's difference to the base into the delta store, tensor by tensor, chunk by chunk."""

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
from pipeline.job import Job, check_unchanged
from pipeline.kernels.bits import cast
from pipeline.kernels.fused.floats import tagged
from pipeline.kernels.fused.sizes import count_infinite, measure
from pipeline.kernels.sizes import BINS
from pipeline.plan import Block, plan_blocks
from storage.arrays import ArrayGroup, ChunkDigests
from storage.checkpoint import TensorInfo, padded_rows
from storage.deltas import (
    create_expert_group,
    difference,
    digest_array,
    expert_group,
    magnitudes_array,
    row_digests,
    squares_array,
)
from storage.errors import CheckpointError
from storage.layout import DELTA_FORMAT, DTYPES


@dataclass(frozen=True)
class ChunkStatistics:
    """What is learnt of one chunk while it passes."""

    delta_squares: float
    """Sum of squares of the delta; 0 for types that are not numbers to merge."""
    base_squares: float
    largest: float
    """Largest |delta|."""
    unchanged: int
    """Entries whose bits equal the base's."""
    entries: int
    non_finite: int
    """NaNs and infinities in the expert."""
    base_non_finite: int


@dataclass(frozen=True)
class IngestTask:
    """Pieces of one expert."""

    group: Path
    block: Block
    sources: Mapping[str, tuple[TensorInfo, TensorInfo | None]]
    """Tensor -> the expert's rows and the base's."""


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


def measured(chunk: Chunk, stored: NDArray[Any]) -> tuple[ChunkStatistics, NDArray[np.float64], NDArray[np.uint32]]:
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
            largest = measure(expert, base, chunk.base_rows, squares, base_squares, counts)
    unchanged = stored.size - int(np.count_nonzero(stored))
    found = ChunkStatistics(
        float(squares.sum()), float(base_squares.sum()), largest, unchanged, chunk.expert.size, bad, base_bad
    )
    return found, squares, counts.astype(np.uint32)[None]


def ingest_block(task: IngestTask) -> IngestReceipt:
    """Write the differences of a block. The same block twice writes the same bytes."""
    group = ArrayGroup(task.group)
    chunks: ChunkDigests = {}
    statistics = []
    read = 0
    for piece in task.block.pieces:
        info, base = task.sources[piece.tensor]
        for start in range(piece.start, piece.stop, info.chunk_rows):
            stop = min(start + info.chunk_rows, piece.stop)
            rows, dtype = padded_rows(base, start, stop, info)
            chunk = Chunk(info.read(start, stop), info.dtype, rows, dtype, max(0, min(stop, base.rows if base else 0) - start))
            stored = difference(chunk.expert, cast(rows, dtype, info.dtype))
            found, squares, counts = measured(chunk, stored)
            statistics.append((piece.tensor, start, found))
            chunks.update(group.write(piece.tensor, start, stored))
            chunks.update(group.write(digest_array(piece.tensor), start, row_digests(chunk.expert, info.dtype)))
            if DTYPES[info.dtype].mergeable:
                chunks.update(group.write(squares_array(piece.tensor), start, squares))
                chunks.update(group.write(magnitudes_array(piece.tensor), start // info.chunk_rows, counts))
            read += 2 * chunk.expert.nbytes
    return IngestReceipt(chunks, statistics, read, sum(size for size, _ in chunks.values()))


def combined(parts: Sequence[ChunkStatistics]) -> dict[str, float | None]:
    """Statistics of a tensor from those of its chunks, in order; None where float32 cannot hold a difference."""
    entries = sum(part.entries for part in parts)
    found = {
        "delta_norm": math.sqrt(sum(part.delta_squares for part in parts)),
        "base_norm": math.sqrt(sum(part.base_squares for part in parts)),
        "largest": max(part.largest for part in parts),
        "unchanged_share": sum(part.unchanged for part in parts) / entries,
    }
    return {name: value if math.isfinite(value) else None for name, value in found.items()}


def _non_finite(name: str, receipts: Sequence[IngestReceipt]) -> list[str]:
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
        for label, count in ((f"expert {name}", bad), ("base", base_bad)):
            if count:
                problems.append(f"{label}: tensor {tensor}: {count} of {entries} values are NaN or infinite; expected none")
    return problems


def _finish(group: ArrayGroup, receipts: Sequence[IngestReceipt]) -> None:
    """Declare an expert ingested."""
    parts: dict[str, list[tuple[int, ChunkStatistics]]] = {}
    chunks: ChunkDigests = {}
    for receipt in receipts:
        chunks.update(receipt.chunks)
        for tensor, start, part in receipt.statistics:
            parts.setdefault(tensor, []).append((start, part))
    in_order = {t: [part for _, part in sorted(found, key=lambda item: item[0])] for t, found in parts.items()}
    group.finish(
        chunks, {"format": DELTA_FORMAT, "statistics": {tensor: combined(found) for tensor, found in in_order.items()}}
    )


def _is_whole(group: ArrayGroup) -> bool:
    return group.complete and group.record.get("format") == DELTA_FORMAT and not group.missing_chunks()


def _ingest_expert(job: Job, engine: Engine, name: str, group: ArrayGroup) -> tuple[list[IngestReceipt], list[str]]:
    """Bring one expert into the store. Receipts, and problems with its values; with any, it stays incomplete."""
    held = {t.name: (t.experts[name], t.base) for t in job.plan.tensors.values() if name in t.experts}
    infos = {tensor: info for tensor, (info, _) in held.items()}
    create_expert_group(group, infos, job.experts[name].id)
    blocks = plan_blocks(infos.values(), memory.block_elements(job.plan.memory, 1))
    tasks = [IngestTask(group.path, block, {p.tensor: held[p.tensor] for p in block.pieces}) for block in blocks]
    receipts = engine.run(f"ingest {name}", ingest_block, tasks, [block.label for block in blocks])
    problems = _non_finite(name, receipts)
    if not problems:
        check_unchanged("base", job.base)
        check_unchanged(f"expert {name}", job.experts[name])
        _finish(group, receipts)
    return receipts, problems


def ingest(job: Job, engine: Engine) -> StageResult:
    """Bring every expert's deltas into the store; those that are there already are not read again.

    Experts are finished one after the other, so that a failure keeps those before it.
    """
    names = {job.experts[name].id: name for name in job.experts}  # an expert may stand under two names
    (job.deltas / job.base.id).mkdir(parents=True, exist_ok=True)
    receipts: list[IngestReceipt] = []
    problems: dict[str, None] = {}
    reused = 0
    with ExitStack() as locks:
        for identity in sorted(names):  # one order for all runs, so that two of them cannot wait for each other
            locks.enter_context(FileLock(job.deltas / job.base.id / f".{identity}.lock"))
        for identity, name in names.items():
            group = expert_group(job.deltas, job.base.id, identity)
            if _is_whole(group):
                reused += 1
                continue
            found, wrong = _ingest_expert(job, engine, name, group)
            receipts += found
            problems |= dict.fromkeys(wrong)
    if problems:
        raise CheckpointError.listing("weights that are not numbers cannot be merged; train or download them again", problems)
    if reused == len(names):
        engine.reporter.start("ingest", 0)
    return StageResult(sum(r.bytes_read for r in receipts), sum(r.bytes_written for r in receipts), reused)
