"""What makes two queries the same question, which part a question is in, and what language it seems to be. Pure.

Two queries are one question when they differ in case, width, white space and the punctuation of sentences only. Digits, and
the signs that mean something in sums and code, count: ``3 - 4`` is not ``3 + 4``, and ``C`` is not ``C#``.
"""

from __future__ import annotations

import hashlib
import re
import sys
import unicodedata
from collections import Counter
from functools import cache, lru_cache

import numpy as np
from numpy.typing import NDArray

MAX_CHARACTERS = 8192
"""A longer query is cut to so many characters when it is read: more than any router looks at, and a text of 10 MB is no
burden. Two queries that are equal so far are one question."""
VALIDATION_SHARE = 0.15
"""Of questions, not of rows: a question with a hundred phrasings is held out with all of them."""
HELD_OUT = int(VALIDATION_SHARE * 2**64)
"""Groups whose mixed digest is less are held out."""
DIGEST_BYTES = 16
SCRIPT = "script:"
"""Begins a language that was guessed: all that the letters tell is the script."""

_MEANT = frozenset("-*/%#&@\\")
"""Signs that Unicode counts as punctuation, and that sums and programs are made of."""
_SILENT = frozenset(("Pc", "Pd", "Pe", "Pf", "Pi", "Po", "Ps", "Cc", "Cf"))
_LETTERS = 256
"""Characters that the script is guessed from."""
_LATIN = re.compile("[A-Za-z]")
_NAMES = {"CJK": "Han", "HIRAGANA": "Kana", "KATAKANA": "Kana"}
_SCRIPTS = frozenset(
    ("Arabic", "Armenian", "Bengali", "Bopomofo", "Cyrillic", "Devanagari", "Ethiopic", "Georgian", "Greek", "Gujarati",
     "Gurmukhi", "Han", "Hangul", "Hebrew", "Kana", "Kannada", "Khmer", "Lao", "Latin", "Malayalam", "Mongolian", "Myanmar",
     "Oriya", "Sinhala", "Syriac", "Tamil", "Telugu", "Thaana", "Thai", "Tibetan")
)  # fmt: skip


@cache
def _silenced() -> tuple[bytes, dict[int, str]]:
    """Punctuation, and what is not seen (control characters, marks of direction, joiners), as spaces: in ASCII, and in all."""
    silent = [
        code for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)) in _SILENT and chr(code) not in _MEANT
    ]
    return bytes(32 if code in silent else code for code in range(128)) + bytes(range(128, 256)), dict.fromkeys(silent, " ")


def identity(text: str) -> str:
    """The text as it is compared: Unicode's NFKC with folded case, and one space for white space and punctuation.

    What is nothing but punctuation stays as it is, but for white space.
    """
    ascii_spaces, spaces = _silenced()
    if text.isascii():  # it is its own NFKC
        folded = text.lower()
        said = folded.encode("ascii").translate(ascii_spaces).decode("ascii")
    else:
        folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
        said = folded.translate(spaces)
    return " ".join(said.split()) or " ".join(folded.split())


def digest(text: str) -> bytes:
    """16 bytes that stand for a text."""
    return hashlib.sha256(text.encode("utf-8")).digest()[:DIGEST_BYTES]


def rank(seed: int, same: str) -> bytes:
    """16 bytes by which a question, given by its ``identity``, is sampled and ordered: another order for every seed."""
    return hashlib.sha256(b"%d\0" % seed + same.encode("utf-8")).digest()[:DIGEST_BYTES]


def in_validation(groups: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which groups of questions are held out, by the first 64 bits of their digests: whatever else there is, for every seed.

    The bits are mixed once more (the end of splitmix64): of groups that were joined the smallest digest decides for all.
    """
    mixed = groups.astype(np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return (mixed ^ (mixed >> np.uint64(31))) < np.uint64(HELD_OUT)


@lru_cache(maxsize=1 << 16)
def _script(letter: str) -> str:
    first = unicodedata.name(letter, "").partition(" ")[0]
    name = _NAMES.get(first, first.capitalize())
    return name if name in _SCRIPTS else ""


def guess_language(text: str) -> str:
    """``script:`` and the script that most letters at the beginning have (``script:Han``); '' where there is no letter.

    It tells Chinese from English and Russian, not English from French: a source's own ``language`` says more.
    """
    start = text[:_LETTERS]
    if start.isascii():
        return f"{SCRIPT}Latin" if _LATIN.search(start) else ""
    counts: Counter[str] = Counter()
    for sign, times in Counter(start).items():
        if sign.isalpha():
            counts[_script(sign)] += times
    del counts[""]
    return SCRIPT + min(counts, key=lambda name: (-counts[name], name)) if counts else ""
