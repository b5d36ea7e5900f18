from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from serving import features as module
from serving.features import FeatureSpec, features, split_mix
from tests.support import reference_router

SMALL = FeatureSpec(bits=9, longest=3)
TEXTS = st.text(st.characters(exclude_categories=()), max_size=60)


def of(text: str, spec: FeatureSpec) -> list[int]:
    return list(map(int, features([text], spec).buckets))


def test_the_generator_is_split_mix_64() -> None:
    """The first outputs of seed 0 that every implementation of it gives."""
    assert split_mix(3, 0) == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", [23246, 28894]),
        ("a", [1030, 23246, 43991, 85612, 91260, 131004]),
        (
            "don't",
            [675, 2211, 12336, 23246, 23393, 24700, 31680, 32589, 43286, 45657, 52144, 82413, 84256, 85169, 87688, 96637,
             107875, 109996, 113523, 114743, 116722, 121674, 126707],
        ),
    ],
)  # fmt: skip
def test_known_texts_fall_into_known_buckets(text: str, expected: list[int]) -> None:
    """Part of the format: a router that is stored was trained on these."""
    assert of(text, FeatureSpec()) == expected


@given(TEXTS, st.booleans())
@example("x" * 70 + " y", True)
@example("\ud800 \x00 \x1f\u3000a_b\U0010ffff", True)
def test_features_are_those_of_the_slow_reference(text: str, words: bool) -> None:
    spec = FeatureSpec(bits=12, shortest=1, longest=4, words=words)
    assert of(text, spec) == reference_router.buckets(text, spec)


@given(st.lists(TEXTS, max_size=6))
def test_a_text_among_others_has_its_own_features(texts: list[str]) -> None:
    found = features(texts, SMALL)
    assert len(found) == len(texts)
    assert found.counts.tolist() == np.diff(found.bounds).tolist()
    for place, text in enumerate(texts):
        assert found.buckets[found.bounds[place] : found.bounds[place + 1]].tolist() == of(text, SMALL)


def test_only_long_n_grams_can_be_none() -> None:
    found = features(["", "a", ""], FeatureSpec(bits=9, shortest=3, longest=4, words=False))
    assert found.counts.tolist() == [0, 1, 0]


def test_white_space_is_folded_and_case_counts() -> None:
    assert of("a\n\t b", SMALL) == of(" a b ", SMALL)
    assert of("A b", SMALL) != of("a b", SMALL)


def test_what_lies_behind_the_bound_is_not_read() -> None:
    text = "ab " * (module.MAX_CHARACTERS // 3) + "a"
    assert len(text) == module.MAX_CHARACTERS
    assert of(text + "zzz" * 4_000_000, SMALL) == of(text, SMALL)
    assert of(text[:-1] + "z", SMALL) != of(text, SMALL)


@pytest.mark.parametrize("step", [1, 7919])
def test_n_grams_share_buckets_no_more_often_than_at_random(step: int) -> None:
    """Of m different n-grams in n buckets about n (1 - (1 - 1/n)^m) are hit at random; like ones are spread more evenly."""
    texts = [f"{number * step % 10**7:07d}" for number in range(50_000)]
    spec = FeatureSpec(bits=17, shortest=8, longest=8, words=False)
    distinct = len({" " + text for text in texts} | {text + " " for text in texts})
    expected = spec.size * (1 - (1 - 1 / spec.size) ** distinct)
    assert len(np.unique(features(texts, spec).buckets)) > 0.99 * expected


@pytest.mark.parametrize(
    "fields",
    [{"bits": 0}, {"bits": 25}, {"shortest": 0}, {"shortest": 3, "longest": 2}, {"longest": 9}, {"bits": 4.0}, {"words": 1}],
)
def test_specifications_out_of_bounds_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="features: expected"):
        FeatureSpec(**fields)  # type: ignore[arg-type]
