from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from router_training.simulation import sessions, simulate
from serving.choice import BASE, choose

EXPERTS = ("a", "b", "c")


def slowly(
    shares: NDArray[np.float64], labels: NDArray[Any], margin: float, thresholds: NDArray[np.float64], fallback: str | None
) -> tuple[float, float]:
    """Accuracy and switches per 1000 queries, one choice after the other as a server would make them."""
    bounds = dict(zip(EXPERTS, thresholds.tolist(), strict=True))
    loaded: str | None = None
    right = switches = 0
    for row, label in zip(shares.tolist(), labels, strict=True):
        chosen = choose(dict(zip(EXPERTS, row, strict=True)), bounds, fallback, loaded, margin).expert
        switches += loaded is not None and chosen != loaded
        right += chosen == EXPERTS[label]
        loaded = chosen
    return right / len(labels), 1000 * switches / len(labels)


@given(
    seed=st.integers(0, 2**32 - 1),
    queries=st.integers(1, 60),
    fallback=st.sampled_from([None, BASE, "b"]),
    coarse=st.booleans(),
)
def test_traces_are_routed_as_one_choice_after_the_other(seed: int, queries: int, fallback: str | None, coarse: bool) -> None:
    random = np.random.default_rng(seed)
    shares = random.dirichlet(np.full(3, 0.7), queries)
    if coarse:  # quarters, which are exact: ties, and gains equal to a margin
        shares = random.multinomial(4, np.full(3, 1 / 3), queries) / 4
    labels = random.integers(0, 3, queries)
    thresholds = random.choice([0.0, 0.25, 0.5, 0.75], 3)
    margins = (0.0, 0.1, 0.25, 0.5, 0.9)
    place = None if fallback is None else -1 if fallback == BASE else EXPERTS.index(fallback)
    found = simulate(shares, labels, margins, thresholds, place)
    assert [point["choice"] for point in found] == ["oracle", "argmax", *["margin"] * 4]
    assert found[0]["switches_per_1000"] == 1000 * sum(labels[1:] != labels[:-1]) / queries
    for point, margin in zip(found[1:], margins, strict=True):
        expected = slowly(shares, labels, margin, thresholds, fallback)
        assert (point["accuracy"], point["switches_per_1000"]) == pytest.approx(expected)


def test_without_margin_and_fallback_it_is_argmax() -> None:
    random = np.random.default_rng(0)
    shares, labels = random.dirichlet(np.ones(3), 500), random.integers(0, 3, 500)
    point = simulate(shares, labels, (0.0,))[1]
    chosen = shares.argmax(axis=1)
    assert point["accuracy"] == pytest.approx((chosen == labels).mean())
    assert point["switches_per_1000"] == pytest.approx(2 * (chosen[1:] != chosen[:-1]).sum())
    assert simulate(shares, labels, (1.1,))[1]["switches_per_1000"] == 0


def test_no_queries_are_no_trace() -> None:
    found = simulate(np.zeros((0, 3)), np.zeros(0, int), (0.0, 0.5))
    assert [point["switches_per_1000"] for point in found] == [0, 0, 0]
    assert [point["accuracy"] for point in found[1:]] == [None, None]


def test_sessions_are_as_sticky_as_asked() -> None:
    labels = np.repeat([0, 2, 5], [100, 10, 40])  # kinds need not be 0, 1, 2, nor as many of each
    trace = sessions(labels, 20_000, 0.9, 3)
    kinds = labels[trace]
    assert (kinds[1:] == kinds[:-1]).mean() == pytest.approx(0.9, abs=0.01)
    assert np.bincount(kinds)[[0, 2, 5]] / 20_000 == pytest.approx([1 / 3] * 3, abs=0.05)
    assert set(trace) == set(range(150))
    left = kinds[1:][(kinds[:-1] == 0) & (kinds[1:] != 0)]
    assert (left == 2).mean() == pytest.approx(0.5, abs=0.08)
    np.testing.assert_array_equal(trace, sessions(labels, 20_000, 0.9, 3))
    assert not np.array_equal(trace, sessions(labels, 20_000, 0.9, 4))


def test_sessions_at_the_ends() -> None:
    labels = np.array([0, 0, 1, 1])
    assert len(set(labels[sessions(labels, 50, 1.0, 0)])) == 1
    kinds = labels[sessions(labels, 50, 0.0, 0)]
    assert (kinds[1:] != kinds[:-1]).all()
    assert sessions(labels, 0, 0.5, 0).tolist() == []
    for bad, stickiness in ((labels[:0], 0.5), (labels[:2], 0.5), (labels, 1.5)):
        with pytest.raises(ValueError, match="expected queries of two kinds and a stickiness of 0 to 1"):
            sessions(bad, 5, stickiness, 0)
