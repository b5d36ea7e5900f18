"""DARE (Yu et al., arXiv 2311.03099): drop delta entries at random, rescale those that stay, then task arithmetic.

Kept entries are multiplied by 1 / density, or, with ``rescale: l1``, by the factor that restores the tensor's L1 norm.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.kernels.forms import MASK, SUM, Pruning
from pipeline.kernels.masks import keep_mask
from pipeline.kernels.methods.interface import Method, added

if TYPE_CHECKING:  # the fused path does without, and importing it takes a second
    import torch


def masked(delta: torch.Tensor, expert: int, pruning: Pruning) -> torch.Tensor:
    """The delta (rows, width) float32 with entries dropped and the others rescaled."""
    import torch

    rows, width = delta.shape
    low, high = (int(word) for word in pruning.keys[expert])
    mask = keep_mask((low, high), pruning.first, (rows, width), pruning.limit, str(delta.device))
    scale = torch.tensor(pruning.scales[expert], dtype=torch.float32, device=delta.device)
    return torch.where(mask, delta * scale, torch.zeros_like(delta))


METHOD = Method(prune=masked, combine=added, form=(MASK, SUM))
