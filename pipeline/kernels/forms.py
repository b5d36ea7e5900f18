"""What a merge of some rows is told, in arrays and numbers alone, so that compiled code and torch read the same."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

COPY_EXPERT, COMBINED, COPY_BASE = 0, 1, 2
"""How a pool row is made: its first user's exact row, base plus combined deltas, the base's exact row."""

WHOLE, MASK, TRIM = 0, 1, 2
"""How a delta is pruned: not at all, by random masks, by size."""

SUM, ELECT = 0, 1
"""How deltas are combined: added, or added where they agree with the sign that has more mass."""


def members(users: int) -> list[int]:
    """Positions of the experts in a set of users."""
    return [n for n in range(users.bit_length()) if users >> n & 1]


class PoolRows(NamedTuple):
    """The pool rows of a slice of channels, in order of their channel."""

    starts: NDArray[np.int64]
    """(channels + 1,): rows [starts[c], starts[c + 1]) belong to channel c of the slice."""
    users: NDArray[np.uint64]
    """(rows,) bit n set: expert n uses the row."""
    kinds: NDArray[np.uint8]
    """(rows,) COPY_EXPERT, COMBINED or COPY_BASE."""
    places: NDArray[np.int64]
    """(rows,) where the row stands in the output."""
    factors: NDArray[np.float32]
    """(rows,) what the combined delta is multiplied by."""


class Pruning(NamedTuple):
    """What is done to every expert's delta first."""

    kind: int
    keys: NDArray[np.uint32]
    """(experts, 2) keys of the mask generator."""
    limit: int
    """Entries whose random word is below are kept: floor(density * 2^32)."""
    scales: NDArray[np.float32]
    """(experts,) what kept entries are multiplied by."""
    thresholds: NDArray[np.float32]
    """(channels or 1, experts): entries of this size and above are kept."""
    first: int
    """Index of the slice's first element in its tensor, row * width + column."""


class Combining(NamedTuple):
    """How the members of a group become one delta."""

    kind: int
    mean: bool
    """For elected signs: divide by the weights of the members that agree, entry by entry."""
    weights: NDArray[np.float32]
    """(channels or 1, experts)"""


def in_order_of_channel(
    channels: NDArray[Any], users: NDArray[np.uint64], kinds: NDArray[np.uint8], factors: NDArray[np.float32], count: int
) -> PoolRows:
    """Pool rows that are given in the order of the output, ``channels`` (rows,) counted from the slice's first."""
    order = np.argsort(channels, kind="stable")
    starts = np.zeros(count + 1, np.int64)
    np.cumsum(np.bincount(channels, minlength=count), out=starts[1:])
    return PoolRows(starts, users[order], kinds[order], order.astype(np.int64), factors[order])


def with_keys(keys: list[tuple[int, int]]) -> NDArray[np.uint32]:
    """(experts, 2) keys as an array."""
    return np.array(keys, np.uint32).reshape(len(keys), 2)
