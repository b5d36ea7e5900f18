"""The merge methods and a whole run, slowly, from their formulas alone; nothing of the project is imported.

A delta is the float32 difference of two stored numbers, by definition; all that follows is float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from tests.support.reference import Floats, Options, as_float64, bits_of, dare_mask, group_channels

NEAR = 1e-6
"""Masses of + and - that differ by less than this share may be elected otherwise in float32."""

Bools = NDArray[np.bool_]
Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class MergedTensor:
    labels: NDArray[np.int64]
    """(rows, experts) growth strings of the clustering."""
    margins: Floats
    """(rows,) how much the second best grouping is worse."""
    rebuilt: dict[str, Floats]
    """Expert -> (rows, width) float64, before rounding; for byom without what the expert keeps for itself."""
    exact: dict[str, Bools]
    """Expert -> (rows,) whether its row must be its own bit for bit."""
    doubtful: dict[str, Bools]
    """Expert -> (rows, width) whether the election of a sign is too near to call."""


@dataclass(frozen=True)
class MergedModel:
    tensors: dict[str, MergedTensor]
    kept: dict[str, float]
    """Expert -> share of its entries that TIES keeps over tensors or the model."""


def difference(expert: torch.Tensor, base: torch.Tensor) -> Floats:
    """The float32 difference of two tensors' numbers, as float64."""
    return (as_float64(expert).astype(np.float32) - as_float64(base).astype(np.float32)).astype(np.float64)


def threshold(values: Floats, density: float) -> float:
    """The k-th largest size, k = round(density * n)."""
    k = round(density * values.size)
    return float(np.sort(np.abs(values).reshape(-1))[::-1][k - 1]) if k else math.inf


def trimmed(deltas: Mapping[str, Floats], options: Options) -> dict[str, Floats]:
    """One expert's deltas by tensor, without the entries below the threshold of their row, tensor or model."""
    if options.trim_scope == "row":
        return {
            tensor: np.stack([np.where(np.abs(row) >= threshold(row, options.density), row, 0.0) for row in delta])
            for tensor, delta in deltas.items()
        }
    everything = np.concatenate([delta.reshape(-1) for delta in deltas.values()])
    limits = {
        tensor: threshold(everything if options.trim_scope == "model" else delta, options.density)
        for tensor, delta in deltas.items()
    }
    return {tensor: np.where(np.abs(delta) >= limits[tensor], delta, 0.0) for tensor, delta in deltas.items()}


def kept_share(deltas: Mapping[str, Floats], options: Options) -> float:
    """The share of one expert's entries that reach the threshold, entries of size 0 included where that is 0."""
    sizes = {tensor: np.abs(delta) for tensor, delta in deltas.items()}
    everything = np.concatenate([size.reshape(-1) for size in sizes.values()])
    if options.trim_scope == "model":
        return int((everything >= threshold(everything, options.density)).sum()) / everything.size
    return sum(int((size >= threshold(size, options.density)).sum()) for size in sizes.values()) / everything.size


def dropped(name: str, tensor: str, delta: Floats, options: Options) -> Floats:
    """DARE: masked and rescaled."""
    mask = dare_mask(options.seed, name, tensor, (delta.shape[0], delta.shape[1]), options.density)
    left = float(np.abs(delta[mask]).sum())
    scale = 1 / options.density
    if options.rescale == "l1":
        scale = float(np.abs(delta).sum()) / left if left else 1.0
    return np.where(mask, delta * scale, 0.0)


def largest(row: Floats, keep: float) -> list[int]:
    """Columns of the k = round(keep * n) entries of largest size, the first column first among equals."""
    order = sorted(range(len(row)), key=lambda column: (-abs(row[column]), column))
    return order[: round(keep * len(row))]


def without_largest(delta: Floats, keep: float) -> Floats:
    out = delta.copy()
    for row in out:
        row[largest(row, keep)] = 0.0
    return out


def pruned(name: str, deltas: Mapping[str, Floats], options: Options) -> dict[str, Floats]:
    """One expert's deltas by tensor, as the method prunes them."""
    if options.method == "ties":
        return trimmed(deltas, options)
    if options.method in ("dare", "dare_ties"):
        return {tensor: dropped(name, tensor, delta, options) for tensor, delta in deltas.items()}
    if options.method == "byom" and options.residual == "delta":
        return {tensor: without_largest(delta, options.keep) for tensor, delta in deltas.items()}
    return dict(deltas)


def elected(values: Sequence[Floats], weights: Sequence[float], mean: bool) -> tuple[Floats, Bools]:
    """Per entry the members that agree with the sign of more mass, + where both have as much; and where that is near.

    Two members of the same size are a tie whatever the arithmetic; sums of more may round.
    """
    total, near = np.zeros(len(values[0])), np.zeros(len(values[0]), bool)
    for j in range(len(total)):
        masses = [w * float(value[j]) for value, w in zip(values, weights, strict=True)]
        up, down = sum(m for m in masses if m > 0), -sum(m for m in masses if m < 0)
        chosen = [n for n, m in enumerate(masses) if (m > 0 if up >= down else m < 0)]
        if chosen:
            agreeing = sum(weights[n] for n in chosen) if mean else 1.0
            total[j] = sum(masses[n] for n in chosen) / agreeing
        plain = up == down and sum(m != 0 for m in masses) == 2
        near[j] = up > 0 and abs(up - down) <= NEAR * (up + down) and not plain
    return total, near


def arc(a: Floats, b: Floats, t: float) -> Floats:
    """SLERP from a to b; a straight line above |cos| 0.9995 and where one is zero."""
    lengths = float(np.linalg.norm(a) * np.linalg.norm(b))
    cosine = float(a @ b) / lengths if lengths else 1.0
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def combined(values: Sequence[Floats], weights: Sequence[float], options: Options) -> tuple[Floats, Bools]:
    """One delta of a group's, members in order of name, scaling included; and where a sign is near."""
    none = np.zeros(len(values[0]), bool)
    factor = 1.0 if options.scaling == "mean" else float(options.scaling)
    mean = options.scaling == "mean" or options.combine == "mean"
    if options.method == "slerp":
        return (arc(values[0], values[1], options.t) if len(values) == 2 else values[0]), none
    if options.method in ("ties", "dare_ties"):
        total, near = elected(values, weights, mean)
        return factor * total, near
    total = np.sum([w * value for value, w in zip(values, weights, strict=True)], axis=0)
    return factor * total / (sum(weights) if mean else 1.0), none


def merge_rows(
    base: torch.Tensor, experts: Mapping[str, torch.Tensor], deltas: Mapping[str, Floats], strings: Sequence[tuple[int, ...]],
    options: Options,
) -> tuple[dict[str, Floats], dict[str, Bools], dict[str, Bools]]:  # fmt: skip
    """Merge every channel of one matrix in its groups (arXiv 2412.15283, Eq. 3). ``deltas``: pruned."""
    names = sorted(experts)
    origin, weights = as_float64(base), options.weights or dict.fromkeys(names, 1.0)
    rebuilt = {n: np.empty_like(origin) for n in names}
    exact = {n: np.zeros(len(origin), bool) for n in names}
    doubtful = {n: np.zeros(origin.shape, bool) for n in names}
    for channel, found in enumerate(strings):
        for label in set(found):
            members = [n for n, mine in zip(names, found, strict=True) if mine == label]
            same = all(torch.equal(bits_of(experts[m][channel]), bits_of(experts[members[0]][channel])) for m in members)
            if same and (options.singleton == "keep" or options.groups >= len(names)):
                for m in members:
                    rebuilt[m][channel], exact[m][channel] = as_float64(experts[m][channel]), True
                continue
            total, near = combined([deltas[m][channel] for m in members], [weights[m] for m in members], options)
            for m in members:
                rebuilt[m][channel], doubtful[m][channel] = origin[channel] + total, near
    return rebuilt, exact, doubtful


def merge_model(
    base: Mapping[str, torch.Tensor],
    experts: Mapping[str, Mapping[str, torch.Tensor]],
    tensors: Sequence[str],
    options: Options,
) -> MergedModel:
    """Channel Merging of these matrices of a family."""
    names = sorted(experts)
    deltas = {n: {tensor: difference(experts[n][tensor], base[tensor]) for tensor in tensors} for n in names}
    ready = {n: pruned(n, deltas[n], options) for n in names}
    whole = np.stack([np.concatenate([deltas[n][tensor].reshape(-1) for tensor in tensors]) for n in names])
    merged = {}
    for tensor in tensors:
        stacked = np.stack([deltas[n][tensor] for n in names])
        strings, margins = group_channels(tensor, stacked, options, whole)
        own, mine = {n: experts[n][tensor] for n in names}, {n: ready[n][tensor] for n in names}
        found = merge_rows(base[tensor], own, mine, strings, options)
        merged[tensor] = MergedTensor(np.array(strings, np.int64), np.array(margins), *found)
    trims = options.method == "ties" and options.trim_scope != "row" and options.density < 1 and options.groups < len(names)
    return MergedModel(merged, {n: kept_share(deltas[n], options) for n in names} if trims else {})


def with_residue(own: torch.Tensor, base: torch.Tensor, shared: torch.Tensor, exact: Bools, options: Options) -> Floats:
    """BYOM: what an expert is, given the rows of the merged model in their own type, before rounding.

    A row that all experts have, which the merged model keeps ``exact``, leaves nothing to keep. An expert of another type
    is as far from the merged model as its values in the model's type are; its delta is that of its own.
    """
    stored = own.to(shared.dtype)
    delta, away = difference(own, base), difference(stored, shared)
    out = as_float64(shared).copy()
    for channel in np.flatnonzero(~exact):
        columns = largest((away if options.residual == "merged" else delta)[channel], options.keep)
        if options.residual == "merged":
            out[channel, columns] = as_float64(stored[channel])[columns]
        else:
            out[channel, columns] += delta[channel, columns]
    return out
