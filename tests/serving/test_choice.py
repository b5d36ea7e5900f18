from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.choice import Link, choose, log_shares, top

SHARES = {"a": 0.5, "b": 0.45, "c": 0.05}


@pytest.mark.parametrize("link", ["sigmoid", "softmax"])
@given(
    rows=st.lists(st.lists(st.floats(-30, 30), min_size=3, max_size=3), min_size=1, max_size=4),
    temperature=st.floats(0.1, 10),
)
def test_shares_are_the_normalised_link(link: Link, rows: list[list[float]], temperature: float) -> None:
    logits = np.array(rows)
    linked = np.exp(logits / temperature)
    if link == "sigmoid":
        linked = 1 / (1 + 1 / linked)
    np.testing.assert_allclose(np.exp(log_shares(logits, link, temperature)), linked / linked.sum(1, keepdims=True), rtol=1e-9)


@pytest.mark.parametrize("link", ["sigmoid", "softmax"])
def test_scores_far_out_do_not_overflow(link: Link) -> None:
    found = np.exp(log_shares(np.array([[1e6, -1e6, 0.0], [-1e6, -1e6, -1e6]]), link, 0.02))
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found.sum(axis=1), 1)
    np.testing.assert_allclose(found[1], 1 / 3)


@pytest.mark.parametrize(
    ("thresholds", "fallback", "loaded", "margin", "expected"),
    [
        ({}, None, None, 0.0, ("a", False)),
        ({"a": 0.9}, None, None, 0.0, ("a", False)),  # without a fallback there is no threshold
        ({"a": 0.9}, "base", None, 0.0, ("base", True)),
        ({"a": 0.9}, "c", None, 0.0, ("c", True)),
        ({"a": 0.5}, "base", None, 0.0, ("a", False)),  # a share that reaches it passes
        ({"b": 0.9}, "base", None, 0.0, ("a", False)),  # another's threshold does not count
        ({}, None, "b", 0.0, ("a", False)),
        ({}, None, "b", 0.06, ("b", False)),
        ({}, None, "b", 0.04, ("a", False)),
        ({}, None, "a", 0.9, ("a", False)),
        ({}, None, "base", 0.9, ("a", False)),  # the base has no share that could be near
        ({"b": 0.46}, "base", "b", 0.5, ("a", False)),  # to stay, it must be trusted itself
        ({"b": 0.45}, "base", "b", 0.5, ("b", False)),
        ({"a": 0.9}, "base", "b", 0.5, ("base", True)),
        ({"a": 0.9}, None, "b", 0.5, ("b", False)),
    ],
)  # fmt: skip
def test_who_is_chosen(
    thresholds: dict[str, float], fallback: str | None, loaded: str | None, margin: float, expected: tuple[str, bool]
) -> None:
    found = choose(SHARES, thresholds, fallback, loaded, margin)
    assert (found.expert, found.is_fallback) == expected
    assert found.shares == SHARES


def test_a_gain_equal_to_the_margin_switches() -> None:
    assert choose({"a": 0.75, "b": 0.25}, {}, None, "b", 0.5).expert == "a"
    assert choose({"a": 0.75, "b": 0.25}, {}, None, "b", np.nextafter(0.5, 1)).expert == "b"


def test_equals_go_to_the_first_by_name() -> None:
    assert choose({"b": 0.5, "a": 0.5}, {}, None).expert == "a"
    assert top({"c": 0.2, "b": 0.4, "a": 0.4}, 2) == [("a", 0.4), ("b", 0.4)]
    assert top(SHARES, 9) == [*SHARES.items()]


def test_a_loaded_expert_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match=r"loaded: expected base or one of the experts a, b, c, got 'z'"):
        choose(SHARES, {}, None, "z")
