"""Every measure against scikit-learn's, or against the definition written as a loop."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn import metrics

from router_training import measures

Case = tuple[NDArray[np.float64], NDArray[np.int32]]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Shares and labels; few different values, so that there are ties."""
    queries, experts = draw(st.integers(1, 40)), draw(st.integers(2, 5))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    whole = random.integers(1, draw(st.sampled_from([3, 1000])), (queries, experts)).astype(np.float64)
    return whole / whole.sum(axis=1, keepdims=True), random.integers(0, experts, queries).astype(np.int32)


@given(cases())
def test_accuracy_f1_and_confusion_are_scikit_learns(case: Case) -> None:
    shares, labels = case
    chosen, experts = shares.argmax(axis=1), shares.shape[1]
    counts = measures.confusion(labels, chosen, experts)
    np.testing.assert_array_equal(counts, metrics.confusion_matrix(labels, chosen, labels=range(experts)))
    assert measures.accuracy(counts) == pytest.approx(metrics.accuracy_score(labels, chosen))
    assert measures.macro_f1(counts) == pytest.approx(metrics.f1_score(labels, chosen, average="macro"))


def slow_calibration_error(shares: NDArray[np.float64], labels: NDArray[np.int32], bins: int) -> float:
    total = 0.0
    for place in range(bins):
        inside = [
            (row.max(), row.argmax() == label)
            for row, label in zip(shares, labels, strict=True)
            if place / bins < row.max() <= (place + 1) / bins
        ]
        if inside:
            gap = np.mean([right for _, right in inside]) - np.mean([most for most, _ in inside])
            total += len(inside) / len(labels) * abs(gap)
    return total


@given(cases(), st.sampled_from([1, 7, 15]))
def test_the_calibration_error_is_its_definition(case: Case, bins: int) -> None:
    shares, labels = case
    assert measures.calibration_error(shares, labels, bins) == pytest.approx(slow_calibration_error(shares, labels, bins))


def test_the_calibration_error_of_known_cases() -> None:
    sure = np.array([[1.0, 0.0]] * 4)
    assert measures.calibration_error(sure, np.array([0, 0, 0, 0])) == 0
    assert measures.calibration_error(sure, np.array([0, 0, 0, 1])) == pytest.approx(0.25)
    assert measures.calibration_error(np.full((4, 2), 0.5), np.array([0, 1, 0, 1])) == 0


@given(cases())
def test_the_coverage_curve_is_its_definition(case: Case) -> None:
    shares, labels = case
    curve = measures.coverage_curve(shares, labels, (0.0, 0.4, 0.7, 1.0))
    for point in curve:
        kept = [(row.argmax() == label) for row, label in zip(shares, labels, strict=True) if row.max() >= point["threshold"]]
        assert point["coverage"] == pytest.approx(len(kept) / len(labels))
        assert point["accuracy"] == (pytest.approx(np.mean(kept)) if kept else None)
    assert [point["coverage"] for point in curve] == sorted((point["coverage"] for point in curve), reverse=True)
    assert curve[0]["coverage"] == 1


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=30),
    st.lists(st.integers(0, 6), min_size=1, max_size=30),
)
def test_the_auroc_is_scikit_learns_and_that_of_all_pairs(inside: list[int], outside: list[int]) -> None:
    found = measures.auroc(np.array(inside, float), np.array(outside, float))
    truth = [1] * len(inside) + [0] * len(outside)
    assert found == pytest.approx(metrics.roc_auc_score(truth, inside + outside))
    pairs = [(a > b) + (a == b) / 2 for a in inside for b in outside]
    assert found == pytest.approx(np.mean(pairs))


@given(cases(), st.integers(0, 2**32 - 1))
def test_languages_are_measured_as_if_alone(case: Case, seed: int) -> None:
    shares, labels = case
    languages = np.random.default_rng(seed).choice(["de", "", "script:Han"], len(labels)).tolist()
    found = measures.by_language(shares, labels, languages)
    assert list(found) == sorted(set(languages))
    assert sum(part["queries"] for part in found.values()) == len(labels)
    for language, part in found.items():
        mine = np.array([one == language for one in languages])
        counts = measures.confusion(labels[mine], shares[mine].argmax(axis=1), shares.shape[1])
        assert part == {"queries": mine.sum(), "accuracy": measures.accuracy(counts), "macro_f1": measures.macro_f1(counts)}


def test_of_no_queries_nothing_is_claimed() -> None:
    none, labels = np.zeros((0, 3)), np.zeros(0, np.int32)
    counts = measures.confusion(labels, none.argmax(axis=1), 3)
    assert counts.tolist() == [[0, 0, 0]] * 3
    assert measures.accuracy(counts) is None
    assert measures.macro_f1(counts) is None
    assert measures.calibration_error(none, labels) is None
    assert measures.auroc(np.zeros(0), np.ones(3)) is None
    assert measures.auroc(np.ones(3), np.zeros(0)) is None
    assert measures.by_language(none, labels, ()) == {}
    assert {(point["coverage"], point["accuracy"]) for point in measures.coverage_curve(none, labels)} == {(None, None)}


def test_records_are_rounded_and_json() -> None:
    found = measures.rounded({"a": 1 / 3, "b": [{"c": (2 / 3, None, True, 7)}], "d": "x"})
    assert json.loads(json.dumps(found)) == {"a": 0.333333, "b": [{"c": [0.666667, None, True, 7]}], "d": "x"}
