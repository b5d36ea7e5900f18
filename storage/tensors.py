"""Tensors of a checkpoint as rows of output channels, wherever their bytes lie and however they are laid out."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from storage.errors import ChannelMergingError, CheckpointError
from storage.files import File
from storage.layout import DTYPES, as_rows, chunk_rows, is_transposed

_KEPT = threading.local()
"""In ``keeping_matrix``: the matrix this thread read last."""


class Rows(Protocol):
    """Where the rows of a tensor come from. Small, and it pickles."""

    def read(self, info: TensorInfo, start: int, stop: int) -> NDArray[Any]:
        """Rows [start, stop) as raw bits: (stop - start, width), unsigned integers of the tensor's entry size."""
        ...


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint."""

    name: str
    dtype: str
    """As in a safetensors header, for example BF16."""
    shape: tuple[int, ...]
    """As in the checkpoint."""
    data: Rows
    channel_axis: int = 0
    """The axis of its output channels; the last one where weights are stored (in, out). A vector is one row, or ``ENTRIES``."""

    @property
    def rows(self) -> int:
        return as_rows(self.shape, self.channel_axis)[0]

    @property
    def width(self) -> int:
        return as_rows(self.shape, self.channel_axis)[1]

    @property
    def chunk_rows(self) -> int:
        """Rows of a chunk of the delta store."""
        return chunk_rows(self.rows, self.width)

    @property
    def matrix_rows(self) -> int:
        """Rows that are read together, of a matrix stored (in, out); 0 where each can be read for itself."""
        in_out = isinstance(self.data, FileRows) and is_transposed(self.shape, self.channel_axis)
        return self.shape[-1] if in_out else 0

    @property
    def slab_bytes(self) -> int:
        """Bytes of a matrix that has to be read whole because its columns are wanted; 0 where rows are."""
        return math.prod(self.shape[-2:]) * DTYPES[self.dtype].size if self.matrix_rows else 0

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in its own type."""
        return self.rows * self.width * DTYPES[self.dtype].size

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Rows [start, stop) as raw bits: (stop - start, width), unsigned integers of the tensor's entry size."""
        return self.data.read(self, start, stop)


@dataclass(frozen=True)
class FileRows:
    """Rows that lie in a safetensors file."""

    file: File
    offset: int
    """First byte of the tensor in the file."""

    def read(self, info: TensorInfo, start: int, stop: int) -> NDArray[Any]:
        if not is_transposed(info.shape, info.channel_axis):
            return self._entries(info, start * info.width, (stop - start, info.width))
        inputs, outputs = info.shape[-2:]
        parts = []
        for matrix in range(start // outputs, -(-stop // outputs)):  # packed experts are several matrices
            low, high = max(start - matrix * outputs, 0), min(stop - matrix * outputs, outputs)
            parts.append(self._matrix(info, matrix * inputs * outputs, (inputs, outputs))[:, low:high].T)
        return np.ascontiguousarray(np.concatenate(parts) if len(parts) > 1 else parts[0])

    def _matrix(self, info: TensorInfo, first: int, shape: tuple[int, int]) -> NDArray[Any]:
        """A whole matrix stored (in, out), of which columns are wanted."""
        if not getattr(_KEPT, "on", False):
            return self._entries(info, first, shape)
        key = (self, info.name, first)
        if _KEPT.key != key:
            _KEPT.key = _KEPT.matrix = None  # the old one goes before the new one comes
            _KEPT.matrix = self._entries(info, first, shape)
            _KEPT.key = key
        found: NDArray[Any] = _KEPT.matrix
        return found

    def _entries(self, info: TensorInfo, first: int, shape: tuple[int, int]) -> NDArray[Any]:
        """Entries from ``first`` on, as they lie in the file."""
        dtype = DTYPES[info.dtype]
        bits = np.empty(shape, dtype.bits)
        view = bits.reshape(-1).view(np.uint8).data
        try:
            got = self.file.read_into(view, self.offset + first * dtype.size)
        except ChannelMergingError as error:
            raise type(error)(f"tensor {info.name}: {error}") from error
        if got < len(view):
            begin = self.offset + first * dtype.size
            raise CheckpointError(
                f"{self.file.place}: tensor {info.name}: expected {len(view)} bytes from byte {begin} on, got {got}: the file "
                "ends there; it changed since it was planned. Run again."
            )
        return bits


@contextmanager
def keeping_matrix() -> Iterator[None]:
    """In this thread, keep the last matrix stored (in, out) that was read: its columns are wanted a chunk at a time.

    Not beyond: its file may be another one by then, and its memory is needed for other things.
    """
    _KEPT.on, _KEPT.key, _KEPT.matrix = True, None, None
    try:
        yield
    finally:
        _KEPT.on, _KEPT.key, _KEPT.matrix = False, None, None


@dataclass(frozen=True)
class BaseRows:
    """The base's own rows: what an adapter leaves alone. Read from the base by those who have it."""

    def read(self, info: TensorInfo, start: int, stop: int) -> NDArray[Any]:
        raise AssertionError(f"{info.name}: an adapter's unchanged tensor is read from the base")


@dataclass(frozen=True)
class LowRank:
    """A base's rows plus ``scale * (B A)``: a LoRA adapter's (arXiv 2106.09685, section 4.1).

    ``a`` (rank, width) and ``b`` (rows, rank), both as tensors of the adapter.
    """

    a: TensorInfo
    b: TensorInfo
    scale: float
    transposed: bool = False
    """An embedding's factors: the delta is ``scale * (B A)`` transposed, with A (rank, rows) and B (width, rank)."""

    def read(self, info: TensorInfo, start: int, stop: int) -> NDArray[Any]:
        raise AssertionError(f"{info.name}: an adapter's delta is added to the base by those who have it")


def is_low_rank(info: TensorInfo) -> bool:
    """Whether its delta, not its rows, is what is stored: as float32."""
    return isinstance(info.data, LowRank)


def padded_rows(info: TensorInfo | None, start: int, stop: int, like: TensorInfo) -> tuple[NDArray[Any], str]:
    """Rows [start, stop) as raw bits, 0 where the tensor has no such row, and their data type.

    A tensor that does not exist at all is rows of 0 in the shape and type of ``like``.
    """
    dtype = (info or like).dtype
    if info is not None and stop <= info.rows:
        return info.read(start, stop), dtype
    out = np.zeros((stop - start, like.width), DTYPES[dtype].bits)
    if info is not None and start < info.rows:
        rows = info.read(start, min(stop, info.rows))
        out[: len(rows)] = rows
    return out, dtype
