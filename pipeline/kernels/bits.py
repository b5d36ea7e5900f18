"""Raw bits of a checkpoint's data types to numbers and back. Device-agnostic."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # the fused path does without, and importing it takes a second
    import torch


TORCH = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_SIGNED = {2: "<i2", 4: "<i4"}


def to_float(bits: NDArray[Any], dtype: str, device: str = "cpu") -> torch.Tensor:
    """float32 values of raw bits. ``dtype`` is a safetensors name: BF16, F16 or F32."""
    import torch

    # from_numpy shares memory; a read-only array is only read here, but torch warns of it
    signed = bits.view(_SIGNED[bits.dtype.itemsize])
    if not signed.flags.writeable:
        signed = signed.copy()
    return torch.from_numpy(signed).to(device).view(getattr(torch, TORCH[dtype])).to(torch.float32)


def as_numbers(bits: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """float32 values of raw bits, of the same shape; without torch."""
    if dtype == "BF16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    values: NDArray[np.float32] = bits.view(np.float16 if dtype == "F16" else np.float32).astype(np.float32)
    return values


def from_float(values: torch.Tensor, dtype: str) -> NDArray[Any]:
    """Raw bits of float32 values, rounded once to nearest even."""
    import torch

    rounded = values.to(getattr(torch, TORCH[dtype])).contiguous()
    size = rounded.element_size()
    signed = rounded.view(torch.int16 if size == 2 else torch.int32).cpu().numpy()
    result: NDArray[Any] = signed.view(f"<u{size}")
    return result


def cast(bits: NDArray[Any], source: str, target: str) -> NDArray[Any]:
    """Raw bits in another data type; the same array when the types are equal."""
    return bits if source == target else from_float(to_float(bits, source), target)


def count_non_finite(bits: NDArray[Any], dtype: str) -> int:
    """Infinities and NaNs: entries whose exponent bits are all ones."""
    exponent = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}.get(dtype)
    return 0 if exponent is None else int(np.count_nonzero((bits & bits.dtype.type(exponent)) == exponent))
