"""How large deltas are, by torch operators: counts inside a range, thresholds of a row, sums for rescaling by L1 norms.

The bits of |delta| in float32 sort like the numbers: counts by the high 16 bits find the range that holds the k-th largest,
counts by the low 16 bits inside it the number itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # the fused path does without, and importing it takes a second
    import torch


BINS = 1 << 15
"""Values of the high 16 bits of |delta|: its sign bit is clear."""
LOW = 1 << 16


def low_counts(delta: torch.Tensor, high: int) -> NDArray[np.int64]:
    """(LOW,) int64: the low 16 bits of every |delta| whose high 16 bits are ``high``. ``delta``: float32 of any shape."""
    import torch

    sizes = delta.abs().contiguous().view(torch.int32)
    inside = sizes[sizes >> 16 == high] & 0xFFFF
    found: NDArray[np.int64] = torch.bincount(inside, minlength=LOW).cpu().numpy()
    return found


def row_thresholds(delta: torch.Tensor, k: int) -> NDArray[np.float32]:
    """(rows,) float32: the k-th largest |delta| of every row (rows, width); infinity when k is 0."""
    import torch

    if k == 0:
        return np.full(len(delta), np.inf, np.float32)
    width = delta.shape[1]
    found: NDArray[np.float32] = torch.kthvalue(delta.abs(), width - k + 1, dim=1).values.cpu().numpy()
    return found


def row_masses(delta: torch.Tensor, mask: torch.Tensor) -> NDArray[np.float64]:
    """(rows, 2) float64: sum |delta| and sum |masked delta| of every row."""
    import torch

    size = delta.abs().to(torch.float64)
    found: NDArray[np.float64] = torch.stack([size.sum(dim=1), (size * mask).sum(dim=1)], dim=1).cpu().numpy()
    return found


def bin_of(counts: NDArray[np.integer], k: int) -> tuple[int, int]:
    """The highest bin that holds the k-th largest (k >= 1), and how many are left to find inside it. ``counts``: (bins,)."""
    above = np.cumsum(counts[::-1])[::-1]  # entries in this bin and those over it
    place = int(np.flatnonzero(above >= k)[-1])
    return place, k - int(above[place] - counts[place])


def threshold(high: int, low: int) -> np.float32:
    """The number whose bits are these."""
    found: np.float32 = np.uint32(high << 16 | low).view(np.float32)
    return found
