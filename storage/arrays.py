"""Groups of Zarr arrays that are complete or not: the mechanism under delta groups and Gram tables.

zarr-python reads a deleted chunk as zeros and skips all-zero chunks when writing. Both are unacceptable for weights, so
every chunk is written, ``complete.json`` lists each with its size and sha256, and a chunk that is gone is an error.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec

from storage.atomic import canonical_json, write_atomically
from storage.errors import IncompleteStoreError

COMPLETE = "complete.json"
REMEDY = "Delete the folder {path} and run again; it is computed anew."


@dataclass(frozen=True)
class ArraySpec:
    """One array of a group; the first axis is rows and chunks are whole rows."""

    shape: tuple[int, ...]
    dtype: str
    """A numpy data type, for example int16."""
    chunk_rows: int
    attributes: Mapping[str, Any]


ChunkDigests = dict[str, list[Any]]
"""Chunk key inside the group -> [bytes, sha256]."""


class ArrayGroup:
    """A Zarr v3 group in a local folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._record: dict[str, Any] | None = None

    def create(self, arrays: Mapping[str, ArraySpec], attributes: Mapping[str, Any]) -> None:
        """Start the group anew: what an unfinished run left is not trusted."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        zarr.create_group(self.path, zarr_format=3, attributes=dict(attributes))
        self.add(arrays)

    def add(self, arrays: Mapping[str, ArraySpec]) -> None:
        """Add arrays, or replace damaged ones, while others of the group may be read."""
        group = zarr.open_group(self.path, mode="r+")
        for name, spec in arrays.items():
            group.create_array(
                name=name,
                shape=spec.shape,
                chunks=(spec.chunk_rows, *spec.shape[1:]),
                dtype=spec.dtype,
                fill_value=0,
                compressors=[BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle"), Crc32cCodec()],
                attributes=dict(spec.attributes),
                overwrite=True,
            )

    def write(self, name: str, start: int, values: NDArray[Any]) -> ChunkDigests:
        """Write rows from ``start`` on, whole chunks only, and return their digests."""
        # open_array(config=…) does not apply this to an array that exists (zarr 3.1.6)
        array = zarr.open_array(self.path / name, mode="r+").with_config({"write_empty_chunks": True})
        stop = start + len(values)
        step = array.chunks[0]
        if start % step or (stop % step and stop != array.shape[0]):
            raise ValueError(f"rows {start} to {stop} of {name} are not whole chunks of {step} rows")
        array[start:stop] = values
        digests: ChunkDigests = {}
        for chunk in range(start // step, -(-stop // step)):
            key = _chunk_key(name, chunk, len(array.shape))
            data = (self.path / key).read_bytes()
            digests[key] = [len(data), hashlib.sha256(data).hexdigest()]
        return digests

    def finish(self, chunks: ChunkDigests, extra: Mapping[str, Any]) -> None:
        """Declare the group complete."""
        self._record = None
        write_atomically(self.path / COMPLETE, canonical_json({"chunks": chunks, **extra}))

    @property
    def complete(self) -> bool:
        return (self.path / COMPLETE).is_file()

    @property
    def record(self) -> dict[str, Any]:
        """What ``finish`` wrote."""
        if self._record is None:
            try:
                self._record = json.loads((self.path / COMPLETE).read_bytes())
            except (OSError, ValueError):
                remedy = REMEDY.format(path=self.path)
                raise IncompleteStoreError(f"{self.path} is not complete. {remedy}") from None
        return self._record

    def missing_chunks(self) -> list[str]:
        """Chunks that are listed but gone or of another size."""
        return [key for key, (size, _) in self.record["chunks"].items() if _size(self.path / key) != size]

    def chunk_rows(self, name: str) -> int:
        return int(zarr.open_array(self.path / name, mode="r").chunks[0])

    def read(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows [start, stop). IncompleteStoreError when a chunk is gone or fails its checksum."""
        array = zarr.open_array(self.path / name, mode="r")
        step = array.chunks[0]
        for chunk in range(start // step, -(-stop // step)):
            key = _chunk_key(name, chunk, len(array.shape))
            listed = self.record["chunks"].get(key)
            if listed is None or _size(self.path / key) != listed[0]:
                remedy = REMEDY.format(path=self.path)
                raise IncompleteStoreError(f"{self.path}: chunk {key} is missing or of the wrong size. {remedy}")
        try:
            return np.asarray(array[start:stop])
        except (ValueError, RuntimeError) as error:
            remedy = REMEDY.format(path=self.path)
            raise IncompleteStoreError(f"{self.path}: {name}: a chunk cannot be decoded ({error}). {remedy}") from error


def _chunk_key(name: str, chunk: int, dimensions: int) -> str:
    return "/".join([name, "c", str(chunk), *["0"] * (dimensions - 1)])


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
