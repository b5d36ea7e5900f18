"""What is measured of a router, from its shares on labelled queries. Pure numpy; nothing here knows a kind of router.

``shares``: (queries, experts), rows that sum to 1; ``labels``: (queries) positions among the experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

BINS = 15
"""Of the calibration error: equal steps of the largest share."""
THRESHOLDS = (*(step / 20 for step in range(20)), 0.99)
"""Of the coverage curve."""
PLACES = 6
"""Decimals of figures that go into router.json: their last bits may differ from machine to machine."""

Floats = NDArray[np.float64]
Labels = NDArray[np.integer[Any]]
Counts = NDArray[np.int64]


def confusion(labels: Labels, chosen: Labels, experts: int) -> Counts:
    """(experts, experts) counts. Rows: the query's expert; columns: the one chosen."""
    pairs = labels.astype(np.int64) * experts + chosen
    return np.bincount(pairs, minlength=experts * experts).reshape(experts, experts)


def accuracy(counts: Counts) -> float | None:
    """Share of right choices; None of no queries."""
    total = int(counts.sum())
    return float(np.trace(counts)) / total if total else None


def macro_f1(counts: Counts) -> float | None:
    """Mean over the experts of 2 right / (asked + chosen), over those that were asked or chosen; None when none was."""
    both = counts.sum(axis=0) + counts.sum(axis=1)
    known = both > 0
    return float((2 * np.diagonal(counts)[known] / both[known]).mean()) if known.any() else None


def calibration_error(shares: Floats, labels: Labels, bins: int = BINS) -> float | None:
    """Expected calibration error: by how much the largest share misses the share of right choices, over equal bins of it.

    The bins are (0, 1/bins], …, (1 - 1/bins, 1]; each weighs as many queries as it holds. None of no queries.
    """
    if not len(shares):
        return None
    best = shares.max(axis=1)
    is_right = shares.argmax(axis=1) == labels
    places = np.clip(np.ceil(best * bins).astype(np.int64) - 1, 0, bins - 1)
    gaps = np.bincount(places, weights=best - is_right, minlength=bins)
    return float(np.abs(gaps).sum() / len(shares))


def coverage_curve(shares: Floats, labels: Labels, thresholds: Sequence[float] = THRESHOLDS) -> list[dict[str, Any]]:
    """Per threshold the part of the queries whose largest share reaches it, and the accuracy on those; None of none."""
    best = shares.max(axis=1)
    is_right = shares.argmax(axis=1) == labels
    curve = []
    for threshold in thresholds:
        is_covered = best >= threshold
        covered = int(is_covered.sum())
        curve.append(
            {
                "threshold": float(threshold),
                "coverage": covered / len(best) if len(best) else None,
                "accuracy": int(is_right[is_covered].sum()) / covered if covered else None,
            }
        )
    return curve


def auroc(inside: Floats, outside: Floats) -> float | None:
    """Chance that a score from inside is above one from outside, equals counting half: a rank statistic. None without both."""
    if not len(inside) or not len(outside):
        return None
    ordered = np.sort(outside)
    below = np.searchsorted(ordered, inside, "left")
    up_to = np.searchsorted(ordered, inside, "right")
    return float((below + up_to).sum()) / (2 * len(inside) * len(outside))


def by_language(shares: Floats, labels: Labels, languages: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Queries, accuracy and macro F1 of every language, in order of name; "" is a language like any other."""
    chosen = shares.argmax(axis=1)
    found = {}
    named = np.array(languages, dtype=object)
    for language in sorted(set(languages)):
        where = named == language
        counts = confusion(labels[where], chosen[where], shares.shape[1])
        found[language] = {"queries": int(where.sum()), "accuracy": accuracy(counts), "macro_f1": macro_f1(counts)}
    return found


def rounded(value: Any) -> Any:
    """A record with its floats rounded to ``PLACES`` decimals, so that machines agree."""
    if isinstance(value, float):
        return round(value, PLACES)
    if isinstance(value, dict):
        return {key: rounded(held) for key, held in value.items()}
    return [rounded(held) for held in value] if isinstance(value, list | tuple) else value
