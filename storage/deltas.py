"""The delta store: every expert's difference to the base, lossless, one Zarr group per (base, expert).

``<deltas>/<base id>/<expert id>/<tensor>`` holds ``bits(expert) - bits(base)`` as wrapping integers, exact for every
data type down to -0.0. Where the base has no such row, its bits count as 0. Of LoRA adapters the delta itself is stored, as
float32 (attribute ``encoding: float``): rounded to a model's type most of it would be lost. ``row_digests/<tensor>`` holds a
128-bit digest per row, by which equal rows of different experts are found; ``row_squares/<tensor>`` |delta|^2 per row;
``magnitudes/<tensor>`` per chunk how many |delta| there are by their high 16 bits, over the rows that the base has.
``<deltas>/<base id>/base`` holds the bits of the base's rows, where they are not at hand as rows of a local file.
``<deltas>/<base id>/tables/<id of the experts>/<table>/<tensor>`` holds tables of pairs of experts: gram, l1, sign, sums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from storage.arrays import ArrayGroup, ArraySpec, chunk_key
from storage.digests import digest_of
from storage.layout import DELTA_FORMAT, DTYPES
from storage.stores import Store
from storage.tensors import TensorInfo, is_low_rank

BASE, TABLES, RUNS = "base", "tables", "runs"
JOB = "job.json"
"""The same record in an output's ``.work/<inputs>/``, while the job's work is unfinished."""
ROW_DIGESTS, ROW_SQUARES, MAGNITUDES, THRESHOLDS = "row_digests", "row_squares", "magnitudes", "thresholds"
DIGEST_BYTES = 16
BINS = 1 << 15
"""Counts of a chunk's |delta| by the high 16 bits of its float32, whose sign bit is clear."""


def expert_group(deltas: Store, base_id: str, expert_id: str) -> ArrayGroup:
    """The delta group of one expert."""
    return ArrayGroup(deltas.under(f"{base_id}/{expert_id}"))


def base_group(deltas: Store, base_id: str) -> ArrayGroup:
    """The base's own rows: differences to nothing."""
    return expert_group(deltas, base_id, BASE)


@dataclass(frozen=True)
class StoredRows:
    """A base's rows that lie in the delta store."""

    group: ArrayGroup
    tensor: str
    """Their array: the tensor's name in the base."""

    def read(self, info: TensorInfo, start: int, stop: int) -> NDArray[Any]:
        stored = self.group.read(self.tensor, delta_spec(info), start, stop)
        return stored.view(DTYPES[info.dtype].bits)


def table_group(deltas: Store, base_id: str, expert_ids: Sequence[str]) -> ArrayGroup:
    """The tables of a set of experts, whatever their names."""
    return ArrayGroup(deltas.under(f"{base_id}/{TABLES}/{digest_of(sorted(expert_ids))[:40]}"))


def run_record(base_id: str, inputs: str) -> str:
    """Where a store remembers when a job last read or wrote it, with which experts, and for which output."""
    return f"{base_id}/{RUNS}/{inputs[:40]}.json"


def digest_array(tensor: str) -> str:
    """Name of the array of row digests of a tensor: (rows, 16) uint8."""
    return f"{ROW_DIGESTS}/{tensor}"


def squares_array(tensor: str) -> str:
    """Name of the array of |delta|^2 per row: (rows,) float64."""
    return f"{ROW_SQUARES}/{tensor}"


def magnitudes_array(tensor: str) -> str:
    """Name of the array of counts by size: (chunks, BINS) uint32."""
    return f"{MAGNITUDES}/{tensor}"


def table_array(table: str, tensor: str) -> str:
    """Name of an array in the group of tables, for example of table ``gram``."""
    return f"{table}/{tensor}"


def group_layout(tensors: Mapping[str, TensorInfo]) -> str:
    """Digest of how tensors lie in a group: one with other tensors, or the same cut into other rows, is another."""
    return digest_of({name: [info.dtype, info.shape, info.channel_axis, _encoding(info)] for name, info in tensors.items()})


def whole_record(group: ArrayGroup, tensors: Mapping[str, TensorInfo]) -> dict[str, Any] | None:
    """What completed a source's group, if it is of this format, with these tensors, cut like this."""
    record = group.record()
    if record is None or record.get("format") != DELTA_FORMAT or record.get("layout") != group_layout(tensors):
        return None
    return record


def is_whole(group: ArrayGroup, tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether a source is in the store and no chunk of it is gone."""
    record = whole_record(group, tensors)
    return record is not None and not group.missing(record["chunks"])


def _encoding(info: TensorInfo) -> str:
    return "float" if is_low_rank(info) else "bits"


def delta_spec(info: TensorInfo) -> ArraySpec:
    """The array of a tensor's differences: (rows, width)."""
    attributes = {
        "encoding": _encoding(info),
        "dtype": info.dtype,
        "shape": list(info.shape),
        "channel_axis": info.channel_axis,
    }
    stored = "float32" if is_low_rank(info) else DTYPES[info.dtype].difference.name
    return ArraySpec((info.rows, info.width), stored, info.chunk_rows, attributes)


def digest_spec(info: TensorInfo) -> ArraySpec:
    """The array of its row digests: (rows, 16) uint8."""
    return ArraySpec((info.rows, DIGEST_BYTES), "uint8", info.chunk_rows, {"digest": "xxh3-128"})


def squares_spec(info: TensorInfo) -> ArraySpec:
    """The array of |delta|^2 per row: (rows,) float64."""
    return ArraySpec((info.rows,), "float64", info.chunk_rows, {})


def magnitudes_spec(info: TensorInfo) -> ArraySpec:
    """The array of counts by size: (chunks, BINS) uint32."""
    return ArraySpec((-(-info.rows // info.chunk_rows), BINS), "uint32", 1, {})


def table_spec(base: TensorInfo, experts: int, kind: str) -> ArraySpec:
    """The array of a table over the base's rows: (rows, N, N) float64, or (rows, N, 1) of sums."""
    return ArraySpec((base.rows, experts, 1 if kind == "sums" else experts), "float64", base.chunk_rows, {})


def expert_arrays(tensors: Mapping[str, TensorInfo]) -> dict[str, ArraySpec]:
    """All arrays of a source's group."""
    arrays: dict[str, ArraySpec] = {}
    for name, info in tensors.items():
        arrays |= {name: delta_spec(info), digest_array(name): digest_spec(info)}
        if DTYPES[info.dtype].mergeable:
            arrays |= {squares_array(name): squares_spec(info), magnitudes_array(name): magnitudes_spec(info)}
    return arrays


def unit_keys(name: str, info: TensorInfo, start: int) -> list[str]:
    """The chunks that hold what is known of the rows of a tensor's chunk."""
    place = start // info.chunk_rows
    return [chunk_key(array, place, len(spec.shape)) for array, spec in expert_arrays({name: info}).items()]


def difference(expert: NDArray[Any], base: NDArray[Any]) -> NDArray[Any]:
    """bits(expert) - bits(base), wrapping. Both unsigned of one size; the result is signed. Pure."""
    result: NDArray[Any] = (expert - base).view(expert.dtype.str.replace("u", "i"))
    return result


def restored(base: NDArray[Any], stored: NDArray[Any]) -> NDArray[Any]:
    """bits(expert) from bits(base) and the stored difference: the inverse of ``difference``. Pure."""
    result: NDArray[Any] = base + stored.view(base.dtype)
    return result


def row_digests(bits: NDArray[Any], dtype: str) -> NDArray[np.uint8]:
    """(rows, 16) uint8: xxh3-128 of every row's raw bytes, seeded by the type: equal bits of two types are not equal. Pure."""
    seed = int.from_bytes(dtype.encode(), "little")
    digests = [xxhash.xxh3_128_digest(row, seed) for row in np.ascontiguousarray(bits)]
    return np.frombuffer(b"".join(digests), np.uint8).reshape(len(bits), DIGEST_BYTES)
