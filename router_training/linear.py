"""The linear router: hashed n-grams and one-vs-rest logistic regression, trained block by block with dask-ml.

Assumption (arXiv 2412.15283, Eq. 6): an expert is best on queries from its own fine-tuning data.

Blocks of queries become features side by side, wherever Dask runs; the updates happen one block after the other, in a fixed
order and with a fixed random state, so that the weights do not depend on the number of workers or on there being any. Features
are not kept from epoch to epoch: making them anew costs less than the memory of a million queries' would. The updates are
computed in double precision, although single would be faster: what another processor rounds differently is then far smaller
than a step of the whole numbers that the weights end as.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import scipy.sparse
from dask_ml.wrappers import Incremental
from numpy.typing import NDArray
from sklearn.linear_model import SGDClassifier

from router_training.parts import PreparedQueries, count_rows, rows_of, waves
from serving.features import FeatureSpec, features
from serving.router import LinearScorer
from storage.errors import QueryDataError

ALPHA = 1e-6
"""Strength of the L2 penalty. Of 1e-4 … 1e-7 the best on held-out queries of two sets of six kinds, or next to it."""
WAVE_PARTS = 64
WAVE_BYTES = 8 * 1024**2
"""Parts that Dask is given at once, and what their files may hold: feature blocks of so many lie in memory."""
GRAPH_BYTES = 2 * 1024**3
"""Above this Dask may warn of a large graph. A wave's holds the model, which is expected."""
LEAST_EPOCHS, MOST_EPOCHS, VISITED_PARTS = 2, 8, 4000
"""Epochs: so many that about as many parts are visited, a million queries. On two sets of 20,000 and 31,000 queries of six
kinds two epochs were 0.8 and 0.6 points of accuracy behind eight, three 0.7 and 0.3. On 500 to 6,000 queries sixteen were
0.3 ahead of eight at most."""
INT16 = 32767

Tell = Callable[[str], None]


def epochs_for(parts: int) -> int:
    """How often to go through so many training parts: eight times up to 128,000 queries, twice from 341,000 on. Pure."""
    return min(MOST_EPOCHS, max(LEAST_EPOCHS, VISITED_PARTS // parts))


def feature_matrix(texts: Sequence[str], spec: FeatureSpec) -> Any:
    """(texts, buckets) float64 CSR matrix: 1 / sqrt(number of the text's buckets) in each of them."""
    found = features(texts, spec)
    values = np.repeat(1 / np.sqrt(np.maximum(found.counts, 1).astype(np.float64)), found.counts)
    return scipy.sparse.csr_matrix(
        (values, found.buckets.astype(np.int32), found.bounds.astype(np.int32)), shape=(len(texts), spec.size)
    )


def _block(part: bytes, spec: FeatureSpec) -> tuple[Any, NDArray[np.int32]]:
    rows = rows_of(part)
    return feature_matrix(rows.texts, spec), rows.labels


def _arrays(wave: Sequence[bytes], spec: FeatureSpec) -> tuple[da.Array, da.Array]:
    """Features and labels of a wave as Dask arrays of a block per part.

    Tasks carry what the files hold, not their paths: workers elsewhere need not see this machine's folders.
    """
    build = dask.delayed(_block, nout=2, pure=False)
    empty = scipy.sparse.csr_matrix((0, spec.size))
    inputs, labels = [], []
    for part in wave:
        count = len(rows_of(part))
        matrix, label = build(part, spec)
        inputs.append(da.from_delayed(matrix, (count, spec.size), meta=empty))
        labels.append(da.from_delayed(label, (count,), np.int32))
    return da.concatenate(inputs), da.concatenate(labels)


def train(
    prepared: PreparedQueries,
    seed: int,
    spec: FeatureSpec | None = None,
    epochs: int | None = None,
    tell: Tell | None = None,
) -> LinearScorer:
    """A linear scorer. Same queries and seed, same weights. ``tell`` receives a line per epoch.

    QueryDataError when there are no training queries.
    """
    spec = spec or FeatureSpec()
    paths: tuple[Path, ...] = tuple(prepared.parts("train"))
    if not paths:
        raise QueryDataError("the linear router has no training queries. Give at least 50 different ones per expert.")
    rounds = epochs_for(len(paths)) if epochs is None else epochs
    rows = sum(count_rows(path) for path in paths)
    # averaged from the second epoch on: as good or better than from the start, and the first one takes half the time
    average = rows if rounds > 1 else 1
    classifier = SGDClassifier(loss="log_loss", alpha=ALPHA, random_state=seed % 2**32, average=average)
    # its own default shuffles the blocks, differently in every run
    model = Incremental(classifier, shuffle_blocks=False, assume_equal_chunks=True)
    classes = np.arange(len(prepared.experts), dtype=np.int32)
    with dask.config.set({"distributed.admin.large-graph-warning-threshold": GRAPH_BYTES}):
        for number in range(rounds):
            for wave in waves(paths, WAVE_PARTS, WAVE_BYTES):
                inputs, labels = _arrays(wave, spec)
                model.partial_fit(inputs, labels, classes=classes)
            if tell is not None:
                tell(f"epoch {number + 1} of {rounds}")
    fitted = model.estimator_
    weights, bias = fitted.coef_, fitted.intercept_
    if len(prepared.experts) == 2:  # scikit-learn keeps one row for two classes
        weights, bias = np.vstack([-weights, weights]), np.concatenate([-bias, bias])
    return quantised(prepared.experts, spec, weights, bias)


def quantised(
    experts: Sequence[str], spec: FeatureSpec, weights: NDArray[np.float64], bias: NDArray[np.float64]
) -> LinearScorer:
    """A scorer with weights as whole numbers times one scale per expert. ``weights``: (experts, buckets).

    The error of a weight is at most 1/65534 of its expert's largest.
    """
    largest = np.abs(weights).max(axis=1)
    scale = np.where(largest > 0, largest, 1.0) / INT16
    whole = np.rint(weights / scale[:, None]).astype(np.int16)
    return LinearScorer(experts, spec, np.ascontiguousarray(whole.T), scale, np.array(bias, np.float64))
