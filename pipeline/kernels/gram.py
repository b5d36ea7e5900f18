"""Inner products of the experts' delta rows: all that clustering needs to know of them."""

from __future__ import annotations

import torch


def gram(deltas: torch.Tensor) -> torch.Tensor:
    """G[r, n, m] = <delta_n[r], delta_m[r]>.

    ``deltas``: (experts, rows, width) float32. Returns (rows, experts, experts) float64, symmetric to the bit.
    Products and sums are float64, so that the order of summation is far below the tolerance of ties. Pure.
    """
    experts, rows, _ = deltas.shape
    result = torch.zeros(rows, experts, experts, dtype=torch.float64, device=deltas.device)
    for n in range(experts):
        left = deltas[n].to(torch.float64)
        for m in range(n, experts):
            products = torch.linalg.vecdot(left, deltas[m].to(torch.float64))
            result[:, n, m] = products
            result[:, m, n] = products
    return result
