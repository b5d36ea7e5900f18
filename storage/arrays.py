"""Groups of Zarr arrays that are complete or not: the mechanism under delta groups and tables.

zarr-python reads a deleted chunk as zeros and skips all-zero chunks when writing. Both are unacceptable for weights, so
every chunk is written, ``complete.json`` lists each with its size and Crc32c, and a chunk that is gone is an error. Who
writes or reads knows an array's shape from the plan, so that nothing else has to be asked for.

Chunks go through the codecs directly, not through zarr-python, whose event loop costs more than a millisecond per call: a
checkpoint has thousands of small arrays. The files are those that zarr-python writes, to the byte (a test compares).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import google_crc32c
import numpy as np
from numcodecs.blosc import BITSHUFFLE, Blosc
from numpy.typing import NDArray

from storage.atomic import canonical_json
from storage.errors import IncompleteStoreError
from storage.stores import Store

COMPLETE, METADATA = "complete.json", "zarr.json"
AT_ONCE = 8
"""Requests of one task to an object store at once."""
CHECKSUM_BYTES = 4
RESIDUE = 0x48674BC7
"""The Crc32c of any bytes with their own Crc32c, little-endian, after them."""


@dataclass(frozen=True)
class ArraySpec:
    """One array of a group; the first axis is rows and chunks are whole rows."""

    shape: tuple[int, ...]
    dtype: str
    """A numpy data type, for example int16."""
    chunk_rows: int
    attributes: Mapping[str, Any]

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        return (self.chunk_rows, *self.shape[1:])

    @property
    def codec(self) -> Blosc:
        """lz4 after a transposition of bits: three times as fast as zstd on deltas, and 7 % larger."""
        return Blosc(cname="lz4", clevel=1, shuffle=BITSHUFFLE, typesize=np.dtype(self.dtype).itemsize)

    def metadata(self) -> dict[str, Any]:
        """The array's ``zarr.json``."""
        size = np.dtype(self.dtype).itemsize
        blosc = {"typesize": size, "cname": "lz4", "clevel": 1, "shuffle": "bitshuffle", "blocksize": 0}
        little_endian = {"name": "bytes", **({"configuration": {"endian": "little"}} if size > 1 else {})}
        return {
            "shape": list(self.shape),
            "data_type": self.dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(self.chunk_shape)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "fill_value": 0.0 if self.dtype.startswith("float") else 0,
            "codecs": [little_endian, {"name": "blosc", "configuration": blosc}, {"name": "crc32c"}],
            "attributes": dict(self.attributes),
            "zarr_format": 3,
            "node_type": "array",
            "storage_transformers": [],
        }


ChunkDigests = dict[str, list[Any]]
"""Chunk key inside the group -> [bytes, Crc32c of the coded rows in hex]. A sha256 would take a tenth of a first run."""


Written = Mapping[str, tuple[ArraySpec, int, NDArray[Any]]]
"""Array -> what it is, the first row, and rows from there on."""
Item = TypeVar("Item")
Found = TypeVar("Found")


def each(function: Callable[[Item], Found], items: Sequence[Item], *, at_once: bool) -> list[Found]:
    """The function's results in order: of requests to an object store, made at once; of local files, one after the other."""
    if not at_once or len(items) < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(function, items))


@dataclass(frozen=True)
class ArrayGroup:
    """A Zarr v3 group in a store."""

    store: Store

    @property
    def place(self) -> str:
        return self.store.place

    def write(self, arrays: Written) -> ChunkDigests:
        """Write rows of arrays, whole chunks only, and return the chunks' digests. With its first rows an array is declared.

        Chunks need not outlive a power cut: every read checks them.
        """
        files: list[tuple[str, tuple[bytes, ...]]] = []
        digests: ChunkDigests = {}
        for name, (spec, start, values) in arrays.items():
            if not start:
                files.append((f"{name}/{METADATA}", (_json(spec.metadata()),)))
            for key, data, checksum in _encoded(name, spec, start, values):
                files.append((key, (data, checksum)))
                digests[key] = [len(data) + CHECKSUM_BYTES, checksum[::-1].hex()]
        each(lambda file: self.store.put(file[0], *file[1], durable=False), files, at_once=not self.store.is_local)
        return digests

    def finish(
        self, chunks: ChunkDigests, arrays: Iterable[str], attributes: Mapping[str, Any], extra: Mapping[str, Any]
    ) -> None:
        """Declare the group of these arrays complete."""
        folders = {"", *(name[:place] for name in arrays for place, letter in enumerate(name) if letter == "/")}
        for folder in sorted(folders):
            metadata = {"attributes": {} if folder else dict(attributes), "zarr_format": 3, "node_type": "group"}
            self.store.put(f"{folder}/{METADATA}".lstrip("/"), _json(metadata))
        self.store.put(COMPLETE, canonical_json({"chunks": chunks, **extra}))

    def record(self) -> dict[str, Any] | None:
        """What ``finish`` wrote; None when the group is not complete."""
        try:
            found = json.loads(self.store.get(COMPLETE))
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def missing(self, chunks: Mapping[str, list[Any]]) -> set[str]:
        """Those of these chunks that are gone or of another size."""
        sizes = self.store.sizes()
        return {key for key, (size, _) in chunks.items() if sizes.get(key) != size}

    def read(self, name: str, spec: ArraySpec, start: int, stop: int, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Rows [start, stop), in ``out`` if it is given. IncompleteStoreError when a chunk is gone or fails its checksum."""
        step = spec.chunk_rows
        numbers = list(range(start // step, -(-stop // step)))
        found = np.empty((stop - start, *spec.shape[1:]), spec.dtype) if out is None else out

        def fill(chunk: int) -> None:
            first, last = max(start, chunk * step), min(stop, (chunk + 1) * step)
            key, rows = chunk_key(name, chunk, len(spec.shape)), found[first - start : last - start]
            if len(rows) == step and rows.flags.c_contiguous and _is_stored_as(rows.dtype, spec):
                self._decode(key, spec, rows)  # whole chunks need no copy
            else:
                whole = np.empty(spec.chunk_shape, np.dtype(spec.dtype).newbyteorder("<"))
                self._decode(key, spec, whole)
                rows[:] = whole[first - chunk * step : last - chunk * step]

        each(fill, numbers, at_once=not self.store.is_local)
        return found

    def ahead(self, name: str, spec: ArraySpec, start: int, stop: int) -> None:
        """Say that rows [start, stop) will be read soon."""
        step = spec.chunk_rows
        numbers = range(start // step, -(-min(stop, spec.shape[0]) // step))
        self.store.ahead([chunk_key(name, chunk, len(spec.shape)) for chunk in numbers])

    def _decode(self, key: str, spec: ArraySpec, rows: NDArray[Any]) -> None:
        """Fill ``rows`` with a whole chunk, checked."""
        try:
            data = self.store.get(key)
        except (FileNotFoundError, NotADirectoryError):
            raise self._damage(key, "is missing") from None
        if len(data) <= CHECKSUM_BYTES or google_crc32c.value(data) != RESIDUE:
            raise self._damage(key, "cannot be decoded (its checksum differs)")
        try:
            spec.codec.decode(memoryview(data)[:-CHECKSUM_BYTES], out=rows)
        except (ValueError, RuntimeError) as error:
            raise self._damage(key, f"cannot be decoded ({error})") from error

    def _damage(self, key: str, what: str) -> IncompleteStoreError:
        error = IncompleteStoreError(f"{self.place}: chunk {key} {what}. Run again: it is made anew.")
        error.damaged = (self.place, key)
        return error


def _is_stored_as(dtype: np.dtype[Any], spec: ArraySpec) -> bool:
    return dtype == np.dtype(spec.dtype).newbyteorder("<")


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=2).encode()


def _encoded(name: str, spec: ArraySpec, start: int, values: NDArray[Any]) -> list[tuple[str, bytes, bytes]]:
    """Key, coded bytes and checksum of every chunk of these rows."""
    stop, step = start + len(values), spec.chunk_rows
    if start % step or (stop % step and stop != spec.shape[0]):
        raise ValueError(f"rows {start} to {stop} of {name} are not whole chunks of {step} rows")
    found = []
    for chunk in range(start // step, -(-stop // step)):
        rows = values[chunk * step - start : (chunk + 1) * step - start]
        if len(rows) < step:  # a chunk at the edge is stored whole
            rows = np.concatenate([rows, np.zeros((step - len(rows), *spec.shape[1:]), rows.dtype)])
        data = spec.codec.encode(np.ascontiguousarray(rows, np.dtype(spec.dtype).newbyteorder("<")))
        found.append(
            (chunk_key(name, chunk, len(spec.shape)), data, google_crc32c.value(data).to_bytes(CHECKSUM_BYTES, "little"))
        )
    return found


def chunk_key(name: str, chunk: int, dimensions: int) -> str:
    """The key of an array's chunk."""
    return f"{name}/{'.'.join(['c', str(chunk), *['0'] * (dimensions - 1)])}"
