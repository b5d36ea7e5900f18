"""How a query becomes the numbers a linear router reads: hashed n-grams of characters and words, with numpy alone.

A text is cut, its white space folded, and put between two blanks. Its features are the buckets that its n-grams of
characters and its words fall into; how often does not count, only whether (better on held-out queries than counts or their
logarithms). All is arithmetic on whole numbers, so a text has the same features on every machine. Training uses this very
function: what was trained is what is served.

The hash of code points c1, c2, … is the top ``bits`` bits of s + a1 (c1 + 1) + a2 (c2 + 1) + … modulo 2^64: the multilinear
family, in which two different n-grams share a bucket no more often than at random. s and a1, a2, … are outputs of SplitMix64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_CHARACTERS = 4096
"""What of a text is read. A query's domain shows in its beginning, and a text of megabytes must not cost seconds."""
WORD_CHARACTERS = 32
"""What of a word is read: some writing has no blanks, and a line of it would be one word."""
MOST_BITS, LONGEST = 24, 8
"""Bounds of a specification. 32 is the most bits for which the hash's guarantee holds."""

SEPARATORS = (
    (0x00, 0x30), (0x3A, 0x41), (0x5B, 0x5F), (0x60, 0x61), (0x7B, 0xAA), (0xAB, 0xB5), (0xB6, 0xBA), (0xBB, 0xC0),
    (0x2000, 0x2070), (0x2190, 0x2C00), (0x3000, 0x3005), (0x3008, 0x3021), (0xFF00, 0xFF10), (0xFF1A, 0xFF21),
)  # fmt: skip
"""Code points from, to (exclusive) that end a word: a fixed list, where Unicode's classes change from release to release."""
_PLANE = 1 << 16


def split_mix(count: int, seed: int) -> list[int]:
    """The first outputs of the generator SplitMix64. Pure."""
    found = []
    for step in range(1, count + 1):
        mixed = (seed + step * 0x9E3779B97F4A7C15) % 2**64
        mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
        found.append(mixed ^ (mixed >> 31))
    return found


def _constants(seed: int, count: int) -> tuple[np.uint64, NDArray[np.uint64]]:
    salt, *multipliers = split_mix(1 + count, seed)
    return np.uint64(salt), np.array(multipliers, np.uint64)


_GRAM_SALT, _GRAM = _constants(1, LONGEST)
_WORD_SALT, _WORD = _constants(2, WORD_CHARACTERS)
_WORD = np.append(_WORD, np.uint64(0))  # what lies behind the characters that are read counts nothing


def _in_words() -> NDArray[np.bool_]:
    """Per code point plus one whether it belongs to a word; what is beyond the first plane shares the last entry."""
    table = np.ones(_PLANE + 1, bool)
    table[0] = False
    for first, end in SEPARATORS:
        table[first + 1 : end + 1] = False
    return table


_IN_WORDS = _in_words()


@dataclass(frozen=True)
class FeatureSpec:
    """What the features of a text are. ValueError when out of bounds."""

    bits: int = 17
    """There are 2^bits buckets."""
    shortest: int = 1
    longest: int = 4
    """Lengths of the n-grams of characters."""
    words: bool = True
    """Whether whole words are features too."""

    def __post_init__(self) -> None:
        numbers = (self.bits, self.shortest, self.longest)
        if not all(type(number) is int for number in numbers) or type(self.words) is not bool:
            raise ValueError(f"features: expected whole numbers, and words as true or false, got {self}")
        if not (1 <= self.bits <= MOST_BITS and 1 <= self.shortest <= self.longest <= LONGEST):
            raise ValueError(f"features: expected bits of 1 to {MOST_BITS} and n-grams of 1 to {LONGEST}, got {self}")

    @property
    def size(self) -> int:
        """Number of buckets."""
        return 1 << self.bits


@dataclass(frozen=True)
class Features:
    """The buckets of several texts, one text after the other; of a text ascending, each once."""

    buckets: NDArray[np.int64]
    bounds: NDArray[np.int64]
    """(texts + 1): text i has buckets[bounds[i]:bounds[i + 1]]."""

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @property
    def counts(self) -> NDArray[np.int64]:
        """Number of buckets of every text."""
        return np.diff(self.bounds)


def features(texts: Sequence[str], spec: FeatureSpec) -> Features:
    """The features of texts, whatever is in them. Pure; memory grows with the characters of all texts, some 100 bytes each."""
    if not texts:
        return Features(np.zeros(0, np.int64), np.zeros(1, np.int64))
    padded = [f" {' '.join(text[:MAX_CHARACTERS].split())} " for text in texts]
    ends = np.cumsum([len(text) + 1 for text in padded])
    raw = "\0".join([*padded, ""]).encode("utf-32-le", "surrogatepass")
    points = np.frombuffer(raw, np.dtype("<u4")).astype(np.uint64)
    points += np.uint64(1)
    points[ends - 1] = 0  # between two texts: nothing that a text may hold
    rows = np.repeat(np.arange(len(texts), dtype=np.int64) << spec.bits, np.diff(ends, prepend=0))
    keys = _gram_keys(points, rows, spec)
    if spec.words:
        keys.append(_word_keys(points, rows, spec))
    found = np.concatenate(keys)
    found.sort()
    is_first = np.empty(len(found), bool)
    is_first[:1] = True
    np.not_equal(found[1:], found[:-1], out=is_first[1:])
    found = found[is_first]
    bounds = np.searchsorted(found, np.arange(len(texts) + 1, dtype=np.int64) << spec.bits)
    found &= spec.size - 1
    return Features(found, bounds)


def _buckets(hashes: NDArray[np.uint64], spec: FeatureSpec) -> NDArray[np.int64]:
    return (hashes >> np.uint64(64 - spec.bits)).view(np.int64)


def _gram_keys(points: NDArray[np.uint64], rows: NDArray[np.int64], spec: FeatureSpec) -> list[NDArray[Any]]:
    """Text and bucket of every n-gram of characters, an array per length."""
    keys = []
    is_inside = points != 0
    inside = is_inside
    hashes = points * _GRAM[0] + _GRAM_SALT
    for length in range(1, spec.longest + 1):
        if length > 1:
            hashes = hashes[:-1] + points[length - 1 :] * _GRAM[length - 1]
            inside = inside[:-1] & is_inside[length - 1 :]
        if length >= spec.shortest:
            found = _buckets(hashes, spec)
            found += rows[: len(found)]
            keys.append(found[inside])
    return keys


def _word_keys(points: NDArray[np.uint64], rows: NDArray[np.int64], spec: FeatureSpec) -> NDArray[np.int64]:
    """Text and bucket of every word."""
    in_words = _IN_WORDS[np.minimum(points, np.uint64(_PLANE))]
    places = np.flatnonzero(in_words)
    is_start = ~in_words[places - 1]  # before every text's first word there is a blank
    starts = np.flatnonzero(is_start)
    if not len(starts):
        return np.zeros(0, np.int64)
    within = np.arange(len(places)) - np.repeat(starts, np.diff(starts, append=len(places)))
    terms = points[places] * _WORD[np.minimum(within, WORD_CHARACTERS)]
    return _buckets(np.add.reduceat(terms, starts) + _WORD_SALT, spec) + rows[places[starts]]
