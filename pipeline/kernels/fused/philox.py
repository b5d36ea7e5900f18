"""The generator of ``pipeline.kernels.masks`` inside compiled loops: the same words for the same counters."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.kernels.compiled import compiled, inlined
from pipeline.kernels.masks import MULTIPLIERS, ROUNDS, WEYL

M0, M1 = np.uint64(MULTIPLIERS[0]), np.uint64(MULTIPLIERS[1])
W0, W1 = np.uint64(WEYL[0]), np.uint64(WEYL[1])
HALF, WORD = np.uint64(32), np.uint64(0xFFFFFFFF)


@inlined
def _philox(counter: Any, k0: Any, k1: Any) -> Any:
    """Philox4x32-10 of one 64-bit counter, upper counter words zero: four words in the lower halves of uint64.

    Upper halves hold rubbish that no product sees: 64-bit lanes throughout need no repacking between rounds.
    """
    c0, c1 = counter & WORD, counter >> HALF
    c2, c3 = np.uint64(0), np.uint64(0)
    for _ in range(ROUNDS):
        p0, p1 = (c0 & WORD) * M0, (c2 & WORD) * M1
        c0, c1, c2, c3 = (p1 >> HALF) ^ c1 ^ k0, p1, (p0 >> HALF) ^ c3 ^ k1, p0
        k0, k1 = (k0 + W0) & WORD, (k1 + W1) & WORD
    return c0, c1, c2, c3


@compiled
def fill_words(key: NDArray[np.uint32], first: int, words: NDArray[np.uint32]) -> None:
    """words[j] = the random word of element ``first`` + j; ``first`` and the length are multiples of 4. ``key``: (2,)."""
    k0, k1 = np.uint64(key[0]), np.uint64(key[1])
    start = np.uint64(first // 4)
    for block in range(len(words) // 4):
        c0, c1, c2, c3 = _philox(start + np.uint64(block), k0, k1)
        words[4 * block] = np.uint32(c0)
        words[4 * block + 1] = np.uint32(c1)
        words[4 * block + 2] = np.uint32(c2)
        words[4 * block + 3] = np.uint32(c3)


def first_words(key: tuple[int, int], first: int, count: int) -> NDArray[np.int64]:
    """(count,) the first word for each of the counters from ``first`` on."""
    words = np.empty(4 * count, np.uint32)
    fill_words(np.array(key, np.uint32), 4 * first, words)
    return words[::4].astype(np.int64)
