from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from router_training import calibration
from router_training.calibration import auto_thresholds, fit_temperature, loss, thresholds_of
from router_training.measures import calibration_error
from serving.choice import Link, log_shares


def drawn(link: Link, queries: int = 20_000, experts: int = 4, seed: int = 0) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Scores, and labels drawn from the very shares that they stand for: calibrated by construction."""
    random = np.random.default_rng(seed)
    logits = 3 * random.standard_normal((queries, experts))
    sums = np.exp(log_shares(logits, link, 1.0)).cumsum(axis=1)
    return logits, np.minimum((random.random((queries, 1)) > sums).sum(axis=1), experts - 1)


@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
@pytest.mark.parametrize("factor", [0.4, 1.0, 5.0])
def test_a_known_temperature_is_found(link: Link, factor: float) -> None:
    """Scores that are too large by a factor are divided by it, and their shares are then right as often as they say."""
    logits, labels = drawn(link)
    found = fit_temperature(logits * factor, labels, link)
    assert found == pytest.approx(factor, rel=0.05)
    before, after = (
        calibration_error(np.exp(log_shares(logits * factor, link, temperature)), labels) for temperature in (1.0, found)
    )
    assert before is not None
    assert after is not None
    assert after < 0.02
    assert factor == 1.0 or before > 2 * after


@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
def test_no_temperature_of_a_grid_has_a_smaller_loss(link: Link) -> None:
    logits, labels = drawn(link, 500, seed=1)
    found = loss(logits * 3, labels, link, fit_temperature(logits * 3, labels, link))
    grid = [loss(logits * 3, labels, link, temperature) for temperature in np.geomspace(0.02, 50, 400)]
    assert found <= min(grid) + 1e-6


def test_from_nothing_nothing_is_concluded() -> None:
    random = np.random.default_rng(0)
    logits = random.standard_normal((100, 3))
    best = logits.argmax(axis=1)
    mixed = np.where(np.arange(100) % 4, best, (best + 1) % 3)
    assert fit_temperature(logits, mixed, "softmax") != 1.0
    assert fit_temperature(logits, best, "softmax") == 1.0  # all right: the colder the better, without end
    assert fit_temperature(logits, (best + 1) % 3, "softmax") == 1.0
    assert fit_temperature(logits[:19], mixed[:19], "softmax") == 1.0
    assert fit_temperature(logits[:0], mixed[:0], "softmax") == 1.0
    assert fit_temperature(logits[:, :1], np.zeros(100, int), "softmax") == 1.0
    assert fit_temperature(np.where(logits > 2, np.inf, logits), mixed, "softmax") == 1.0


@given(st.integers(0, 2**32 - 1), st.integers(0, 300), st.sampled_from([1.0, 8.0]))
def test_a_temperature_never_makes_the_loss_larger(seed: int, queries: int, spread: float) -> None:
    random = np.random.default_rng(seed)
    logits, labels = spread * random.standard_normal((queries, 3)), random.integers(0, 3, queries)
    found = fit_temperature(logits, labels, "sigmoid")
    assert calibration.LOWEST <= found <= calibration.HIGHEST
    if queries:
        assert loss(logits, labels, "sigmoid", found) <= loss(logits, labels, "sigmoid", 1.0)


@given(st.integers(0, 2**32 - 1), st.integers(0, 400), st.sampled_from([0.5, 2.0, 50.0]))
def test_automatic_thresholds_keep_95_of_100_right_answers_and_no_more_than_they_must(
    seed: int, queries: int, spread: float
) -> None:
    random = np.random.default_rng(seed)
    experts = ("a", "b", "c")
    logits, labels = spread * random.standard_normal((queries, 3)), random.integers(0, 3, queries)
    shares = np.exp(log_shares(logits, "softmax", 1.0))
    found = auto_thresholds(shares, labels, experts)
    for place, expert in enumerate(experts):
        right = shares[(labels == place) & (shares.argmax(axis=1) == place), place]
        bound = found[expert]
        assert bound == 0 or 1 / 3 < bound <= calibration.CAP
        assert (right >= bound).sum() >= 0.95 * len(right)
        if len(right) < calibration.FEWEST:
            assert bound == 0
        elif bound not in (0, calibration.CAP):  # the next number up with four decimals would lose more
            assert (right >= bound + 1e-4).sum() < len(right) - np.floor(0.05 * len(right))


def test_thresholds_are_as_asked() -> None:
    shares = np.array([[0.9, 0.1]] * 40 + [[0.2, 0.8]] * 40)
    labels = np.array([0] * 40 + [1] * 40)
    experts = ("a", "b")
    assert thresholds_of(0, shares, labels, experts) == {"a": 0.0, "b": 0.0}
    assert thresholds_of(0.7, shares, labels, experts) == {"a": 0.7, "b": 0.7}
    assert thresholds_of({"b": 0.6}, shares, labels, experts) == {"a": 0.0, "b": 0.6}
    assert thresholds_of("auto", shares, labels, experts) == {"a": 0.9, "b": 0.8}
