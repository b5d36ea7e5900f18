from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from distributed import Client, LocalCluster
from sklearn.linear_model import SGDClassifier

from router_training import linear
from router_training.linear import epochs_for, feature_matrix, quantised, train
from router_training.parts import each_part, rows_of, waves
from serving.features import FeatureSpec, features
from serving.router import LinearScorer, Router
from storage.errors import QueryDataError
from tests.support.prepared import Labelled, Written, written

SPEC = FeatureSpec(bits=10, longest=3)
WORDS = ("river mountain valley", "function return import", "plus minus times")


def queries(experts: int, count: int, first: int = 0) -> list[Labelled]:
    """Queries of kinds that are easy to tell apart, mixed."""
    found: list[Labelled] = []
    for number in range(first, first + count):
        words = WORDS[number % experts].split()
        found.append((f"{words[number % 3]} {number} {words[number // 3 % 3]}", number % experts))
    return found


def example(folder: Path, experts: int = 3, count: int = 600) -> Written:
    return written(folder / "parts", "abc"[:experts], queries(experts, count), queries(experts, 90, count))


def right(scorer: LinearScorer, rows: list[Labelled]) -> float:
    chosen = scorer.logits([row[0] for row in rows]).argmax(axis=1)
    return float((chosen == [row[1] for row in rows]).mean())


@pytest.mark.parametrize("experts", [2, 3])
def test_separable_kinds_are_told_apart(tmp_path: Path, experts: int) -> None:
    scorer = train(example(tmp_path, experts), 0, SPEC)
    assert scorer.experts == tuple("abc"[:experts])
    assert right(scorer, queries(experts, 90, 600)) >= 0.98


@pytest.mark.parametrize("experts", [2, 3])
def test_the_weights_are_scikit_learns_on_the_same_blocks(tmp_path: Path, experts: int) -> None:
    """Dask adds nothing: one partial_fit per part and epoch, in the order of the parts; then whole numbers."""
    prepared = example(tmp_path, experts)
    scorer = train(prepared, 5, SPEC, epochs=2)
    model = SGDClassifier(loss="log_loss", alpha=linear.ALPHA, random_state=5, average=600)
    for _ in range(2):
        for rows in each_part(prepared.parts("train")):
            model.partial_fit(feature_matrix(rows.texts, SPEC), rows.labels, classes=np.arange(experts))
    weights, bias = model.coef_, model.intercept_
    if experts == 2:
        weights, bias = np.vstack([-weights, weights]), np.concatenate([-bias, bias])
    np.testing.assert_array_equal(scorer.bias, bias)
    largest = np.abs(weights).max(axis=1)
    np.testing.assert_allclose(scorer.weights * scorer.scale, weights.T, atol=largest.max() / 65534)
    texts = [row[0] for row in queries(experts, 50, 700)]
    exact = feature_matrix(texts, SPEC) @ weights.T + bias
    np.testing.assert_allclose(scorer.logits(texts), exact, atol=1e-3)


def test_the_seed_counts(tmp_path: Path) -> None:
    prepared = example(tmp_path)
    assert not np.array_equal(train(prepared, 0, SPEC, 1).weights, train(prepared, 1, SPEC, 1).weights)


def test_training_gives_the_same_bits_with_and_without_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it matter how many parts a wave holds; and nothing is warned of, whatever the size of the model."""
    prepared = example(tmp_path, count=1300)
    alone = train(prepared, 3)
    monkeypatch.setattr(linear, "WAVE_PARTS", 2)
    lines: list[str] = []
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0", silence_logs=50) as cluster,
        Client(cluster),
    ):
        shared = train(prepared, 3, tell=lines.append)
    assert lines == [f"epoch {number} of 8" for number in range(1, 9)]
    for name in ("weights", "scale", "bias"):
        np.testing.assert_array_equal(getattr(alone, name), getattr(shared, name))


def test_workers_need_not_see_the_parts(tmp_path: Path) -> None:
    """A task carries what a part's file holds, not its path."""
    prepared = example(tmp_path, count=300)
    contents = [path.read_bytes() for path in prepared.parts("train")]
    inputs, labels = linear._arrays(contents, SPEC)
    for path in prepared.parts("train"):
        path.unlink()
    assert inputs.compute().shape == (300, SPEC.size)
    np.testing.assert_array_equal(labels.compute(), [label for _, label, *_ in queries(3, 300)])


def test_feature_matrices_hold_the_served_features() -> None:
    texts = ["one two", "", "three"]
    found = feature_matrix(texts, SPEC).toarray()
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1)
    for row, text in zip(found, texts, strict=True):
        np.testing.assert_array_equal(np.flatnonzero(row), features([text], SPEC).buckets)
    gaps = FeatureSpec(bits=8, shortest=4, words=False)
    assert feature_matrix(["", "abcd"], gaps).toarray()[0].tolist() == [0] * 256


def test_whole_numbers_are_near_and_never_overflow() -> None:
    random = np.random.default_rng(0)
    weights = random.standard_normal((3, SPEC.size)) * [[1e-9], [1.0], [1e9]]
    weights[2] = 0
    scorer = quantised("abc", SPEC, weights, np.zeros(3))
    assert np.abs(scorer.weights.astype(int)).max(axis=0).tolist() == [32767, 32767, 0]
    error = np.abs(scorer.weights * scorer.scale - weights.T).max(axis=0)
    assert (error <= np.abs(weights).max(axis=1) / 65534 * (1 + 1e-9)).all()


def test_fewer_queries_are_gone_through_more_often() -> None:
    assert [epochs_for(parts) for parts in (1, 500, 501, 1000, 1334, 100_000)] == [8, 8, 7, 4, 2, 2]


def test_waves_keep_order_and_limits(tmp_path: Path) -> None:
    paths = []
    for number, size in enumerate((10, 10, 10, 50, 1, 1, 1, 1)):
        paths.append(tmp_path / str(number))
        paths[-1].write_bytes(bytes([number]) * size)
    found = [[(part[0], len(part)) for part in wave] for wave in waves(paths, 3, 25)]
    assert found == [[(0, 10), (1, 10)], [(2, 10)], [(3, 50)], [(4, 1), (5, 1), (6, 1)], [(7, 1)]]
    assert list(waves([], 3, 25)) == []


def test_without_queries_nothing_is_trained(tmp_path: Path) -> None:
    with pytest.raises(QueryDataError, match=r"the linear router has no training queries. Give at least 50"):
        train(written(tmp_path / "parts", "ab", []), 0)


def test_what_is_trained_is_served(tmp_path: Path) -> None:
    """Texts of any kind pass through Parquet as they are."""
    odd: list[Labelled] = [("naïve 数学 \x00\u2028 🎈" * 20, 0, "script:Han"), ("", 1)]
    prepared = written(tmp_path / "parts", "ab", [*queries(2, 100), *odd])
    rows = rows_of(prepared.parts("train")[0].read_bytes())
    assert rows.texts[-2:] == (odd[0][0], "")
    assert rows.languages[-2:] == ("script:Han", "")
    assert sum(Router(train(prepared, 0, SPEC)).route(odd[0][0]).values()) == pytest.approx(1)
