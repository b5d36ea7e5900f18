"""Ingest: what a task does to stream an expert's difference to the base into the delta store, chunk by chunk."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.kernels.bits import as_numbers, cast
from pipeline.kernels.fused.floats import tagged
from pipeline.kernels.fused.sizes import count_infinite, measure
from pipeline.kernels.lowrank import added, delta_rows, embedding_delta_rows
from pipeline.kernels.sizes import BINS
from pipeline.plan import Block
from storage.arrays import ArrayGroup, ArraySpec, ChunkDigests
from storage.deltas import (
    delta_spec,
    difference,
    digest_array,
    digest_spec,
    magnitudes_array,
    magnitudes_spec,
    row_digests,
    squares_array,
    squares_spec,
)
from storage.layout import DTYPES
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

    group: ArrayGroup
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
                written: dict[str, tuple[ArraySpec, int, NDArray[Any]]] = {
                    piece.tensor: (delta_spec(info), start, differences if chunk.delta is None else chunk.delta),
                    digest_array(piece.tensor): (digest_spec(info), start, row_digests(chunk.expert, info.dtype)),
                }
                if DTYPES[info.dtype].mergeable:
                    written[squares_array(piece.tensor)] = squares_spec(info), start, squares
                    written[magnitudes_array(piece.tensor)] = magnitudes_spec(info), start // info.chunk_rows, counts
                chunks.update(task.group.write(written))
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
