"""How large deltas are, in compiled loops: see ``pipeline.kernels.sizes``; and what ingest measures as rows pass."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.kernels.compiled import compiled, regrouping, unowned
from pipeline.kernels.fused.floats import infinite, plus, widen
from pipeline.kernels.fused.philox import fill_words

TILE = 512
SIZE = np.uint32(0x7FFFFFFF)


@compiled
def _differences(expert: Any, base: Any, out: Any) -> None:
    for j in range(len(expert)):
        out[j] = widen(expert[j]) - widen(base[j])


@regrouping
def _squares(values: Any) -> float:
    total = 0.0
    for j in range(len(values)):
        total += np.float64(values[j]) * np.float64(values[j])
    return total


@regrouping
def _bits_squares(bits: Any) -> float:
    total = 0.0
    for j in range(len(bits)):
        total += np.float64(widen(bits[j])) * np.float64(widen(bits[j]))
    return total


@compiled
def _largest(delta: Any) -> Any:
    top = np.uint32(0)
    for j in range(len(delta)):
        size = np.float32(delta[j]).view(np.uint32) & SIZE
        top = max(top, size)
    return top


@compiled
def _count(delta: Any, counts: Any) -> None:
    for j in range(len(delta)):
        counts[(np.float32(delta[j]).view(np.uint32) & SIZE) >> np.uint32(16)] += 1


@compiled
def count_infinite(bits: NDArray[Any]) -> int:
    """Values of tagged bits (rows, width) that are infinities or NaNs."""
    total = 0
    for row in range(bits.shape[0]):
        for j in range(bits.shape[1]):
            total += infinite(bits[row, j])
    return total


@compiled
def measure(expert: Any, base: Any, counted: int, squares: Any, base_squares: Any, counts: Any) -> float:
    """The largest |delta|. Per row |delta|^2 and |base|^2 (rows,) float64; counts (BINS,) by the high 16 bits of |delta|.

    ``expert`` and ``base``: (rows, width) tagged bits, each of its own type, finite. Only the first ``counted`` rows are
    counted: beyond them the base has none.
    """
    expert, base, counts = unowned(expert), unowned(base), unowned(counts)
    owner = np.empty(TILE, np.float32)
    tile = unowned(owner)
    width, top = expert.shape[1], np.uint32(0)
    for row in range(expert.shape[0]):
        squares[row] = base_squares[row] = 0
        for left in range(0, width, TILE):
            right = min(left + TILE, width)
            delta = tile[: right - left]
            _differences(expert[row, left:right], base[row, left:right], delta)
            top = max(top, _largest(delta))
            squares[row] += _squares(delta)
            base_squares[row] += _bits_squares(base[row, left:right])
            if row < counted:
                _count(delta, counts)
    owner[0] = 0  # its last use: until here it lives
    return float(np.uint32(top).view(np.float32))


@compiled
def count_low(base: Any, stored: Any, at: int, expert: int, high: int, counts: Any) -> None:
    """Add to counts (LOW,) the low 16 bits of every |delta| of one expert whose high 16 bits are ``high``.

    ``base``: (rows, width) tagged bits; ``stored``: (experts, rows of a chunk, width) differences, those of the slice from
    row ``at`` on.
    """
    base, stored, counts = unowned(base), unowned(stored), unowned(counts)
    wanted = np.uint32(high)
    for row in range(base.shape[0]):
        for j in range(base.shape[1]):
            delta = np.float32(widen(plus(base[row, j], stored[expert, at + row, j])) - widen(base[row, j]))
            size = delta.view(np.uint32) & SIZE
            if size >> np.uint32(16) == wanted:
                counts[size & np.uint32(0xFFFF)] += 1


@compiled
def _kth_largest(sizes: Any, k: int, counts: Any) -> Any:
    """The k-th largest of positive float bits (n,) uint32, by counting 11, 10 and 10 bits."""
    prefix, known = np.uint32(0), np.uint32(0)
    for shift, width in ((20, 11), (10, 10), (0, 10)):
        bins = 1 << width
        counts[:bins] = 0
        for j in range(len(sizes)):
            if sizes[j] & known == prefix:
                counts[(sizes[j] >> np.uint32(shift)) & np.uint32(bins - 1)] += 1
        place = bins - 1
        while counts[place] < k:
            k -= counts[place]
            place -= 1
        prefix |= np.uint32(place) << np.uint32(shift)
        known |= np.uint32(bins - 1) << np.uint32(shift)
    return prefix


@compiled
def row_thresholds(base: Any, stored: Any, at: int, k: int, out: Any) -> None:
    """The k-th largest |delta| of every row and expert into ``out`` (rows, experts) float32; infinity when k is 0.

    ``base``: (rows, width) tagged bits; ``stored``: (experts, rows of a chunk, width) differences, those of the slice from
    row ``at`` on.
    """
    base, stored, out = unowned(base), unowned(stored), unowned(out)
    size_owner, count_owner = np.empty(base.shape[1], np.uint32), np.empty(2048, np.int64)
    sizes, counts = unowned(size_owner), unowned(count_owner)
    for row in range(base.shape[0]):
        for n in range(len(stored)):
            if k == 0:
                out[row, n] = np.inf
                continue
            for j in range(base.shape[1]):
                delta = np.float32(widen(plus(base[row, j], stored[n, at + row, j])) - widen(base[row, j]))
                sizes[j] = delta.view(np.uint32) & SIZE
            out[row, n] = np.uint32(_kth_largest(sizes, k, counts)).view(np.float32)
    size_owner[0] = count_owner[0] = 0  # their last use: until here they live


@compiled
def row_masses(base: Any, stored: Any, at: int, expert: int, key: Any, limit: int, first: int, out: Any) -> None:
    """Per row sum |delta| and sum |masked delta| into ``out`` (rows, 2) float64, for DARE's rescaling by L1 norms.

    ``stored``: (experts, rows of a chunk, width) differences, those of the slice from
    row ``at`` on; ``first``: index of the first element in its tensor.
    """
    base, stored, key, out = unowned(base), unowned(stored), unowned(key), unowned(out)
    owner = np.empty(TILE + 8, np.uint32)
    words = unowned(owner)
    width = base.shape[1]
    for row in range(base.shape[0]):
        whole = kept = 0.0
        for left in range(0, width, TILE):
            count = min(TILE, width - left)
            element = first + row * width + left
            before = element % 4
            fill_words(key, element - before, words[: (before + count + 3) // 4 * 4])
            for j in range(count):
                place = left + j
                size = abs(np.float64(widen(plus(base[row, place], stored[expert, at + row, place])) - widen(base[row, place])))
                whole += size
                kept += size if words[before + j] < np.uint32(limit) else 0.0
        out[row, 0], out[row, 1] = whole, kept
    owner[0] = 0  # its last use: until here it lives
