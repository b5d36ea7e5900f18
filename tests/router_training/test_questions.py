from __future__ import annotations

import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_training.questions import digest, guess_language, identity, in_validation, rank


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is it?", "what  is\nit"),
        ("Ｗhat ｉs it？", "What is it?"),
        ("“Stop”, she said…", "stop she said"),
        ("STRASSE", "straße"),
        ("ﬁne", "fine"),
        ("a\u200bb\u00a0c", "a b c"),
        ("这是什么？", "这是什么"),
        ("(f(x), [y])", "f x y"),
        ("cafe\u0301", "café"),
    ],
)
def test_the_same_question(one: str, other: str) -> None:
    assert identity(one) == identity(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("3 - 4", "3 + 4"),
        ("3 * 4", "3 / 4"),
        ("C", "C#"),
        ("1 2", "12"),
        ("x = 1", "x = 2"),
        ("!!!", "???"),
        ("50%", "50"),
        ("ab", "a b"),
    ],
)
def test_another_question(one: str, other: str) -> None:
    assert identity(one) != identity(other)


@given(st.text())
def test_an_identity_is_its_own(text: str) -> None:
    same = identity(text)
    assert identity(same) == same
    assert identity(f"  {text}\t") == same
    assert same == " ".join(same.split())


@given(st.text(st.characters(max_codepoint=127)))
def test_ascii_goes_the_way_of_all_text(text: str) -> None:
    """The short way gives what the long one would: after a sign that is no ASCII it is taken."""
    assert identity(f"{text} ж") == f"{identity(text)} ж".strip() or not any(
        sign.isalnum() or sign in "-*/%#&@\\$+<=>^`|~" for sign in text
    )


def test_digests_are_what_they_were() -> None:
    """As sha256sum has them: they decide what is held out and in what order queries are trained on."""
    assert digest("what is it").hex() == "e58e3633a1bc6407e538a32a926c5452"
    assert rank(0, "what is it").hex() == "3a6db7ad7b77b026d3716f0aded4e8dc"
    assert rank(1, "what is it").hex() != rank(0, "what is it").hex()


def test_fifteen_percent_are_held_out_whatever_the_digests() -> None:
    even = np.random.default_rng(0).integers(0, 2**64, 200_000, np.uint64)
    assert in_validation(even).mean() == pytest.approx(0.15, abs=0.004)
    assert in_validation(np.arange(200_000, dtype=np.uint64)).mean() == pytest.approx(0.15, abs=0.004)
    least = np.sort(even.reshape(-1, 20), axis=1)[:, 0]  # what decides for 20 groups that were joined
    assert in_validation(least).mean() == pytest.approx(0.15, abs=0.02)


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("What is it?", "script:Latin"),
        ("Où est-ce ?", "script:Latin"),
        ("这是什么？What", "script:Han"),
        ("что это", "script:Cyrillic"),
        ("ما هذا", "script:Arabic"),
        ("これは何ですか", "script:Kana"),
        ("이게 뭐야", "script:Hangul"),
        ("מה זה", "script:Hebrew"),
        ("यह क्या है", "script:Devanagari"),
        ("ab аб", "script:Cyrillic"),  # as many: the first by name
        ("1 + 1 = ?", ""),
        ("", ""),
        ("𐎀𐎁𐎂", ""),
    ],
)
def test_scripts(text: str, language: str) -> None:
    assert guess_language(text) == language


def test_scripts_by_the_names_of_their_letters() -> None:
    for sign in map(chr, range(0x250)):
        if sign.isalpha() and unicodedata.name(sign).startswith("LATIN"):
            assert guess_language(sign) == "script:Latin", sign
