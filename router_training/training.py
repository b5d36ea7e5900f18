"""From prepared queries to a router in a folder, measured: train, calibrate, measure, save."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from router_training import calibration, measures
from router_training.calibration import Threshold
from router_training.data import Prepared
from router_training.keeping import Kept
from router_training.parts import PreparedQueries, each_part
from serving.choice import log_shares
from serving.router import CONFIG, WEIGHTS, LinearScorer, Router, Scorer
from storage.atomic import canonical_json
from storage.layout import ROUTER_FORMAT

TIMED_QUERIES, TIMED_SECONDS = 500, 10.0
"""Most validation queries, and seconds, that latency is measured over, one at a time and as a batch."""

Tell = Callable[[str], None]
Floats = NDArray[np.float64]


class RouterSettings(Protocol):
    """What of a recipe's router section is read here; its data and its encoder's settings are read where they are used."""

    @property
    def kind(self) -> str: ...
    @property
    def threshold(self) -> Threshold: ...
    @property
    def fallback(self) -> str | None: ...


@dataclass(frozen=True)
class Scored:
    """Queries with what the scorer says of them."""

    logits: Floats
    labels: NDArray[np.int32]
    languages: tuple[str, ...]
    sample: tuple[str, ...]
    """The first texts."""


def scored(scorer: Scorer, paths: Sequence[Path]) -> Scored:
    """All queries of the parts, scored part by part: texts are not kept, but for a sample."""
    logits, labels = [np.zeros((0, len(scorer.experts)))], [np.zeros(0, np.int32)]
    languages: list[str] = []
    sample: list[str] = []
    for rows in each_part(paths):
        logits.append(scorer.logits(rows.texts))
        labels.append(rows.labels)
        languages += rows.languages
        sample += rows.texts[: max(0, TIMED_QUERIES - len(sample))]
    return Scored(np.concatenate(logits), np.concatenate(labels), tuple(languages), tuple(sample))


def measured(router: Router, inside: Scored, outside: Scored) -> dict[str, Any]:
    """What router.json says of validation, and of queries of no expert's kind; no time is in it.

    ``calibration_error`` is told before and after the temperature. ``at_thresholds``, where there is a fallback: the share of
    queries that an expert was trusted with, the accuracy on those, and the share of queries of no expert's kind that were.
    """
    link = router.scorer.link
    shares = np.exp(log_shares(inside.logits, link, router.temperature))
    beyond = np.exp(log_shares(outside.logits, link, router.temperature))
    counts = measures.confusion(inside.labels, shares.argmax(axis=1), len(router.experts))
    raw = np.exp(log_shares(inside.logits, link, 1.0))
    found: dict[str, Any] = {
        "queries": len(inside.labels),
        "accuracy": measures.accuracy(counts),
        "macro_f1": measures.macro_f1(counts),
        "confusion": counts.tolist(),
        "calibration_error": {
            "before": measures.calibration_error(raw, inside.labels),
            "after": measures.calibration_error(shares, inside.labels),
        },
        "coverage": measures.coverage_curve(shares, inside.labels),
        "by_language": measures.by_language(shares, inside.labels, inside.languages),
        "outside_queries": len(outside.labels),
        "auroc": measures.auroc(shares.max(axis=1), beyond.max(axis=1)),
    }
    if router.fallback is not None:
        found["at_thresholds"] = _trusted(router, shares, inside.labels, beyond)
    rounded: dict[str, Any] = measures.rounded(found)
    return rounded


def _trusted(router: Router, shares: Floats, labels: NDArray[np.int32], beyond: Floats) -> dict[str, Any]:
    bounds = np.array([router.thresholds[name] for name in router.experts])

    def passes(given: Floats) -> NDArray[np.bool_]:
        return np.asarray(given.max(axis=1) >= bounds[given.argmax(axis=1)])

    inside, outside = passes(shares), passes(beyond)
    is_right = shares.argmax(axis=1) == labels
    return {
        "coverage": float(inside.mean()) if len(inside) else None,
        "accuracy": float(is_right[inside].mean()) if inside.any() else None,
        "outside": float(outside.mean()) if len(outside) else None,
    }


def latency(router: Router, texts: Sequence[str]) -> dict[str, Any]:
    """Microseconds per query, one at a time (median and 99th percentile), and queries per second, so and as a batch.

    Measured in this process, after warming up on the first of the texts.
    """
    if not texts:
        return {}
    for text in texts[:10]:
        router.route(text)
    spent: list[float] = []
    while len(spent) < len(texts) and sum(spent) < TIMED_SECONDS:
        started = time.perf_counter()
        router.route(texts[len(spent)])
        spent.append(time.perf_counter() - started)
    batch = list(texts[: len(spent)])
    started = time.perf_counter()
    router.route(batch)
    together = time.perf_counter() - started
    p50, p99 = np.quantile(spent, [0.5, 0.99]).tolist()
    return {
        "queries": len(spent),
        "p50_us": round(1e6 * p50, 1),
        "p99_us": round(1e6 * p99, 1),
        "one_at_a_time_per_s": round(len(spent) / sum(spent), 1),
        "batch_per_s": round(len(batch) / together, 1),
    }


def save(router: Router, folder: Path, card: Mapping[str, Any], validation: Mapping[str, Any]) -> None:
    """Write ``router.json`` and ``router.safetensors``, and what an encoder needs beside them.

    ``card`` and ``validation`` hold no time and nothing of the machine: the bytes are part of the artifact's version.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scorer = router.scorer
    config: dict[str, Any] = {
        **card,
        "format": ROUTER_FORMAT,
        "experts": list(router.experts),
        "link": scorer.link,
        "temperature": router.temperature,
        "thresholds": router.thresholds,
        "fallback": router.fallback,
        "validation": validation,
    }
    if isinstance(scorer, LinearScorer):
        from safetensors.numpy import save_file

        spec = scorer.spec
        described = {"bits": spec.bits, "shortest": spec.shortest, "longest": spec.longest, "words": spec.words}
        save_file({"weights": scorer.weights, "scale": scorer.scale, "bias": scorer.bias}, folder / WEIGHTS)
        config |= {"kind": "linear", "features": described}
    else:
        from serving.encoder import EncoderScorer, save_encoder

        assert isinstance(scorer, EncoderScorer), "there are two kinds of scorers"
        save_encoder(scorer, folder)
        config |= {"kind": "bert", "encoder": scorer.describe()}
    (folder / CONFIG).write_bytes(canonical_json(config))


def calibrated(scorer: Scorer, inside: Scored, threshold: Threshold, fallback: str | None) -> Router:
    """The router of a scorer, with the temperature and the thresholds that validation gives."""
    temperature = calibration.fit_temperature(inside.logits, inside.labels, scorer.link)
    shares = np.exp(log_shares(inside.logits, scorer.link, temperature))
    thresholds = calibration.thresholds_of(threshold, shares, inside.labels, scorer.experts)
    return Router(scorer, temperature, thresholds, fallback)


def _silent(line: str) -> None:
    """Says nothing."""


@dataclass(frozen=True)
class Training:
    """A router to train, wherever that is. Small, and it pickles."""

    section: Any
    """A recipe's router section, its data sets pinned."""
    seed: int
    prepared: Prepared
    kept: Kept | None = None
    """For checkpoints, where ``work`` may be lost with the machine."""
    encoder: Mapping[str, str] = field(default_factory=dict)
    """sha256 of the files of an encoder that lies on this machine."""


def train_router(
    training: Training, work: Path, folder: Path, tell: Tell = _silent, devices: int | None = None
) -> dict[str, Any]:
    """Train, calibrate and measure a router in this process, and write it into ``folder``; the record for the manifest.

    ``work`` is a folder of this training's own, where a run that was killed goes on. ``tell`` receives a line now and then.
    Errors are those of ``linear.train`` and ``bert.train``.
    """
    started = time.perf_counter()
    scorer = _trained(training, work, tell, devices)
    trained = time.perf_counter()
    record = finish(scorer, training.prepared, training.section, folder)
    seconds = {"train": trained - started, "measure": time.perf_counter() - trained}
    return {**record, "seconds": {name: round(spent, 3) for name, spent in seconds.items()}}


def _trained(training: Training, work: Path, tell: Tell, devices: int | None) -> Scorer:
    section, prepared, seed = training.section, training.prepared, training.seed
    if section.kind == "linear":
        from router_training import linear

        return linear.train(prepared, seed, tell=tell)
    from router_training import bert

    return bert.train(prepared, section, seed, work / "bert", tell, devices=devices, kept=training.kept)


def finish(scorer: Scorer, prepared: PreparedQueries, settings: RouterSettings, folder: Path) -> dict[str, Any]:
    """Calibrate and measure a trained scorer, and save its router; the record without what training took."""
    inside, outside = (scored(scorer, prepared.parts(which)) for which in ("validation", "outside"))
    router = calibrated(scorer, inside, settings.threshold, settings.fallback)
    validation = measured(router, inside, outside)
    save(router, folder, prepared.card, validation)
    told = {key: prepared.card[key] for key in ("sources", "outside", "counts", "split") if key in prepared.card}
    return {
        "kind": settings.kind,
        "experts": list(router.experts),
        **validation,
        "temperature": router.temperature,
        "thresholds": router.thresholds,
        "fallback": router.fallback,
        "latency": latency(router, inside.sample),
        "bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        **told,
    }
