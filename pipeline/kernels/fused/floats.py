"""Raw bits to float32 and back inside compiled loops. numba has no 16-bit floats, so they are taken apart by hand.

The integer type says what the bits are: uint16 bfloat16, int16 float16, uint32 float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload
from numpy.typing import NDArray

TAGS = {"BF16": "<u2", "F16": "<i2", "F32": "<u4"}
"""safetensors name -> the integer type that stands for it."""


def tagged(bits: NDArray[Any], dtype: str) -> NDArray[Any]:
    """The same bits as the integer type that stands for their data type."""
    return bits.view(TAGS[dtype])


def _wide_bf16(bits: Any) -> Any:
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


def _wide_f16(bits: Any) -> Any:
    # exponent and fraction in float32's places; 2^112 makes up for the other bias, and does so for subnormals too
    word = np.uint32(np.uint16(bits))
    size = np.float32(np.uint32((word & np.uint32(0x7FFF)) << np.uint32(13)).view(np.float32) * np.float32(2.0**112))
    sign = np.uint32((word & np.uint32(0x8000)) << np.uint32(16))
    return np.uint32(np.float32(size).view(np.uint32) | sign).view(np.float32)


def _wide_f32(bits: Any) -> Any:
    return np.uint32(bits).view(np.float32)


def _narrow_bf16(value: Any, like: Any) -> Any:
    word = np.float32(value).view(np.uint32)
    rounded = np.uint16((word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
    return rounded if value == value else np.uint16(0x7FC0)


def _narrow_f16(value: Any, like: Any) -> Any:
    word = np.float32(value).view(np.uint32)
    sign = np.uint32((word >> np.uint32(16)) & np.uint32(0x8000))
    size = np.uint32(word & np.uint32(0x7FFFFFFF))
    # normal numbers: round the 13 bits that go to nearest even, move the bias from 127 to 15
    normal = (size - np.uint32(112 << 23) + np.uint32(0xFFF) + ((size >> np.uint32(13)) & np.uint32(1))) >> np.uint32(13)
    # below 2^-14: adding 0.5 lets the addition itself round to float16's subnormal steps
    small = np.float32(np.uint32(size).view(np.float32) + np.float32(0.5)).view(np.uint32) - np.float32(0.5).view(np.uint32)
    found = np.uint32(small) if size < np.uint32(113 << 23) else np.uint32(normal)
    # from 65520 on (the middle between the largest float16 and the next step) rounding gives infinity
    found = np.uint32(0x7C00) if size >= np.uint32(0x477FF000) else found
    found = np.uint32(0x7E00) if size > np.uint32(0x7F800000) else found
    return np.int16(np.uint16(found | sign))


def _narrow_f32(value: Any, like: Any) -> Any:
    return np.float32(value).view(np.uint32)


def _infinite_bf16(bits: Any) -> Any:
    return (bits & np.uint16(0x7F80)) == np.uint16(0x7F80)


def _infinite_f16(bits: Any) -> Any:
    return (np.uint16(bits) & np.uint16(0x7C00)) == np.uint16(0x7C00)


def _infinite_f32(bits: Any) -> Any:
    return (bits & np.uint32(0x7F800000)) == np.uint32(0x7F800000)


def _plus_u2(bits: Any, difference: Any) -> Any:
    return np.uint16(bits + np.uint16(difference))


def _plus_i2(bits: Any, difference: Any) -> Any:
    return np.int16(np.uint16(np.uint16(bits) + np.uint16(difference)))


def _plus_u4(bits: Any, difference: Any) -> Any:
    return np.uint32(bits + np.uint32(difference))


def widen(bits: Any) -> Any:
    """float32 of one value's bits, exactly. Like all here, for compiled callers only."""
    raise NotImplementedError


def narrow(value: Any, like: Any) -> Any:
    """Bits of a float32 rounded once to nearest even, in the type of ``like``."""
    raise NotImplementedError


def infinite(bits: Any) -> Any:
    """Whether the bits are of an infinity or NaN."""
    raise NotImplementedError


def plus(bits: Any, difference: Any) -> Any:
    """bits(expert) = bits(base) + stored difference, wrapping."""
    raise NotImplementedError


def _chosen(tag: Any, bf16: Any, f16: Any, f32: Any) -> Any:
    return {types.uint16: bf16, types.int16: f16, types.uint32: f32}[tag]


@overload(widen, inline="always")
def _widen(bits: Any) -> Any:
    return _chosen(bits, _wide_bf16, _wide_f16, _wide_f32)


@overload(narrow, inline="always")
def _narrow(value: Any, like: Any) -> Any:
    return _chosen(like, _narrow_bf16, _narrow_f16, _narrow_f32)


@overload(infinite, inline="always")
def _infinite(bits: Any) -> Any:
    return _chosen(bits, _infinite_bf16, _infinite_f16, _infinite_f32)


@overload(plus, inline="always")
def _plus(bits: Any, difference: Any) -> Any:
    return _chosen(bits, _plus_u2, _plus_i2, _plus_u4)
