"""Rows of a tensor as the kernels want them: the base's bits and every expert's stored differences, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.kernels.bits import cast, to_float
from pipeline.kernels.lowrank import added
from pipeline.plan import Piece, TensorPlan
from storage.arrays import ArrayGroup, each
from storage.deltas import delta_spec, restored
from storage.errors import ClusterError
from storage.layout import DTYPES
from storage.tensors import is_low_rank, padded_rows

if TYPE_CHECKING:  # the fused path does without, and importing it takes a second
    import torch


FUSED = "fused"


@dataclass(frozen=True)
class Slice:
    """Consecutive rows of one tensor."""

    tensor: TensorPlan
    first: int
    """Channel of the first row."""
    base: NDArray[Any]
    """(rows, width) raw bits; 0 where the base has no such row."""
    stored: Sequence[NDArray[Any] | None]
    """Per expert (rows, width) differences, 0 where it has no such row, or None when it has none of these.

    Differences of bits as integers; of a LoRA adapter its delta as float32.
    """
    stack: NDArray[Any] | None
    """(experts, rows of the chunk, width): all of the chunk in one array, when all types are the base's."""
    at: int
    """Where these rows begin in the stack."""

    def __len__(self) -> int:
        return len(self.base)

    def cut(self, start: int, stop: int) -> Slice:
        """Rows [start, stop) of these, counted from the first."""
        rows = slice(start, stop)
        parts = [None if part is None else part[rows] for part in self.stored]
        return Slice(self.tensor, self.first + start, self.base[rows], parts, self.stack, self.at + start)

    def dtype(self, expert: str) -> str:
        """The expert's own data type."""
        info = self.tensor.experts.get(expert)
        return info.dtype if info else self.tensor.dtype

    def own(self, experts: Sequence[str]) -> list[NDArray[Any] | None]:
        """Per expert (rows, width) raw bits in its own data type."""
        return [None if part is None else self._restored(name, part) for name, part in zip(experts, self.stored, strict=True)]

    def _restored(self, expert: str, part: NDArray[Any]) -> NDArray[Any]:
        base = cast(self.base, self.tensor.dtype, self.dtype(expert))
        return added(base, self.dtype(expert), part) if part.dtype.kind == "f" else restored(base, part)

    def deltas(
        self, experts: Sequence[str], device: str, stored: Sequence[NDArray[Any] | None] | None = None
    ) -> list[torch.Tensor]:
        """Per expert its delta (rows, width) float32; ``stored`` of these when they are not all. All have these rows."""
        reference = to_float(self.base, self.tensor.dtype, device)
        found = []
        for name, part in zip(experts, stored or self.stored, strict=True):
            if part is not None and part.dtype.kind == "f":
                found.append(_on(part, device))
            elif part is not None:
                found.append(to_float(self._restored(name, part), self.dtype(name), device) - reference)
        return found

    def float_deltas(self, device: str) -> dict[int, torch.Tensor]:
        """The deltas stored as such, by the expert's position: rounded to a model's type most of one would be lost."""
        return {n: _on(part, device) for n, part in enumerate(self.stored) if part is not None and part.dtype.kind == "f"}


def _on(values: NDArray[Any], device: str) -> torch.Tensor:
    import torch

    return torch.from_numpy(np.ascontiguousarray(values)).to(device)


def in_one_type(tensor: TensorPlan) -> bool:
    """Whether base and experts have one data type, of numbers, and differ in bits: what the fused path reads."""
    if any(is_low_rank(info) for info in tensor.experts.values()):
        return False
    return DTYPES[tensor.dtype].mergeable and {info.dtype for info in tensor.experts.values()} == {tensor.dtype}


def read_rows(tensor: TensorPlan, experts: Sequence[str], groups: Sequence[ArrayGroup], start: int, stop: int) -> Slice:
    """Rows [start, stop), read once."""
    base, _ = padded_rows(tensor.base, start, stop, tensor.reference)
    shape = (stop - start, tensor.width)
    stack = np.empty((len(experts), *shape), DTYPES[tensor.dtype].difference) if in_one_type(tensor) else None

    def one(n: int) -> NDArray[Any] | None:
        info = tensor.experts.get(experts[n])
        held = min(stop, info.rows) - start if info else 0
        if info is None or held <= 0:
            return None
        kind = np.dtype(np.float32) if is_low_rank(info) else DTYPES[info.dtype].difference
        part = np.empty(shape, kind) if stack is None else stack[n]
        groups[n].read(tensor.name, delta_spec(info), start, start + held, part[:held])
        part[held:] = 0
        return part

    stored = each(one, list(range(len(experts))), at_once=not all(group.store.is_local for group in groups))
    return Slice(tensor, start, base, stored, stack, 0)


def chunks(
    piece: Piece, step: int, tensor: TensorPlan, experts: Sequence[str], groups: Sequence[ArrayGroup]
) -> Iterator[Slice]:
    """The piece, ``step`` rows at a time: a chunk of the delta store is what a task holds."""
    for start in range(piece.start, piece.stop, step):
        # the disk reads all experts' rows at once, and what comes next while these are at work
        first = start if start == piece.start else start + step
        for name, group in zip(experts, groups, strict=True):
            if name in tensor.experts:
                group.ahead(tensor.name, delta_spec(tensor.experts[name]), first, min(start + 2 * step, piece.stop))
        yield read_rows(tensor, experts, groups, start, min(start + step, piece.stop))


def bytes_of(part: Slice) -> int:
    """Bytes that were read for these rows."""
    return part.base.nbytes + sum(stored.nbytes for stored in part.stored if stored is not None)


def device_of(kernel: str) -> str:
    """The torch device of a kernel path. ClusterError when this process has no GPU that it asks for."""
    if kernel == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ClusterError("cluster.kernel is cuda, but torch finds no GPU here. Use a worker with one, or kernel: fused.")
        return "cuda"
    return "cpu"
