"""Pool rows by torch operators, on a CPU or a GPU: the reference that the fused path must match, and the path of CUDA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.kernels.bits import cast, count_non_finite, from_float, to_float
from pipeline.kernels.forms import COMBINED, COPY_BASE, COPY_EXPERT, Combining, PoolRows, Pruning, members
from pipeline.kernels.methods.interface import Method


def merge_rows(
    base: NDArray[Any], own: Sequence[NDArray[Any] | None], dtypes: Sequence[str], dtype: str, rows: PoolRows,
    method: Method, pruning: Pruning, combining: Combining, out: NDArray[Any], device: str = "cpu",
    known: Mapping[int, torch.Tensor] | None = None,
) -> tuple[NDArray[np.float64], int]:  # fmt: skip
    """Write the pool rows of a slice; squared errors (channels, experts) and the number of values that are not finite.

    ``base``: (channels, width) raw bits of ``dtype``, the pool's type; ``own``: per expert (channels, width) raw bits of its
    type, or None when no row uses it; ``known``: the deltas (channels, width) float32 of those experts whose are stored as
    such, more exact than the difference of bits; ``out``: (pool rows, width). Sums run in order of experts in float32, are
    multiplied once and rounded once (arXiv 2412.15283, Eq. 3).
    """
    errors = np.zeros((len(base), len(own)))
    channels = np.repeat(np.arange(len(base)), np.diff(rows.starts))
    merged = rows.kinds == COMBINED
    deltas, exact, numbers = _inputs(base, own, dtypes, dtype, bool(merged.any()), device)
    deltas |= known or {}
    pruned = {n: method.prune(delta, n, pruning) for n, delta in deltas.items()}
    for users in np.unique(rows.users):
        who = members(int(users))
        mine = rows.users == users
        for kind in (COPY_BASE, COPY_EXPERT):
            copied = mine & (rows.kinds == kind)
            if copied.any():
                source = base if kind == COPY_BASE else exact[who[0]]
                out[rows.places[copied]] = source[channels[copied]]
        here = mine & merged
        if here.any():
            index = torch.from_numpy(channels[here]).to(device)
            weights = [_column(combining.weights, n, index, device) for n in who]
            total = method.combine([pruned[n][index] for n in who], weights, combining.mean)
            factors = torch.from_numpy(rows.factors[here]).to(device)[:, None]
            finished = from_float(numbers[index] + total * factors, dtype)
            out[rows.places[here]] = finished
            for n in who:
                distance = to_float(finished, dtype, device) - to_float(exact[n][channels[here]], dtype, device)
                errors[channels[here], n] = distance.double().square().sum(dim=1).cpu().numpy()
    return errors, count_non_finite(out, dtype)


def _inputs(
    base: NDArray[Any], own: Sequence[NDArray[Any] | None], dtypes: Sequence[str], dtype: str, merge: bool, device: str
) -> tuple[dict[int, torch.Tensor], dict[int, NDArray[Any]], torch.Tensor]:
    """Per expert its float32 delta and its raw bits in the pool's type, and the base's float32 values."""
    deltas: dict[int, torch.Tensor] = {}
    exact: dict[int, NDArray[Any]] = {}
    reference = to_float(base, dtype, device) if merge else torch.empty(0)
    for n, bits in enumerate(own):
        if bits is not None:
            exact[n] = cast(bits, dtypes[n], dtype)
            if merge:
                deltas[n] = to_float(bits, dtypes[n], device) - reference
    return deltas, exact, reference


def _column(weights: NDArray[np.float32], expert: int, index: torch.Tensor, device: str) -> torch.Tensor:
    """An expert's weight per chosen row (rows, 1), or the one for all (1, 1)."""
    column = torch.from_numpy(weights[:, expert : expert + 1].copy()).to(device)
    return column[index] if len(weights) > 1 else column
