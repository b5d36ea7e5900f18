"""TIES (Yadav et al., arXiv 2306.01708): trim each delta to its largest entries, elect a sign, merge those that agree.

Trimming keeps |d| >= t, t the k-th largest with k = round(density * n), so equal values all stay. The sign with the larger
sum of weighted entries is elected; where both weigh the same it is +, as in mergekit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.kernels.forms import ELECT, TRIM, Pruning
from pipeline.kernels.methods.interface import Method

if TYPE_CHECKING:  # the fused path does without, and importing it takes a second
    import torch


def trimmed(delta: torch.Tensor, expert: int, pruning: Pruning) -> torch.Tensor:
    """The delta (rows, width) float32 without the entries below its threshold, one per row or one for all."""
    import torch

    thresholds = torch.from_numpy(pruning.thresholds[:, expert : expert + 1].copy()).to(delta.device)
    return torch.where(delta.abs() >= thresholds, delta, torch.zeros_like(delta))


def elected(deltas: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], mean: bool) -> torch.Tensor:
    """Per entry sum(w d) over the members with the elected sign, with ``mean`` divided by their sum(w)."""
    import torch

    zero = torch.zeros_like(deltas[0])
    up, down, weight_up, weight_down = zero.clone(), zero.clone(), zero.clone(), zero.clone()
    for delta, weight in zip(deltas, weights, strict=True):
        value, full = weight * delta, weight.expand_as(delta)
        up += torch.where(value > 0, value, zero)
        down += torch.where(value < 0, value, zero)
        weight_up += torch.where(value > 0, full, zero)
        weight_down += torch.where(value < 0, full, zero)
    positive = up >= -down
    mass = torch.where(positive, up, down)
    if not mean:
        return mass
    agreeing = torch.where(positive, weight_up, weight_down)
    return mass / torch.where(agreeing > 0, agreeing, torch.ones_like(agreeing))


METHOD = Method(prune=trimmed, combine=elected, form=(TRIM, ELECT))
