from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from serving.features import FeatureSpec
from serving.router import CONFIG, WEIGHTS, LinearScorer, Router, load_router
from storage.errors import ArtifactError
from storage.layout import ROUTER_FORMAT
from tests.support import reference_router

EXPERTS = ("a", "b", "c")
SPEC = FeatureSpec(bits=8, longest=3)


def a_scorer(seed: int = 0) -> LinearScorer:
    random = np.random.default_rng(seed)
    weights = random.integers(-32767, 32768, (SPEC.size, 3)).astype(np.int16)
    return LinearScorer(EXPERTS, SPEC, weights, random.random(3) * 1e-4, random.standard_normal(3))


SCORER = a_scorer()


@given(st.lists(st.text(max_size=40), max_size=5))
def test_scores_have_the_bits_of_the_slow_reference(texts: list[str]) -> None:
    """Whole numbers summed in any order, then four roundings that Python's floats do as well."""
    found = SCORER.logits(texts)
    assert found.shape == (len(texts), 3)
    expected = [
        reference_router.logits(text, SPEC, SCORER.weights.tolist(), SCORER.scale.tolist(), SCORER.bias.tolist())
        for text in texts
    ]
    assert found.tolist() == expected


def test_a_batch_scores_as_its_texts_do_alone() -> None:
    texts = [f"text {number} " * (number % 7) for number in range(600)]
    together = SCORER.logits(texts)
    np.testing.assert_array_equal(together, np.concatenate([SCORER.logits([text]) for text in texts]))


def test_a_text_without_features_is_given_the_bias() -> None:
    spec = FeatureSpec(bits=4, shortest=4, words=False)
    scorer = LinearScorer(("a",), spec, np.ones((16, 1), np.int16), np.ones(1), np.array([0.25]))
    assert scorer.logits(["", "abcd", ""]).tolist()[0] == scorer.logits([""]).tolist()[0] == [0.25]
    assert scorer.logits(["", "abcd", ""])[1, 0] > 1


def test_one_query_and_a_batch_are_routed_alike() -> None:
    router = Router(SCORER, temperature=2.0)
    texts = ["one", "", "zwei drei"]
    several = router.route(texts)
    assert several == [router.route(text) for text in texts]
    assert list(several[0]) == list(EXPERTS)
    raw = 1 / (1 + np.exp(-SCORER.logits(texts) / 2.0))
    np.testing.assert_allclose(router.probabilities(texts), raw / raw.sum(axis=1, keepdims=True))
    assert router.route([]) == []


def test_texts_of_megabytes_and_broken_unicode_are_routed() -> None:
    found = Router(SCORER).route(["\ud800 abc", "x " * 5_000_000, "\x00"])
    assert all(sum(shares.values()) == pytest.approx(1) for shares in found)


def test_choices_are_by_query_or_by_shares() -> None:
    router = Router(SCORER, thresholds={"a": 1.0, "b": 1.0, "c": 1.0}, fallback="base")
    shares = router.route("query")
    assert router.choose("query") == router.choose(shares)
    assert router.choose(shares).expert == "base"
    assert router.top("query", 2) == router.top(shares, 2) == sorted(shares.items(), key=lambda item: -item[1])[:2]
    free = Router(SCORER)
    best, second, _ = (name for name, _ in free.top("query", 3))
    assert free.choose("query", second, 1.0).expert == second
    assert free.choose("query", second).expert == best


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature: expected a number above 0"),
        ({"temperature": float("nan")}, "temperature: expected a number above 0"),
        ({"thresholds": {"z": 0.5}}, "thresholds: there is no expert z"),
        ({"thresholds": {"a": 1.5}}, "thresholds: expected shares of 0 to 1"),
        ({"fallback": "z"}, "fallback: expected base or one of the experts a, b, c, got 'z'"),
    ],
)
def test_settings_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Router(SCORER, **options)


def write_router(folder: Path, **changes: Any) -> Path:
    tensors: dict[str, Any] = {"weights": SCORER.weights, "scale": SCORER.scale, "bias": SCORER.bias}
    config: dict[str, Any] = {
        "format": ROUTER_FORMAT, "kind": "linear", "experts": list(EXPERTS), "link": "sigmoid", "temperature": 1.5,
        "thresholds": {"b": 0.5}, "fallback": "base", "features": {"bits": 8, "shortest": 1, "longest": 3, "words": True},
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config | changes))
    save_file(tensors, folder / WEIGHTS)
    return folder


def test_a_router_is_read_as_it_was_written(tmp_path: Path) -> None:
    found = load_router(write_router(tmp_path))
    assert (found.temperature, found.fallback) == (1.5, "base")
    assert found.thresholds == {"a": 0.0, "b": 0.5, "c": 0.0}
    np.testing.assert_array_equal(found.scorer.logits(["some text"]), SCORER.logits(["some text"]))


@pytest.mark.parametrize(
    ("changes", "got"),
    [({"format": 1}, "kind 'linear' of format 1"), ({"kind": "forest"}, f"kind 'forest' of format {ROUTER_FORMAT}")],
)
def test_another_kind_or_format_is_refused(tmp_path: Path, changes: dict[str, Any], got: str) -> None:
    with pytest.raises(ArtifactError, match=rf"expected a linear or bert router of format {ROUTER_FORMAT}, got {got}"):
        load_router(write_router(tmp_path, **changes))


def without_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def torn_weights(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1])


def not_finite(folder: Path) -> None:
    save_file({"weights": SCORER.weights, "scale": SCORER.scale * np.inf, "bias": SCORER.bias}, folder / WEIGHTS)


def transposed(folder: Path) -> None:
    weights = np.ascontiguousarray(SCORER.weights.T)
    save_file({"weights": weights, "scale": SCORER.scale, "bias": SCORER.bias}, folder / WEIGHTS)


def no_json(folder: Path) -> None:
    (folder / CONFIG).write_text("{")


def a_list(folder: Path) -> None:
    (folder / CONFIG).write_text("[]")


@pytest.mark.parametrize("damage", [without_weights, torn_weights, not_finite, transposed, no_json, a_list])
def test_damaged_files_are_explained(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    damage(write_router(tmp_path))
    with pytest.raises(ArtifactError, match=r"its router is damaged .* Pull or build the artifact again"):
        load_router(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"link": "softmax"}, {"link": "x"}, {"temperature": -1}, {"temperature": "warm"}, {"thresholds": {"z": 0.5}},
        {"thresholds": [1]}, {"fallback": "z"}, {"features": {"bits": 99}}, {"features": {"size": 256}}, {"experts": ["a"]},
        {"experts": None},
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_damage(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match=r"its router is damaged"):
        load_router(write_router(tmp_path, **changes))
