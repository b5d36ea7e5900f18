"""What every merge method is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipeline.kernels.forms import Pruning

if TYPE_CHECKING:  # the fused path does without, and importing it takes a second
    import torch


Prune = Callable[["torch.Tensor", int, Pruning], "torch.Tensor"]
"""(delta (rows, width) float32, position of its expert, pruning) -> the pruned delta."""

Combine = Callable[[Sequence["torch.Tensor"], Sequence["torch.Tensor"], bool], "torch.Tensor"]
"""(pruned deltas of the members in order of name, weights broadcastable to them, mean) -> one delta. Runs in float32."""


@dataclass(frozen=True)
class Method:
    """A merge method: the torch functions, and what stands for them in compiled code."""

    prune: Prune
    combine: Combine
    form: tuple[int, int]
    """How it prunes and combines, in the numbers of ``pipeline.kernels.forms``."""
    pair_weights: Callable[[NDArray[np.float64], float], NDArray[np.float64]] | None = None
    """From Gram matrices (rows, 2, 2) of pairs and t, weights (rows, 2) that take the place of the recipe's."""


def whole(delta: torch.Tensor, expert: int, pruning: Pruning) -> torch.Tensor:
    """Nothing is pruned."""
    return delta


def added(deltas: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], mean: bool) -> torch.Tensor:
    """sum(w d), in order; dividing by sum(w) is part of the factor that follows."""
    import torch

    total = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        total += weight * delta
    return total
