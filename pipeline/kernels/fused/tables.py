"""What clustering needs to know of the experts' delta rows, in one pass over them: Gram matrices, distances, sums."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.kernels.compiled import compiled, over_rows, regrouping, unowned
from pipeline.kernels.fused.floats import plus, widen

TILE = 512
GRAM, L1, SIGN, SUMS = 0, 1, 2, 3
KINDS = {"gram": GRAM, "l1": L1, "sign": SIGN, "sums": SUMS}


@compiled
def _delta(base: Any, stored: Any, out: Any) -> None:
    for j in range(len(base)):
        out[j] = widen(plus(base[j], stored[j])) - widen(base[j])


@compiled
def _signs(delta: Any) -> None:
    for j in range(len(delta)):
        delta[j] = np.float32(delta[j] > 0) - np.float32(delta[j] < 0)


# float64 sums, so that the compiler may choose their order: it is one per machine, and far below the tolerance of ties


@regrouping
def _dot(left: Any, right: Any) -> float:
    total = 0.0
    for j in range(len(left)):
        total += np.float64(left[j]) * np.float64(right[j])
    return total


@regrouping
def _distance(left: Any, right: Any) -> float:
    total = 0.0
    for j in range(len(left)):
        total += abs(np.float64(left[j]) - np.float64(right[j]))
    return total


@regrouping
def _sum(delta: Any) -> float:
    total = 0.0
    for j in range(len(delta)):
        total += np.float64(delta[j])
    return total


@compiled
def _table_range(base: Any, stored: Any, at: int, kind: int, out: Any, start: int, stop: int) -> None:
    base, stored, out = unowned(base), unowned(stored), unowned(out)
    experts, width = len(stored), base.shape[1]
    owner = np.empty((experts, TILE), np.float32)
    tiles = unowned(owner)
    for row in range(start, stop):
        for left in range(0, width, TILE):
            count = min(TILE, width - left)
            for n in range(experts):
                _delta(base[row, left : left + count], stored[n, at + row, left : left + count], tiles[n, :count])
                if kind == SIGN:
                    _signs(tiles[n, :count])
            for n in range(experts):
                if kind == SUMS:
                    out[row, n, 0] += _sum(tiles[n, :count])
                    continue
                for m in range(n, experts):
                    if kind == L1:
                        out[row, n, m] += _distance(tiles[n, :count], tiles[m, :count])
                    else:
                        out[row, n, m] += _dot(tiles[n, :count], tiles[m, :count])
        if kind != SUMS:
            for n in range(experts):
                for m in range(n):
                    out[row, n, m] = out[row, m, n]
    owner[0, 0] = 0  # its last use: until here it lives


def table(base: NDArray[Any], stored: NDArray[Any], at: int, kind: str, threads: int = 1) -> NDArray[np.float64]:
    """A table of a slice's rows: (rows, experts, experts) float64, or (rows, experts, 1) for ``sums``.

    ``base``: (rows, width) tagged bits (see ``floats``); ``stored``: (experts, rows of a chunk, width)
    differences, the slice's from row ``at`` on. ``gram``:
    <d_n, d_m>; ``l1``: sum |d_n - d_m|; ``sign``: <sgn d_n, sgn d_m>; ``sums``: sum d_n. Symmetric to the bit.
    """
    experts = len(stored)
    out = np.zeros((len(base), experts, 1 if kind == "sums" else experts))
    over_rows(lambda start, stop: _table_range(base, stored, at, KINDS[kind], out, start, stop), len(base), threads)
    return out
