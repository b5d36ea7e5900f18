"""Names and shapes on disk. Pure: no file is touched here.

A tensor of any rank is seen as rows x width, one row per output channel; a vector is one row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

ARTIFACT_FORMAT = 2
DELTA_FORMAT = 3

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


def as_rows(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and width of a tensor: ``[O, …]`` is O rows, a vector or a scalar is one row."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


def chunk_rows(rows: int, width: int) -> int:
    """Rows of one chunk: whole rows, about ``CHUNK_ELEMENTS`` entries, the same for every expert and data type."""
    return max(1, min(rows, CHUNK_ELEMENTS // width))
