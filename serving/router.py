"""Router inference: from a query to a share per expert.

A *scorer* gives every expert a score, and a ``Router`` makes shares of them and chooses. The linear router's scorer is here and
needs numpy alone; the BERT router's is in ``serving.encoder``, imported only where a router is of that kind.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, get_args, overload

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

from serving import choice
from serving.choice import BASE, Choice, Link
from serving.features import FeatureSpec, features
from storage.artifact import Artifact
from storage.errors import ArtifactError
from storage.layout import ROUTER_FORMAT
from storage.local_store import LocalStore
from storage.stores import Store

CONFIG = "router.json"
WEIGHTS = "router.safetensors"
BATCH = 256
"""Texts whose features are held at once."""


class Scorer(Protocol):
    """What gives every expert a score for a text."""

    experts: tuple[str, ...]
    """Sorted by name: the order of columns."""

    @property
    def link(self) -> Link:
        """How its scores become probabilities."""
        ...

    def logits(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """(texts, experts)."""
        ...


class LinearScorer:
    """One logistic score per expert over a text's hashed n-grams.

    A score is ``bias + scale · (sum of the whole-number weights of the text's buckets) / sqrt(number of buckets)``. Whole
    numbers add up to the same in any order, and the other four operations are those of IEEE 754, each rounded once: the scores
    of a text have the same bits on every machine. Shares go through exp and log, whose last bit is not the same everywhere.
    """

    link: Link = "sigmoid"

    def __init__(
        self,
        experts: Sequence[str],
        spec: FeatureSpec,
        weights: NDArray[np.int16],
        scale: NDArray[np.float64],
        bias: NDArray[np.float64],
    ) -> None:
        """``weights``: (buckets, experts) int16; ``scale`` and ``bias``: (experts) float64. ValueError when they do not fit."""
        shapes = weights.shape, scale.shape, bias.shape
        fits = shapes == ((spec.size, len(experts)), (len(experts),), (len(experts),))
        types = [array.dtype.name for array in (weights, scale, bias)]
        if not fits or types != ["int16", "float64", "float64"] or not (np.isfinite(scale).all() and np.isfinite(bias).all()):
            raise ValueError(f"weights of another shape or type than {spec} of {len(experts)} experts has, or not finite")
        self.experts = tuple(experts)
        self.spec = spec
        self.weights = weights
        self.scale = scale
        self.bias = bias

    def logits(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """(texts, experts) float64, the same bits on every machine, and for a text alone or among others."""
        found = np.empty((len(texts), len(self.experts)), np.float64)
        for start in range(0, len(texts), BATCH):
            rows = features(texts[start : start + BATCH], self.spec)
            filled = np.flatnonzero(rows.counts)
            sums = np.zeros((len(rows), len(self.experts)), np.int64)
            if len(filled):
                taken = self.weights.take(rows.buckets, axis=0)
                sums[filled] = np.add.reduceat(taken, rows.bounds[filled], axis=0, dtype=np.int64)
            scores = sums * self.scale
            scores /= np.sqrt(np.maximum(rows.counts, 1).astype(np.float64))[:, None]
            found[start : start + len(rows)] = scores + self.bias
        return found


class Router:
    """Chooses an expert per query. Safe to use from several threads where its scorer is; both kinds are."""

    def __init__(
        self,
        scorer: Scorer,
        temperature: float = 1.0,
        thresholds: Mapping[str, float] | None = None,
        fallback: str | None = None,
    ) -> None:
        """``thresholds``: share per expert below which the fallback, ``base`` or an expert, is chosen. ValueError if wrong."""
        if not 0 < temperature < np.inf:
            raise ValueError(f"temperature: expected a number above 0, got {temperature}")
        self.scorer = scorer
        self.experts = tuple(scorer.experts)
        self.temperature = float(temperature)
        self.thresholds = dict.fromkeys(self.experts, 0.0) | {name: float(t) for name, t in (thresholds or {}).items()}
        self.fallback = fallback
        if strange := sorted(self.thresholds.keys() - set(self.experts)):
            raise ValueError(f"thresholds: there is no expert {', '.join(strange)}")
        if not all(0 <= threshold <= 1 for threshold in self.thresholds.values()):
            raise ValueError(f"thresholds: expected shares of 0 to 1, got {self.thresholds}")
        if fallback is not None and fallback not in (BASE, *self.experts):
            raise ValueError(f"fallback: expected {BASE} or one of the experts {', '.join(self.experts)}, got {fallback!r}")

    def probabilities(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """(texts, experts) float64: ``link(logits / temperature)``, normalised; every row sums to 1."""
        return np.exp(choice.log_shares(self.scorer.logits(texts), self.scorer.link, self.temperature))

    @overload  # a text is a sequence of texts to the type checker, and never meant as one
    def route(self, query: str) -> dict[str, float]: ...  # type: ignore[overload-overlap]
    @overload
    def route(self, query: Sequence[str]) -> list[dict[str, float]]: ...
    def route(self, query: str | Sequence[str]) -> dict[str, float] | list[dict[str, float]]:
        """Share per expert, in order of name, of one query or of each of several. They sum to 1."""
        if isinstance(query, str):
            return self.route([query])[0]
        return [dict(zip(self.experts, row, strict=True)) for row in self.probabilities(query).tolist()]

    def choose(self, query: str | Mapping[str, float], loaded: str | None = None, margin: float = 0.0) -> Choice:
        """Whom to give a query, or one of known shares: see ``serving.choice.choose``."""
        shares = self.route(query) if isinstance(query, str) else query
        return choice.choose(shares, self.thresholds, self.fallback, loaded, margin)

    def top(self, query: str | Mapping[str, float], count: int) -> list[tuple[str, float]]:
        """The ``count`` likeliest experts with their shares, likeliest first."""
        return choice.top(self.route(query) if isinstance(query, str) else query, count)


def load_router(folder: Path) -> Router:
    """The router of a local folder with ``router.json`` and ``router.safetensors``."""
    return _router_of(LocalStore(folder))


def _router_of(folder: Store) -> Router:
    try:
        config = json.loads(folder.get(CONFIG))
        kind, number = config.get("kind"), config.get("format")
        if kind not in ("linear", "bert") or number != ROUTER_FORMAT:
            raise ArtifactError(
                f"{folder.place}/{CONFIG}: expected a linear or bert router of format {ROUTER_FORMAT}, got kind {kind!r} of "
                f"format {number!r}. Use a matching release, or train the router anew."
            )
        scorer = _linear(folder, config) if kind == "linear" else _encoder(folder, config)
        if config["link"] not in get_args(Link) or config["link"] != scorer.link:
            raise ValueError(f"link: expected {scorer.link}, got {config['link']!r}")
        return Router(scorer, config["temperature"], config["thresholds"], config["fallback"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"{folder.place}: its router is damaged ({error!r}). Pull or build the artifact again.") from None


def _linear(folder: Store, config: Mapping[str, Any]) -> LinearScorer:
    tensors = load(folder.get(WEIGHTS))
    spec = FeatureSpec(**config["features"])
    return LinearScorer(config["experts"], spec, tensors["weights"], tensors["scale"], tensors["bias"])


def _encoder(folder: Store, config: Mapping[str, Any]) -> Scorer:
    from serving.encoder import load_encoder

    return load_encoder(folder, config)


def artifact_router(artifact: Artifact) -> Router:
    """The router of an artifact; ArtifactError when it has none."""
    if f"router/{CONFIG}" not in artifact.manifest.files:
        if artifact.manifest.parent:
            raise ArtifactError(f"{artifact.place} has no router: it holds one expert alone. Pull the whole artifact.")
        raise ArtifactError(f"{artifact.place} has no router. Build it with router.kind: linear in the recipe.")
    return _router_of(artifact.store.under("router"))
