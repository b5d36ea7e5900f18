"""The delta store: every expert's difference to the base, lossless, one Zarr group per (base, expert).

``<deltas>/<base id>/<expert id>/<tensor>`` holds ``bits(expert) - bits(base)`` as wrapping integers, exact for every
data type down to -0.0. Where the base has no such row, its bits count as 0. ``row_digests/<tensor>`` holds a 128-bit
digest per row, by which equal rows of different experts are found.
``<deltas>/<base id>/tables/<id of the experts>/<tensor>`` holds Gram tables.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.arrays import ArrayGroup, ArraySpec
from storage.checkpoint import TensorInfo
from storage.digests import digest_of
from storage.layout import DELTA_FORMAT, DTYPES

ROW_DIGESTS = "row_digests"
DIGEST_BYTES = 16


def expert_group(deltas: Path, base_id: str, expert_id: str) -> ArrayGroup:
    """The delta group of one expert."""
    return ArrayGroup(deltas / base_id / expert_id)


def gram_group(deltas: Path, base_id: str, expert_ids: Sequence[str]) -> ArrayGroup:
    """The Gram tables of a set of experts, whatever their names."""
    return ArrayGroup(deltas / base_id / "tables" / digest_of(sorted(expert_ids))[:40])


def digest_array(tensor: str) -> str:
    """Name of the array of row digests of a tensor."""
    return f"{ROW_DIGESTS}/{tensor}"


def create_expert_group(group: ArrayGroup, tensors: Mapping[str, TensorInfo], source: str) -> None:
    """Start the delta group of an expert with all its arrays."""
    arrays: dict[str, ArraySpec] = {}
    for name, info in tensors.items():
        rows, width, step = info.rows, info.width, info.chunk_rows
        attributes = {"encoding": "bits", "dtype": info.dtype, "shape": list(info.shape)}
        arrays[name] = ArraySpec((rows, width), DTYPES[info.dtype].difference.name, step, attributes)
        arrays[digest_array(name)] = ArraySpec((rows, DIGEST_BYTES), "uint8", step, {"digest": "blake2b-128"})
    group.create(arrays, {"format": DELTA_FORMAT, "source": source})


def difference(expert: NDArray[Any], base: NDArray[Any]) -> NDArray[Any]:
    """bits(expert) - bits(base), wrapping. Both unsigned of one size; the result is signed. Pure."""
    result: NDArray[Any] = (expert - base).view(expert.dtype.str.replace("u", "i"))
    return result


def restored(base: NDArray[Any], stored: NDArray[Any]) -> NDArray[Any]:
    """bits(expert) from bits(base) and the stored difference: the inverse of ``difference``. Pure."""
    result: NDArray[Any] = base + stored.view(base.dtype)
    return result


def row_digests(bits: NDArray[Any], dtype: str) -> NDArray[np.uint8]:
    """(rows, 16) uint8: blake2b-128 of every row's raw bytes and data type: equal bits of two types are not equal. Pure."""
    out = np.empty((len(bits), DIGEST_BYTES), np.uint8)
    for row, raw in enumerate(np.ascontiguousarray(bits)):
        out[row] = np.frombuffer(hashlib.blake2b(raw, digest_size=DIGEST_BYTES, person=dtype.encode()).digest(), np.uint8)
    return out
