"""Names and shapes on disk. Pure: no file is touched here.

A tensor of any rank is seen as rows x width, one row per output channel; a vector is one row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

ARTIFACT_FORMAT = 4
DELTA_FORMAT = 5
ROUTER_FORMAT = 2

CHUNK_ELEMENTS = 8 * 1024 * 1024
"""Entries of one chunk of the delta store: 16 MiB in bf16 and fp16, 32 MiB in fp32. Part of the format."""

SHARD_BYTES = 5_000_000_000
"""Largest file of a row pool or of an exported checkpoint, as transformers writes them."""

MANIFEST = "manifest.json"
LATEST = "latest.json"
POOL_INDEX = "pool.safetensors.index.json"
ROWS_FILE = "rows.safetensors"
RESIDUE_FILE = "residue.safetensors"
CARD = "README.md"
REPORT = "report.html"
DOCUMENTS = (CARD, REPORT)
"""What is made from the manifest, for people."""


@dataclass(frozen=True)
class DType:
    """A safetensors data type."""

    name: str
    """As in a safetensors header: BF16, F32, …"""
    size: int
    """Bytes of one entry."""
    mergeable: bool
    """Whether rows of it can be merged; others can only be kept."""

    @property
    def bits(self) -> np.dtype[Any]:
        """The unsigned integers that hold the raw bits."""
        return np.dtype(f"<u{self.size}")

    @property
    def difference(self) -> np.dtype[Any]:
        """The signed integers that hold a wrapping difference of two bit patterns."""
        return np.dtype(f"<i{self.size}")


DTYPES = {
    dtype.name: dtype
    for dtype in (
        DType("BF16", 2, True),
        DType("F16", 2, True),
        DType("F32", 4, True),
        DType("I8", 1, False),
        DType("U8", 1, False),
        DType("BOOL", 1, False),
        DType("I16", 2, False),
        DType("I32", 4, False),
        DType("I64", 8, False),
    )
}
"""The types that are read. 8-bit floats and F64 are not among them: the plan refuses such tensors by name."""


ENTRIES = -1
"""The channel axis of a vector whose entries are channels, as those of a head's bias: rows of one entry."""


def is_transposed(shape: tuple[int, ...], channel_axis: int) -> bool:
    """Whether the output channels are the columns of the stored matrices: ``[I, O]`` or ``[E, I, O]``."""
    return len(shape) > 1 and channel_axis == len(shape) - 1


def as_rows(shape: tuple[int, ...], channel_axis: int = 0) -> tuple[int, int]:
    """Rows and width of a tensor: all axes up to the channels' are rows, the others are width.

    ``[O, I]`` is O rows; packed experts ``[E, O, I]`` with channel axis 1 are E * O; ``[I, O]`` and ``[E, I, O]`` with the
    last as channel axis are read transposed. A vector or a scalar is one row; a vector with channel axis -1 is as many rows as
    it has entries.
    """
    if len(shape) < 2:
        return (shape[0], 1) if shape and channel_axis == ENTRIES else (1, math.prod(shape))
    if is_transposed(shape, channel_axis):
        return math.prod(shape[:-2]) * shape[-1], shape[-2]
    return math.prod(shape[: channel_axis + 1]), math.prod(shape[channel_axis + 1 :])


def chunk_rows(rows: int, width: int) -> int:
    """Rows of one chunk: whole rows, about ``CHUNK_ELEMENTS`` entries, the same for every expert and data type."""
    return max(1, min(rows, CHUNK_ELEMENTS // max(width, 1)))
