"""What clustering needs to know of the experts' delta rows, by torch operators: Gram matrices, distances, sums."""

from __future__ import annotations

from collections.abc import Callable

import torch


def _pairs(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = torch.linalg.vecdot(left, right)
    return found


def _distances(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return (left - right).abs().sum(dim=-1)


def _table(deltas: torch.Tensor, function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    experts, rows, _ = deltas.shape
    result = torch.zeros(rows, experts, experts, dtype=torch.float64, device=deltas.device)
    for n in range(experts):
        left = deltas[n].to(torch.float64)
        for m in range(n, experts):
            found = function(left, deltas[m].to(torch.float64))
            result[:, n, m] = found
            result[:, m, n] = found
    return result


def table(deltas: torch.Tensor, kind: str) -> torch.Tensor:
    """A table of these rows: (rows, experts, experts) float64, or (rows, experts, 1) for ``sums``. Pure.

    ``deltas``: (experts, rows, width) float32. ``gram``: <d_n, d_m>; ``l1``: sum |d_n - d_m|; ``sign``: <sgn d_n, sgn d_m>;
    ``sums``: sum d_n. Symmetric to the bit. Products and sums are float64, so that the order of summation is far below the
    tolerance of ties.
    """
    if kind == "sums":
        return deltas.to(torch.float64).sum(dim=-1).T[..., None]
    if kind == "l1":
        return _table(deltas, _distances)
    return _table(deltas.sign() if kind == "sign" else deltas, _pairs)
