"""The linear router's features and scores once more, slowly: Python's whole numbers and floats, one n-gram after the other."""

from __future__ import annotations

import math
from collections.abc import Sequence

from serving.features import SEPARATORS, FeatureSpec

MASK = 2**64 - 1
READ = 4096


def split_mix(seed: int, count: int) -> list[int]:
    """SplitMix64, as its author wrote it in C."""
    found, state = [], seed
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        found.append(z ^ (z >> 31))
    return found


def hashed(gram: Sequence[int], seed: int, bits: int) -> int:
    """The bucket of code points."""
    salt, *multipliers = split_mix(seed, 33)
    total = salt + sum(multiplier * (point + 1) for multiplier, point in zip(multipliers, gram, strict=False))
    return (total & MASK) >> (64 - bits)


def words_of(text: str) -> list[str]:
    """Maximal runs of characters that end no word."""
    found, word = [], ""
    for letter in f"{text} ":
        if any(first <= ord(letter) < end for first, end in SEPARATORS):
            found.append(word)
            word = ""
        else:
            word += letter
    return [word for word in found if word]


def buckets(text: str, spec: FeatureSpec) -> list[int]:
    """The buckets of a text, ascending, each once."""
    padded = f" {' '.join(text[:READ].split())} "
    found = set()
    for length in range(spec.shortest, spec.longest + 1):
        for start in range(len(padded) - length + 1):
            found.add(hashed([ord(letter) for letter in padded[start : start + length]], 1, spec.bits))
    if spec.words:
        found |= {hashed([ord(letter) for letter in word[:32]], 2, spec.bits) for word in words_of(padded)}
    return sorted(found)


def logits(
    text: str, spec: FeatureSpec, weights: Sequence[Sequence[int]], scale: Sequence[float], bias: Sequence[float]
) -> list[float]:
    """Scores of a text; Python's floats are IEEE doubles, and every operation rounds once."""
    found = buckets(text, spec)
    sums = [sum(weights[bucket][expert] for bucket in found) for expert in range(len(scale))]
    norm = math.sqrt(float(max(1, len(found))))
    return [float(total) * one / norm + offset for total, one, offset in zip(sums, scale, bias, strict=True)]
