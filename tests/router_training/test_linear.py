from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from distributed import Client, LocalCluster

from router_training.data import in_validation, load_queries
from router_training.linear import evaluate, feature_block, train, train_router
from serving.router import FeatureSpec, LinearRouter, features, load_router
from storage.errors import QueryDataError


def write(folder: Path, queries: dict[str, list[str]]) -> dict[str, Path]:
    for name, texts in queries.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {name: folder / f"{name}.jsonl" for name in queries}


def example(folder: Path, names: tuple[str, ...] = ("a", "b", "c")) -> dict[str, Path]:
    words = {"a": "river mountain valley", "b": "function return import", "c": "plus minus times"}
    return write(
        folder, {n: [f"{words[n].split()[i % 3]} {i} {words[n].split()[i // 3 % 3]}" for i in range(200)] for n in names}
    )


def test_no_text_is_in_both_parts(tmp_path: Path) -> None:
    queries = load_queries(example(tmp_path))
    train_texts, validation = ({text for text, _ in part} for part in (queries.train, queries.validation))
    assert not train_texts & validation
    assert len(train_texts) + len(validation) == 600
    assert all(in_validation(text) for text in validation)
    assert 0.1 < len(validation) / 600 < 0.2


def test_duplicates_count_once_and_ambiguous_texts_are_left_out(tmp_path: Path) -> None:
    texts = {"a": [f"x {i}" for i in range(100)] * 3 + ["both"], "b": [f"y {i}" for i in range(100)] + ["  both "]}
    queries = load_queries(write(tmp_path, texts))
    assert len(queries.train) + len(queries.validation) == 200
    assert queries.ambiguous == 1


def test_line_separators_inside_texts_do_not_end_lines(tmp_path: Path) -> None:
    texts = [f"one\u2028two\x85three\x0cfour {i}" for i in range(100)]
    sources = {n: tmp_path / f"{n}.jsonl" for n in ("a", "b")}
    for name, path in sources.items():
        path.write_text("\n".join(json.dumps({"text": name + text}, ensure_ascii=False) for text in texts) + "\n")
    queries = load_queries(sources)
    assert len(queries.train) + len(queries.validation) == 200


def test_order_of_lines_does_not_matter(tmp_path: Path) -> None:
    sources = example(tmp_path)
    expected = load_queries(sources)
    for path in sources.values():
        path.write_text("\n".join(reversed(path.read_text().splitlines())))
    assert load_queries(sources) == expected


@pytest.mark.parametrize("names", [("a", "b"), ("a", "b", "c")])
def test_separable_domains_are_told_apart(tmp_path: Path, names: tuple[str, ...]) -> None:
    queries = load_queries(example(tmp_path, names))
    found = evaluate(train(queries, 0), queries.validation)
    assert found["accuracy"] >= 0.98
    assert np.array(found["confusion"]).shape == (len(names), len(names))
    assert np.array(found["confusion"]).sum() == found["queries"] == len(queries.validation)


def test_confusion_rows_are_the_querys_expert() -> None:
    router = LinearRouter(("a", "b"), FeatureSpec(size=8), np.zeros((2, 8), np.float32), np.array([1.0, 0.0], np.float32))
    assert evaluate(router, [("x", 1), ("y", 1), ("z", 0)])["confusion"] == [[1, 0], [2, 0]]


def test_the_seed_counts(tmp_path: Path) -> None:
    queries = load_queries(example(tmp_path))
    assert not np.array_equal(train(queries, 0).weights, train(queries, 1).weights)


def test_training_gives_the_same_bits_with_and_without_a_cluster(tmp_path: Path) -> None:
    queries = load_queries(example(tmp_path))
    alone = train(queries, 3)
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0", silence_logs=50) as cluster,
        Client(cluster),
    ):
        shared = train(queries, 3)
    np.testing.assert_array_equal(alone.weights, shared.weights)
    np.testing.assert_array_equal(alone.bias, shared.bias)


def test_served_scores_are_the_trained_ones(tmp_path: Path) -> None:
    """The saved router, read back, against scikit-learn's own formula on the feature matrix."""
    sources = example(tmp_path)
    measured = train_router(sources, {"a": "x", "b": "y", "c": "z"}, 0, tmp_path / "router")
    router = load_router(tmp_path / "router")
    queries = load_queries(sources)
    texts = [text for text, _ in queries.validation]
    scores = feature_block(texts, router.spec) @ router.weights.T.astype(np.float64) + router.bias
    shares = 1 / (1 + np.exp(-scores))
    shares /= shares.sum(axis=1, keepdims=True)
    found = np.array([list(router.route(text).values()) for text in texts])
    np.testing.assert_allclose(found, shares, rtol=1e-12)
    right = (found.argmax(axis=1) == [label for _, label in queries.validation]).mean()
    assert measured["accuracy"] == pytest.approx(right)
    card = json.loads((tmp_path / "router" / "router.json").read_bytes())
    assert card["sources"] == {"a": "x", "b": "y", "c": "z"}
    assert sum(sum(counts) for counts in card["counts"].values()) == 600


def test_feature_blocks_hold_the_served_features() -> None:
    spec = FeatureSpec(size=256)
    block = feature_block(["one two", "", "three"], spec).toarray()
    for row, text in zip(block, ["one two", "", "three"], strict=True):
        indices, values = features(text, spec)
        dense = np.zeros(256)
        dense[indices] = values
        np.testing.assert_array_equal(row, dense)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"a.jsonl holds no queries"),
        ('{"text": ""}\n', r"a.jsonl line 1: expected .*'text' is empty"),
        ('{"question": "x"}\n', r"a.jsonl line 1: expected"),
        ("[1]\n", r"a.jsonl line 1: expected"),
        ('{"text": "only one"}\n', r"no (training|validation) queries are left for a .* Give at least 50"),
    ],
)
def test_queries_that_cannot_train_are_refused(tmp_path: Path, content: str, message: str) -> None:
    sources = example(tmp_path, ("a", "b"))
    sources["a"].write_text(content)
    with pytest.raises(QueryDataError, match=message):
        load_queries(sources)


def test_many_bad_lines_are_counted_not_all_printed(tmp_path: Path) -> None:
    sources = example(tmp_path, ("a", "b"))
    sources["a"].write_text("nonsense\n" * 100)
    with pytest.raises(QueryDataError, match=r"and 80 more lines"):
        load_queries(sources)
    sources["b"].write_bytes(b'{"text": "\xff"}')
    with pytest.raises(QueryDataError, match=r"expert b: .*b.jsonl: 'utf-8' codec"):
        load_queries(sources)
