"""What a task needs at its peak, as pure sums, and the sizes that keep it under the recipe's budget.

Counted are the arrays of a task, not the interpreter and its libraries (about half a gigabyte with torch).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Protocol

SLICE_ELEMENTS = 1 << 20
"""Entries of one expert that a kernel sees at once, at most: beyond that speed gains nothing."""
DECODE_COPIES = 4
"""Copies of a chunk that exist while Zarr codes it: encoded, decoded, in the result, and what the allocator keeps."""


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES, MAPPED_BYTES = 64 << 20, 32 << 20
"""What glibc may keep of freed memory, and the size from which an array is mapped for itself and unmapped when freed."""


def return_freed_memory() -> None:
    """Make glibc give most of what is freed back to the system.

    Left alone it keeps up to twice the largest array freed so far. Set to keep nothing, it maps every array anew, and most
    of a run's time goes into the system's clearing of pages. Other C libraries have no such call and need none.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


class _Tensor(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def width(self) -> int: ...
    @property
    def chunk_rows(self) -> int: ...
    @property
    def slab_bytes(self) -> int: ...


def element_bytes(experts: int) -> int:
    """Bytes per entry of a slice in a merge.

    Per expert its bits in both types, delta, pruned delta and a group's gathered copy; base, its numbers, sum and result;
    and the 64-bit words of the mask generator.
    """
    return experts * (4 + 4 + 4 + 4 + 4) + 4 * 4 + 64


def chunk_bytes(elements: int, experts: int) -> int:
    """Bytes held while a chunk is worked on: every expert's and the base's rows, and one chunk being decoded."""
    return elements * 4 * (experts + 1 + DECODE_COPIES)


def slice_elements(budget: int, elements: int, experts: int) -> int:
    """Entries of one expert that fit beside a held chunk of this many entries; 0 or less when nothing does."""
    return min(SLICE_ELEMENTS, (budget - chunk_bytes(elements, experts)) // element_bytes(experts))


def slice_rows(budget: int, chunk_rows: int, width: int, experts: int) -> int:
    """Rows a kernel sees at once."""
    return max(1, slice_elements(budget, chunk_rows * width, experts) // width)


def block_elements(budget: int, experts: int) -> int:
    """Entries of a tensor in one block. A task holds one chunk at a time, so this bounds its length, not its memory."""
    return max(1, budget // (16 * (experts + 1)))


def needed(tensor: _Tensor, experts: int) -> int:
    """Bytes a task needs at least: one chunk and one row at work in a merge, one chunk and a matrix to transpose in ingest."""
    elements = tensor.chunk_rows * tensor.width
    merging = chunk_bytes(elements, experts) + tensor.width * element_bytes(experts)
    return max(merging, chunk_bytes(elements, 1) + tensor.slab_bytes)


def peak(budget: int, tensor: _Tensor, experts: int) -> int:
    """Bytes a task holds at most when it works on this tensor under a budget that is large enough."""
    elements = tensor.chunk_rows * tensor.width
    work = slice_rows(budget, tensor.chunk_rows, tensor.width, experts) * tensor.width
    return max(chunk_bytes(elements, experts) + min(work, elements) * element_bytes(experts), needed(tensor, experts))


def problems(budget: int, experts: int, tensors: Iterable[_Tensor]) -> list[str]:
    """The tensors that do not fit the budget, worst first, and the remedy."""
    worst = sorted(((needed(tensor, experts), tensor.name) for tensor in tensors), reverse=True)
    return [
        f"tensor {name}: a task needs {need / 2**20:.0f} MiB, cluster.memory allows {budget / 2**20:.0f} MiB; "
        f"set cluster.memory to at least {need // 2**20 + 1}MiB"
        for need, name in worst[:1]
        if need > budget
    ]
