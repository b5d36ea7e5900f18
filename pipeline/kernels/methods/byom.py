"""BYOM for full fine-tuning (arXiv 2310.01886): one merged model, and per expert the entries where it matters most.

Two readings. ``merged``: merge whole deltas; per expert keep the entries furthest from the merged model, exactly. ``delta``
(as Channel Merging's comparison words it): the largest entries of an expert's delta leave the merge and are added to the
merged rest. The entries are ranked per row, k = round(keep * width), the first column first among equals: how many there are is
known before anything is merged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.kernels.bits import cast, from_float, to_float
from pipeline.kernels.forms import SUM, WHOLE, Pruning
from pipeline.kernels.methods.interface import Method, added, whole

if TYPE_CHECKING:  # the fused path does without, and importing it takes a second
    import torch


def kept_columns(values: torch.Tensor, count: int) -> torch.Tensor:
    """(rows, count) int64, ascending: the columns of the ``count`` largest |value| of every row (rows, width)."""
    import torch

    order = torch.sort(values.abs(), dim=1, descending=True, stable=True).indices
    return torch.sort(order[:, :count], dim=1).values


def without_largest(delta: torch.Tensor, expert: int, pruning: Pruning) -> torch.Tensor:
    """The delta (rows, width) float32 with its ``pruning.limit`` largest entries per row set to zero."""
    return delta.scatter(1, kept_columns(delta, pruning.limit), 0.0)


@dataclass(frozen=True)
class Rows:
    """Rows of one expert and of the merged model, (rows, width) each."""

    own: NDArray[Any]
    """Raw bits."""
    own_dtype: str
    delta: torch.Tensor
    """float32"""
    shared: NDArray[Any]
    """Raw bits of the merged model."""
    dtype: str
    """Of the merged model."""
    exact: NDArray[np.bool_]
    """(rows,) where the merged model's row is the expert's own."""


def residue(rows: Rows, count: int, residual: str, device: str) -> tuple[NDArray[np.int32], NDArray[Any]]:
    """What one expert keeps: columns (rows, count) int32, and the raw bits that stand there in the rebuilt expert."""
    merged = to_float(rows.shared, rows.dtype, device)
    if residual == "merged":  # what is stored, and so what is ranked, is the expert in the merged model's type
        own = cast(rows.own, rows.own_dtype, rows.dtype)
        places = kept_columns(to_float(own, rows.dtype, device) - merged, count).cpu().numpy()
        return places.astype(np.int32), np.take_along_axis(own, places, axis=1)
    columns = kept_columns(rows.delta, count)
    places = columns.cpu().numpy()
    bits = from_float((merged + rows.delta).gather(1, columns), rows.dtype)
    bits[rows.exact] = np.take_along_axis(rows.shared[rows.exact], places[rows.exact], axis=1)
    return places.astype(np.int32), bits


METHODS: dict[str, Method] = {
    "merged": Method(prune=whole, combine=added, form=(WHOLE, SUM)),
    "delta": Method(prune=without_largest, combine=added, form=(WHOLE, SUM)),
}
"""residual -> how the shared model is merged."""


def kept_per_row(keep: float, width: int) -> int:
    """Entries kept of a row of this width."""
    return round(keep * width)
