"""Random numbers that depend on what they are for, not on when they are drawn: Philox4x32-10 over element indices.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). Counter = index // 4, word = index % 4, key = 64
bits of sha256 over (seed, expert, tensor). Integer arithmetic only, so CPU and GPU agree to the bit.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the fused path does without, and importing it takes a second
    import torch


ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF


def mask_key(seed: int, expert: str, tensor: str) -> tuple[int, int]:
    """The two 32-bit key words of one expert's tensor."""
    raw = hashlib.sha256(f"{seed}\x00{expert}\x00{tensor}".encode()).digest()
    return int.from_bytes(raw[:4], "little"), int.from_bytes(raw[4:8], "little")


def _wide_product(words: torch.Tensor, multiplier: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of a 32 x 32 bit product; int64 multiplication wraps, which keeps all 64 bits right."""
    product = words * multiplier
    return (product >> 32) & WORD, product & WORD


def philox(counters: torch.Tensor, key: tuple[int, int]) -> torch.Tensor:
    """(n, 4) int64 holding 32-bit words: the outputs for 64-bit counters (n,) int64, upper counter words zero."""
    import torch

    c0, c1 = counters & WORD, (counters >> 32) & WORD
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _wide_product(c0, MULTIPLIERS[0])
        high1, low1 = _wide_product(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return torch.stack([c0, c1, c2, c3], dim=1)


def limit_of(density: float) -> int:
    """Entries whose 32-bit word is below are kept: floor(density * 2^32)."""
    return int(density * 2**32)


def keep_mask(key: tuple[int, int], first: int, shape: tuple[int, int], limit: int, device: str = "cpu") -> torch.Tensor:
    """(rows, width) bool: keep where u32 < limit.

    ``first`` is the index of the first element, row * width + column in store layout.
    """
    import torch

    count = shape[0] * shape[1]
    block = torch.arange(first // 4, -(-(first + count) // 4), dtype=torch.int64, device=device)
    words = philox(block, key).reshape(-1)[first % 4 : first % 4 + count]
    return (words < limit).reshape(shape)
