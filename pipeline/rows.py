"""The row table of a tensor: which rows its pool holds, who uses them, and how each is made. Pure.

A channel's groups *are* the sets of experts that use one row. Rows are shared within one channel only: by experts
merged in one group, or by exact rows with equal source bits, so every file offset is known before anything is merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.kernels.forms import COMBINED, COPY_BASE, COPY_EXPERT
from storage.parts import arrays_to_bytes, read_arrays
from storage.stores import Store


class Kind(IntEnum):
    """How a pool row is made."""

    EXACT = COPY_EXPERT
    """A copy of its first user's row."""
    MERGED = COMBINED
    """Base plus the combined deltas of its users."""
    BASE = COPY_BASE
    """A copy of the base's row."""


@dataclass(frozen=True)
class RowTable:
    """The pool rows of one tensor, sorted by (set of users, channel)."""

    users: NDArray[np.uint64]
    """(R,) bit n set: expert n, in order of name, uses the row."""
    channel: NDArray[np.int32]
    """(R,)"""
    kind: NDArray[np.uint8]
    """(R,) see Kind."""

    def __len__(self) -> int:
        return len(self.users)

    def indices(self, expert: int, rows: int) -> NDArray[np.int32]:
        """(rows,) int32: the pool row of each of the expert's channels."""
        mine = np.flatnonzero(self.users >> np.uint64(expert) & np.uint64(1))
        out = np.full(rows, -1, np.int32)
        out[self.channel[mine]] = mine
        return out

    def spans(self) -> list[tuple[int, int, int]]:
        """(users, start, stop) of the runs of rows with equal users."""
        starts = np.flatnonzero(np.r_[True, self.users[1:] != self.users[:-1]])
        stops = np.r_[starts[1:], len(self.users)]
        return [(int(self.users[a]), int(a), int(b)) for a, b in zip(starts, stops, strict=True)]

    def save(self, folder: Store, tensor: str) -> None:
        """Write the table of a tensor."""
        folder.put(table_key(tensor), arrays_to_bytes({"users": self.users, "channel": self.channel, "kind": self.kind}))

    @classmethod
    def load(cls, folder: Store, tensor: str) -> RowTable:
        """Read the table of a tensor."""
        stored = read_arrays(folder, table_key(tensor))
        return cls(stored["users"], stored["channel"], stored["kind"])


def table_key(tensor: str) -> str:
    """The file of a tensor's row table."""
    return f"{tensor}.npz"


def first_equal(digests: Sequence[NDArray[Any] | None], rows: int) -> NDArray[np.int16]:
    """(rows, N) int16: per channel and expert the first expert with the same row bits; -1 where it has no such row.

    ``digests``: per expert (its rows, 16) uint8, or None when it does not have the tensor.
    """
    out = np.full((rows, len(digests)), -1, np.int16)
    for n, mine in enumerate(digests):
        if mine is None:
            continue
        out[: len(mine), n] = n
        for m in reversed(range(n)):
            other = digests[m]
            if other is not None:
                shared = min(len(mine), len(other))
                same = (mine[:shared] == other[:shared]).all(axis=1)
                out[:shared, n][same] = out[:shared, m][same]
    return out


def _keys(
    labels: NDArray[np.integer[Any]], equal: NDArray[np.int16], zero: NDArray[np.bool_], keep: NDArray[np.bool_]
) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """(rows, N) what experts that share a row have in common, -1 where an expert has none, and how the row is made."""
    rows, count = equal.shape
    present = equal >= 0
    key = np.where(present, equal, -1).astype(np.int32)
    kind = np.full((rows, count), Kind.EXACT, np.uint8)
    for n in range(count):
        same = (labels == labels[:, n : n + 1]) & present & present[:, n : n + 1]
        identical = np.where(same, equal == equal[:, n : n + 1], True).all(axis=1)
        unchanged = np.where(same, zero, True).all(axis=1)
        grouped = present[:, n] & ~(identical & keep)
        key[grouped, n] = count + labels[grouped, n].astype(np.int32)
        kind[grouped, n] = np.where(unchanged, Kind.BASE, Kind.MERGED)[grouped]
    return key, kind


def row_counts(
    labels: NDArray[np.integer[Any]], equal: NDArray[np.int16], *, zero: NDArray[np.bool_], keep: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """(rows,) how many pool rows every channel of ``build_table`` would have."""
    key = np.sort(_keys(labels, equal, zero, keep)[0], axis=1)
    fresh = np.ones_like(key, bool)
    fresh[:, 1:] = key[:, 1:] != key[:, :-1]
    found: NDArray[np.int64] = (fresh & (key >= 0)).sum(axis=1)
    return found


def build_table(
    labels: NDArray[np.integer[Any]], equal: NDArray[np.int16], *, zero: NDArray[np.bool_], keep: NDArray[np.bool_]
) -> RowTable:
    """The row table from a grouping.

    ``labels``: (rows, N) group of each expert per channel; ``equal``: see ``first_equal``; ``zero``: (rows, N) whether
    the expert's row is the base's; ``keep``: (rows,) whether a group whose members' bits are equal (one expert, or
    several with the same row) keeps the exact row. A group of zero deltas is the base's row.
    """
    rows, count = equal.shape
    present = equal >= 0
    key, kind = _keys(labels, equal, zero, keep)
    users = np.zeros((rows, count), np.uint64)
    for m in range(count):
        bit = np.uint64(1 << m)
        users |= np.where((key == key[:, m : m + 1]) & present & present[:, m : m + 1], bit, np.uint64(0))
    leads = np.zeros((rows, count), bool)
    for n in range(count):
        lower = users[:, n] & np.uint64((1 << n) - 1)
        leads[:, n] = present[:, n] & (lower == 0)
    channel, who = np.nonzero(leads)
    sets, kinds = users[channel, who], kind[channel, who]
    order = np.lexsort((channel, sets))
    return RowTable(sets[order], channel[order].astype(np.int32), kinds[order])
