"""From scores to an expert: shares that sum to 1, the best ones, the fallback, and when to stay with what is loaded. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

BASE = "base"
"""The name of the base model, as a fallback."""
Link = Literal["sigmoid", "softmax"]
"""How scores become probabilities: one yes or no per expert, or one choice among all."""


@dataclass(frozen=True)
class Choice:
    """What should answer a query."""

    expert: str
    """An expert's name, or ``base``."""
    shares: dict[str, float]
    is_fallback: bool
    """Whether no expert's kind of query was recognised."""


def log_shares(logits: NDArray[np.float64], link: Link, temperature: float) -> NDArray[np.float64]:
    """Logarithms of ``link(logits / temperature)``, normalised so that a row's shares sum to 1. (queries, experts) as given."""
    scaled = logits / temperature
    if link == "sigmoid":
        scaled = -np.logaddexp(0.0, -scaled)
    scaled = scaled - scaled.max(axis=1, keepdims=True)
    return np.asarray(scaled - np.log(np.exp(scaled).sum(axis=1, keepdims=True)), np.float64)


def best_of(shares: Mapping[str, float]) -> str:
    """The expert of the largest share; of equals the first by name."""
    return min(shares, key=lambda name: (-shares[name], name))


def top(shares: Mapping[str, float], count: int) -> list[tuple[str, float]]:
    """The ``count`` largest shares with their experts, largest first; of equals the first by name."""
    return sorted(shares.items(), key=lambda item: (-item[1], item[0]))[:count]


def choose(
    shares: Mapping[str, float],
    thresholds: Mapping[str, float],
    fallback: str | None,
    loaded: str | None = None,
    margin: float = 0.0,
) -> Choice:
    """Whom to give a query of these shares.

    The expert of the largest share, or the fallback, if there is one, where that share lies below the expert's threshold.
    Another expert that is ``loaded`` stays when the best one's share is larger by less than ``margin``: to switch costs time.
    It must reach its own threshold too. Nothing stays in place of the fallback, nor does the base, which has no share.

    ValueError when ``loaded`` is neither an expert nor the base.
    """
    if loaded is not None and loaded not in shares and loaded not in (BASE, fallback):
        raise ValueError(f"loaded: expected {BASE} or one of the experts {', '.join(shares)}, got {loaded!r}")
    best = best_of(shares)
    told = dict(shares)
    if fallback is not None and shares[best] < thresholds.get(best, 0.0):
        return Choice(fallback, told, is_fallback=True)
    if loaded is not None and loaded in shares and shares[best] - shares[loaded] < margin:
        is_trusted = fallback is None or shares[loaded] >= thresholds.get(loaded, 0.0)
        return Choice(loaded if is_trusted else best, told, is_fallback=False)
    return Choice(best, told, is_fallback=False)
