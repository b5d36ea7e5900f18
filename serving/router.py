"""Router inference: from a query to a probability per expert, with numpy only.

The linear router scores hashed n-grams. Features are defined here, and training uses the same function, so what was
trained is what is served. MurmurHash3 of UTF-8 bytes is the same on every machine.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mmh3
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

from storage.artifact import Artifact
from storage.errors import ArtifactError
from storage.local_store import LocalStore
from storage.stores import Store

ROUTER_FORMAT = 1
CONFIG = "router.json"
WEIGHTS = "router.safetensors"
MAX_CHARACTERS = 4096
"""A query's domain shows in its beginning; a text of megabytes must not cost seconds."""
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class FeatureSpec:
    """How a text becomes a sparse vector."""

    size: int = 1 << 15
    """Number of hash buckets."""
    shortest: int = 1
    longest: int = 4
    """Lengths of character n-grams; whole words are features too."""


def features(text: str, spec: FeatureSpec) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """Bucket indices, ascending, and values of an L2-normalised sparse vector of signed n-gram counts. Pure."""
    padded = f" {' '.join(text[:MAX_CHARACTERS].split())} "
    grams: Counter[str] = Counter()
    for length in range(spec.shortest, spec.longest + 1):
        grams.update(padded[i : i + length] for i in range(len(padded) - length + 1))
    grams.update(f"\x00{word}" for word in _WORD.findall(padded))  # a prefix no n-gram has keeps words apart
    buckets: dict[int, float] = {}
    for gram, count in grams.items():
        hashed = mmh3.hash(gram.encode("utf-8", "replace"))
        bucket = abs(hashed) % spec.size
        buckets[bucket] = buckets.get(bucket, 0.0) + (count if hashed >= 0 else -count)
    indices = np.array(sorted(buckets), np.int32)
    values = np.array([buckets[int(i)] for i in indices], np.float64)
    norm = float(np.sqrt((values * values).sum()))
    return indices, values / norm if norm else values


class LinearRouter:
    """One-vs-rest logistic scores over hashed n-grams."""

    def __init__(self, experts: Sequence[str], spec: FeatureSpec, weights: NDArray[Any], bias: NDArray[Any]) -> None:
        self.experts = tuple(experts)
        self.spec = spec
        self.weights = weights
        self.bias = bias

    def route(self, query: str) -> dict[str, float]:
        """Probability per expert; they sum to 1. One-vs-rest sigmoids, normalised."""
        indices, values = features(query, self.spec)
        scores = self.weights[:, indices].astype(np.float64) @ values + self.bias
        sigmoids = 1 / (1 + np.exp(-np.clip(scores, -500, 500)))
        shares = sigmoids / sigmoids.sum()
        return dict(zip(self.experts, map(float, shares), strict=True))


def load_router(folder: Path) -> LinearRouter:
    """The router of a local folder with ``router.json`` and ``router.safetensors``."""
    return _router_of(LocalStore(folder))


def _router_of(folder: Store) -> LinearRouter:
    try:
        config = json.loads(folder.get(CONFIG))
        found = config.get("kind"), config.get("format")
        if found != ("linear", ROUTER_FORMAT):
            raise ArtifactError(
                f"{folder.place}/{CONFIG}: expected a linear router of format {ROUTER_FORMAT}, got kind {found[0]!r} of format "
                f"{found[1]!r}. Use a matching release."
            )
        tensors = load(folder.get(WEIGHTS))
        return LinearRouter(config["experts"], FeatureSpec(**config["features"]), tensors["weights"], tensors["bias"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"{folder.place}: its router is damaged ({error!r}). Pull or build the artifact again.") from None


def artifact_router(artifact: Artifact) -> LinearRouter:
    """The router of an artifact; ArtifactError when it has none."""
    if f"router/{CONFIG}" not in artifact.manifest.files:
        if artifact.manifest.parent:
            raise ArtifactError(f"{artifact.place} has no router: it holds one expert alone. Pull the whole artifact.")
        raise ArtifactError(f"{artifact.place} has no router. Build it with router.kind: linear in the recipe.")
    return _router_of(artifact.store.under("router"))
