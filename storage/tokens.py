"""Which token is which row of a vocabulary, from a tokenizer's files and without a framework, to compare vocabularies."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from storage.errors import CheckpointError

TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")
"""The first line of a list of ranks that goes by the name of a SentencePiece model (Llama 3's own files): raw bytes, which
cannot be compared with the strings of the other formats."""


def _damaged(path: Path, what: object) -> CheckpointError:
    return CheckpointError(f"{path}: cannot be read as a tokenizer's file ({what}). Download or save the tokenizer again.")


def _json(path: Path) -> dict[str, Any]:
    """A JSON object. CheckpointError when the file holds none."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, error) from None
    if not isinstance(found, dict):
        raise _damaged(path, f"expected a JSON object, got {str(found)[:40]}")
    return found


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _by_id(path: Path, vocabulary: Mapping[str, Any]) -> dict[int, str]:
    """Tokens by id from ids by token."""
    wrong = [token for token, number in vocabulary.items() if not _is_id(number)]
    if wrong:
        raise _damaged(path, f"token {wrong[0]!r}: expected an id, got {vocabulary[wrong[0]]!r}")
    return {number: token for token, number in vocabulary.items()}


def _pieces(path: Path, vocabulary: list[Any]) -> dict[int, str]:
    """Tokens by id from a Unigram model's list of (token, score)."""
    tokens = {}
    for number, entry in enumerate(vocabulary):
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)):
            raise _damaged(path, f"token {number}: expected [token, score], got {str(entry)[:40]}")
        tokens[number] = entry[0]
    return tokens


def _added(path: Path, entries: Any) -> dict[int, str]:
    """Tokens by id from tokenizer.json's list of added tokens, which go before the model's own."""
    if not isinstance(entries, list):
        raise _damaged(path, f"added_tokens: expected a list, got {str(entries)[:40]}")
    tokens = {}
    for entry in entries:
        if not (isinstance(entry, dict) and _is_id(entry.get("id")) and isinstance(entry.get("content"), str)):
            raise _damaged(path, f"added_tokens: expected an id and a content, got {str(entry)[:40]}")
        tokens[entry["id"]] = entry["content"]
    return tokens


def _from_tokenizer(path: Path) -> dict[int, str] | None:
    """From tokenizer.json, the tokenizers package's format."""
    found = _json(path)
    model = found.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        tokens = _by_id(path, vocabulary)
    elif isinstance(vocabulary, list):
        tokens = _pieces(path, vocabulary)
    else:
        return None
    return tokens | _added(path, found.get("added_tokens") or [])


def _from_json_vocabulary(path: Path) -> dict[int, str] | None:
    """From vocab.json of GPT-2, RoBERTa and others; None for one vocabulary per language (Wav2Vec2)."""
    found = _json(path)
    return None if any(isinstance(value, dict) for value in found.values()) else _by_id(path, found)


def _from_lines(path: Path) -> dict[int, str]:
    """From BERT's vocab.txt: a token a line, split at line feeds alone as tokens may be other separators."""
    try:
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise _damaged(path, error) from None
    if not text:
        raise _damaged(path, "it is empty")
    return {number: line.removesuffix("\r") for number, line in enumerate(text.removesuffix("\n").split("\n"))}


def _from_sentencepiece(path: Path) -> dict[int, str] | None:
    """From a SentencePiece model."""
    from sentencepiece import SentencePieceProcessor

    try:
        with path.open("rb") as file:
            if TIKTOKEN.match(file.readline(1024)):
                return None
        model = SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise _damaged(path, error) from None
    count = model.get_piece_size()
    return dict(enumerate(model.id_to_piece(list(range(count)))))


FORMATS: tuple[tuple[str, Callable[[Path], dict[int, str] | None]], ...] = (
    ("vocab.json", _from_json_vocabulary),
    ("vocab.txt", _from_lines),
    ("tokenizer.model", _from_sentencepiece),
)
"""What is read beside added_tokens.json where there is no tokenizer.json, the first that is there. Other SentencePiece files
(``sentencepiece.bpe.model``, ``spiece.model``) are not: some models shift their ids."""


def read_tokens(files: Mapping[str, Path]) -> dict[int, str] | None:
    """The token of every id, from a tokenizer's files by name; None when none of them is of a known format.

    Strings are as the formats have them (``▁the``, ``Ġthe``, ``##s``). CheckpointError names a file that is damaged.
    """
    if "tokenizer.json" in files:
        return _from_tokenizer(files["tokenizer.json"])
    name, read = next(((name, read) for name, read in FORMATS if name in files), ("", None))
    tokens = read(files[name]) if read else None
    if tokens is not None and "added_tokens.json" in files:
        path = files["added_tokens.json"]
        tokens |= _by_id(path, _json(path))
    return tokens


def compare_tokens(base: Mapping[int, str], expert: Mapping[int, str], rows: int) -> list[tuple[int, str, str]]:
    """The ids below ``rows`` where base and expert have different tokens: (id, the base's, the expert's), in order of id.

    Where one has no token at all a row is padding, which is no disagreement.
    """
    both = sorted(number for number in base.keys() & expert.keys() if number < rows)
    return [(number, base[number], expert[number]) for number in both if base[number] != expert[number]]
