"""Merging inside a group: prune each member's delta once, combine, add to the base (arXiv 2412.15283, Eq. 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeline.kernels.masks import keep_mask


def dare(delta: torch.Tensor, key: tuple[int, int], first: int, density: float) -> torch.Tensor:
    """DARE (Yu et al., arXiv 2311.03099): drop entries at random, rescale the kept ones by 1 / density.

    ``delta``: (rows, width) float32 whose first element has index ``first`` in its tensor.
    """
    if density >= 1:
        return delta
    rows, width = delta.shape
    mask = keep_mask(key, first, (rows, width), density, str(delta.device))
    scale = torch.tensor(1 / density, dtype=torch.float32, device=delta.device)
    return torch.where(mask, delta * scale, torch.zeros_like(delta))


def combine(deltas: Sequence[torch.Tensor], weights: Sequence[float], scaling: float | None) -> torch.Tensor:
    """sum(w d) / sum(w) when ``scaling`` is None, else scaling * sum(w d).

    ``deltas``: members of the group, in order of name, each (rows, width) float32. Sums run in that order in float32,
    the factor is applied once at the end, so the result does not depend on how rows were cut.
    """
    total = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        total += delta if weight == 1 else delta * torch.tensor(weight, dtype=torch.float32, device=delta.device)
    factor = 1 / sum(weights) if scaling is None else scaling
    return total if factor == 1 else total * torch.tensor(factor, dtype=torch.float32, device=total.device)
