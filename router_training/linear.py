"""The linear router: hashed n-grams and one-vs-rest logistic regression, trained block by block with dask-ml.

Assumption (arXiv 2412.15283, Eq. 6): an expert is best on queries from its own fine-tuning data.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import scipy.sparse
from dask_ml.wrappers import Incremental
from numpy.typing import NDArray
from safetensors.numpy import save_file
from sklearn.linear_model import SGDClassifier

from router_training.data import Queries, load_queries
from serving.router import CONFIG, ROUTER_FORMAT, WEIGHTS, FeatureSpec, LinearRouter, features
from storage.atomic import canonical_json

BLOCK = 256
"""Queries per Dask block: fixed, since the order of updates is part of the result."""
EPOCHS = 8


def feature_block(texts: Sequence[str], spec: FeatureSpec) -> Any:
    """(texts, buckets) float64 CSR matrix."""
    rows = [features(text, spec) for text in texts]
    bounds = np.cumsum([0] + [len(indices) for indices, _ in rows])
    indices = np.concatenate([indices for indices, _ in rows])
    values = np.concatenate([values for _, values in rows])
    return scipy.sparse.csr_matrix((values, indices, bounds), shape=(len(rows), spec.size))


def _arrays(items: Sequence[tuple[str, int]], spec: FeatureSpec) -> tuple[da.Array, da.Array]:
    """Features and labels as Dask arrays of equal blocks."""
    parts, labels = [], []
    build = dask.delayed(feature_block)
    for start in range(0, len(items), BLOCK):
        block = items[start : start + BLOCK]
        empty = scipy.sparse.csr_matrix((0, spec.size))
        parts.append(da.from_delayed(build([text for text, _ in block], spec), (len(block), spec.size), meta=empty))
        labels.append(da.from_array(np.array([label for _, label in block]), chunks=len(block)))
    return da.concatenate(parts), da.concatenate(labels)


def train(queries: Queries, seed: int, spec: FeatureSpec | None = None) -> LinearRouter:
    """A linear router. Same queries and seed, same weights: blocks, their order and the random state are fixed."""
    spec = spec or FeatureSpec()
    inputs, labels = _arrays(queries.train, spec)
    (inputs,) = dask.persist(inputs)
    classifier = SGDClassifier(loss="log_loss", alpha=1e-5, random_state=seed % 2**32, average=True)
    model = Incremental(classifier, shuffle_blocks=False, assume_equal_chunks=True)
    classes = np.arange(len(queries.experts))
    for _ in range(EPOCHS):
        model.partial_fit(inputs, labels, classes=classes)
    fitted = model.estimator_
    weights, bias = fitted.coef_, fitted.intercept_
    if len(queries.experts) == 2:  # scikit-learn keeps one row for two classes
        weights, bias = np.vstack([-weights, weights]), np.concatenate([-bias, bias])
    return LinearRouter(queries.experts, spec, weights.astype(np.float32), bias.astype(np.float32))


def evaluate(router: LinearRouter, items: Sequence[tuple[str, int]]) -> dict[str, Any]:
    """Accuracy and confusion matrix (rows: the query's expert; columns: the one chosen) on labelled queries."""
    confusion: NDArray[np.int64] = np.zeros((len(router.experts), len(router.experts)), np.int64)
    for text, label in items:
        shares = router.route(text)
        confusion[label, router.experts.index(max(shares, key=lambda name: shares[name]))] += 1
    accuracy = float(np.trace(confusion)) / max(1, int(confusion.sum()))
    return {"accuracy": accuracy, "queries": int(confusion.sum()), "confusion": confusion.tolist()}


def save(router: LinearRouter, folder: Path, card: dict[str, Any]) -> None:
    """Write ``router.json`` and ``router.safetensors``."""
    folder.mkdir(parents=True)
    save_file({"weights": router.weights, "bias": router.bias}, folder / WEIGHTS)
    spec = {"size": router.spec.size, "shortest": router.spec.shortest, "longest": router.spec.longest}
    config = {"format": ROUTER_FORMAT, "kind": "linear", "experts": list(router.experts), "features": spec, **card}
    (folder / CONFIG).write_bytes(canonical_json(config))


def train_router(sources: dict[str, Path], digests: dict[str, str], seed: int, folder: Path) -> dict[str, Any]:
    """Train, measure on held-out queries, save. Returns the measurement for the manifest."""
    queries = load_queries(sources)
    router = train(queries, seed)
    measured = evaluate(router, queries.validation)
    counts = {
        expert: [sum(found == label for _, found in part) for part in (queries.train, queries.validation)]
        for label, expert in enumerate(queries.experts)
    }
    save(router, folder, {"sources": digests, "counts": counts, "ambiguous": queries.ambiguous, "validation": measured})
    return {"kind": "linear", **measured, "ambiguous": queries.ambiguous}
