"""Queries per expert: read, deduplicated, and split so that no text is in both training and validation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from storage.errors import QueryDataError

VALIDATION_SHARE = 0.15
MAX_PROBLEMS = 20
"""Lines of one file that an error lists."""


@dataclass(frozen=True)
class Queries:
    """Labelled queries; labels are positions in the sorted experts' names."""

    experts: tuple[str, ...]
    train: tuple[tuple[str, int], ...]
    validation: tuple[tuple[str, int], ...]
    ambiguous: int
    """Texts that stood under several experts and were left out."""


def _read(expert: str, path: Path) -> tuple[list[str], list[str]]:
    """Texts of a JSONL file, and what is wrong with it."""
    texts: list[str] = []
    problems: list[str] = []
    try:
        # not splitlines: JSON strings may hold the other characters it takes for line ends
        lines = path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        return [], [f"expert {expert}: {path}: {error}"]
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
            if not isinstance(text, str) or not text.strip():
                raise ValueError("'text' is empty or no string")
            texts.append(text)
        except (ValueError, KeyError, TypeError) as error:
            problems.append(f'expert {expert}: {path} line {number}: expected {{"text": "…"}}, got {line[:60]!r} ({error})')
    if not texts and not problems:
        problems.append(f"expert {expert}: {path} holds no queries")
    return texts, problems


def in_validation(text: str) -> bool:
    """Whether a text is held out, decided by its own digest: stable whatever else the files hold."""
    digest = hashlib.sha256(" ".join(text.split()).encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:8], "big") < VALIDATION_SHARE * 2**64


def load_queries(sources: Mapping[str, Path]) -> Queries:
    """All queries. QueryDataError lists every problem of every file."""
    experts = tuple(sorted(sources))
    owners: dict[str, set[int]] = {}
    kept: dict[str, str] = {}
    problems: list[str] = []
    for label, expert in enumerate(experts):
        texts, found = _read(expert, sources[expert])
        problems += found[:MAX_PROBLEMS]
        if len(found) > MAX_PROBLEMS:
            problems.append(f"expert {expert}: … and {len(found) - MAX_PROBLEMS} more lines of {sources[expert]}")
        for text in texts:
            identity = " ".join(text.split())
            owners.setdefault(identity, set()).add(label)
            kept.setdefault(identity, text)
    if problems:
        raise QueryDataError.listing("the router's queries cannot be read", problems)
    single = [(kept[identity], next(iter(who))) for identity, who in owners.items() if len(who) == 1]
    # in order of the text's digest: independent of the order of lines, and mixed
    single.sort(key=lambda item: hashlib.sha256(item[0].encode("utf-8", "replace")).digest())
    train = tuple(item for item in single if not in_validation(item[0]))
    validation = tuple(item for item in single if in_validation(item[0]))
    for part, items in (("training", train), ("validation", validation)):
        empty = [expert for label, expert in enumerate(experts) if not any(found == label for _, found in items)]
        if empty:
            raise QueryDataError(
                f"the router's queries: no {part} queries are left for {', '.join(empty)} after duplicates are removed "
                f"and {VALIDATION_SHARE:.0%} are held out. Give at least 50 different ones per expert."
            )
    return Queries(experts, train, validation, len(owners) - len(single))
