"""Tensors of a file under way, filled by many tasks, rows in any order.

On a local disk the file has its full size from the start and rows are written where they belong. Object stores cannot do
that: there each task writes the rows of some channels as one object, a part, and packing streams the parts into the file.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from storage.errors import IncompleteStoreError
from storage.local_store import explained
from storage.safetensors_file import write_at
from storage.stores import Store

PART_BYTES = 32 << 20
"""Of the rows of a part, at most, if every expert has one of its own."""
AT_ONCE = 4
"""Ranges of parts that are fetched ahead."""
RANGE_BYTES = 16 << 20


@dataclass(frozen=True)
class LocalRows:
    """A tensor in a local file of its full size."""

    path: Path
    offset: int
    """First byte of the tensor in the file."""
    row_bytes: int

    def write(self, places: NDArray[np.int64], rows: NDArray[Any]) -> None:
        """Write rows where they belong; ``places`` ascend."""
        with explained(self.path):
            for run in runs_of(places):
                write_at(self.path, self.offset + int(places[run[0]]) * self.row_bytes, rows[run[0] : run[-1] + 1])

    def finish(self) -> None:
        """Nothing: a task syncs its files when it is done with all of them."""


@dataclass
class PartRows:
    """The rows of some channels of a tensor, on their way into one object."""

    store: Store
    key: str
    places: list[NDArray[np.int64]] = field(default_factory=list)
    rows: list[NDArray[Any]] = field(default_factory=list)

    def write(self, places: NDArray[np.int64], rows: NDArray[Any]) -> None:
        """Keep rows for ``finish``."""
        self.places.append(places)
        self.rows.append(rows)

    def finish(self) -> None:
        """Write the part: its rows in the order of the tensor."""
        if self.places:
            order = np.argsort(np.concatenate(self.places), kind="stable")
            rows = np.ascontiguousarray(np.concatenate(self.rows)[order])
            self.store.put(self.key, rows.reshape(-1).view(np.uint8).data)
            self.places, self.rows = [], []


def runs_of(places: NDArray[Any]) -> list[NDArray[np.int64]]:
    """Positions of runs of consecutive numbers."""
    return [run for run in np.split(np.arange(len(places)), np.flatnonzero(np.diff(places) != 1) + 1) if len(run)]


def part_starts(rows: int, chunk_rows: int, channel_bytes: int) -> NDArray[np.int64]:
    """First channels of a tensor's parts, which end where a chunk ends; a channel's rows have at most so many bytes."""
    step = max(1, PART_BYTES // max(channel_bytes, 1))
    return np.array([n for chunk in range(0, rows, chunk_rows) for n in range(chunk, min(chunk + chunk_rows, rows), step)])


def part_key(file: str, tensor: str, start: int) -> str:
    """The object of the rows of the channels from ``start`` on."""
    return f"{file}/{tensor}/{start}"


def part_ranges(channel: NDArray[np.int32], starts: NDArray[np.int64]) -> list[tuple[int, int, int]]:
    """Where a tensor's rows, in order, lie in its parts: (part, first row in it, rows)."""
    part = np.searchsorted(starts, channel, "right") - 1
    order = np.argsort(part, kind="stable")
    first = np.searchsorted(part[order], np.arange(len(starts)))
    rank = np.empty(len(channel), np.int64)
    rank[order] = np.arange(len(channel)) - first[part[order]]
    breaks = np.flatnonzero((np.diff(part) != 0) | (np.diff(rank) != 1)) + 1
    return [(int(part[run[0]]), int(rank[run[0]]), len(run)) for run in np.split(np.arange(len(channel)), breaks) if len(run)]


def fetched(store: Store, ranges: Sequence[tuple[str, int, int]], limit: int) -> Iterator[bytes | memoryview]:
    """Bytes of (key, start, stop) ranges in order. Parts that have at most ``limit`` bytes together are fetched once, whole.

    IncompleteStoreError when a part is gone or shorter than that: it is made anew.
    """
    ends: dict[str, int] = {}
    for key, _, stop in ranges:
        ends[key] = max(stop, ends.get(key, 0))
    if len(ranges) > len(ends) and sum(ends.values()) <= limit:
        keys = list(ends)
        whole = dict(zip(keys, _in_order(store, [(key, 0, ends[key]) for key in keys]), strict=True))
        for key, start, stop in ranges:
            yield memoryview(whole[key])[start:stop]
        return
    yield from _in_order(
        store, [(key, at, min(at + RANGE_BYTES, stop)) for key, start, stop in ranges for at in range(start, stop, RANGE_BYTES)]
    )


def _in_order(store: Store, cut: Sequence[tuple[str, int, int]]) -> Iterator[bytes]:
    """The bytes of these ranges, some of them fetched ahead."""

    def one(asked: tuple[str, int, int]) -> bytes:
        lost = IncompleteStoreError(f"{store.place}/{asked[0]} is gone or cut short. Run again: it is made anew.")
        lost.damaged = (store.place, asked[0])
        try:
            data = store.read(*asked)
        except FileNotFoundError:
            raise lost from None
        if len(data) != asked[2] - asked[1]:
            raise lost
        return data

    with ThreadPoolExecutor(AT_ONCE) as pool:
        ahead = [pool.submit(one, asked) for asked in cut[:AT_ONCE]]
        for n in range(len(cut)):
            data = ahead.pop(0).result()
            if n + AT_ONCE < len(cut):
                ahead.append(pool.submit(one, cut[n + AT_ONCE]))
            yield data


def sync_data(paths: set[Path]) -> None:
    """Make what was written into these files durable: only then a receipt may say so."""
    for path in sorted(paths):
        with explained(path), path.open("rb") as file:
            os.fdatasync(file.fileno())


def arrays_to_bytes(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Arrays as the bytes of a NumPy archive, with a checksum each."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]  # numpy's stubs take the arrays for its flag
    return buffer.getvalue()


def read_arrays(store: Store, key: str) -> dict[str, NDArray[Any]]:
    """The arrays of such a file; nothing is unpickled. IncompleteStoreError when it is gone or damaged: it is made anew."""
    try:
        with np.load(io.BytesIO(store.get(key)), allow_pickle=False) as stored:
            return dict(stored)
    except (FileNotFoundError, BadZipFile, ValueError, KeyError, EOFError) as error:
        failure = IncompleteStoreError(f"{store.place}: {key} is gone or damaged ({error}). Run again: it is made anew.")
        failure.damaged = (store.place, key)
        raise failure from None
