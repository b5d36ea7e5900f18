"""Deltas of LoRA adapters, ``scale * (B A)`` (arXiv 2106.09685, section 4.1), as ``peft`` computes them on the CPU.

Factors come as float32: ``PeftModel.from_pretrained`` casts bfloat16 and float16 adapters to float32 before anything is
computed (``autocast_adapter_dtype``, on by default), and ``merge_and_unload`` then multiplies, scales and adds in float32.
A matrix product's last bits depend on the number of rows asked for in one call, so callers compute whole chunks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.kernels.bits import from_float, to_float

if TYPE_CHECKING:
    import torch


def _tensor(values: NDArray[np.float32]) -> torch.Tensor:
    import torch

    # a slice of columns takes another path through BLAS than the same numbers side by side; torch warns of read-only memory
    return torch.from_numpy(np.require(values, np.float32, ["C", "W"]))


def delta_rows(a: NDArray[np.float32], b: NDArray[np.float32], scale: float) -> NDArray[np.float32]:
    """``scale * (B A)`` of some output channels: (rows, width) float32, from A (rank, width) and B (rows, rank) float32.

    As in peft's ``lora.Linear.get_delta_weight``, whose transposition for Conv1D changes no value.
    """
    result: NDArray[np.float32] = (_tensor(b) @ _tensor(a)).mul_(scale).numpy()
    return result


def embedding_delta_rows(a: NDArray[np.float32], b: NDArray[np.float32], scale: float) -> NDArray[np.float32]:
    """``scale * (B A)`` transposed, of some tokens: (rows, width) float32, from A (rank, rows) and B (width, rank) float32.

    As in peft's ``lora.Embedding.get_delta_weight``.
    """
    return np.ascontiguousarray(delta_rows(a, b, scale).T)


def added(base: NDArray[Any], dtype: str, delta: NDArray[np.float32]) -> NDArray[Any]:
    """An expert's rows as raw bits of its own type: the base's (rows, width), given as raw bits, plus the delta.

    One float32 addition and one rounding to nearest even, as torch's ``weight.data += delta`` of peft's ``lora.Linear.merge``;
    its ``lora.Embedding.merge`` rounds a delta to a bfloat16 or float16 base's type first. ``dtype``: BF16, F16 or F32.
    """
    return from_float(to_float(base, dtype) + _tensor(delta), dtype)
