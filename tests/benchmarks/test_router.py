"""The data of the router's benchmark: real, of one kind each, and never in two parts."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from benchmarks import corpora, router
from benchmarks.corpora import LONGEST, PER_FILE, Piece, distinct
from router_training.parts import each_part


def test_every_kind_is_there_and_its_pieces_have_the_size_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "MOST_FILES", 30)
    found = {**corpora.experts(0), **corpora.outside(0)}
    assert len(found) == 10
    for kind, pieces in found.items():
        assert len(pieces) >= 20, kind
        assert all(piece.text.strip() and len(piece.text) <= 2 * LONGEST for piece in pieces)
        files = [piece.file for piece in pieces]
        assert max(map(files.count, set(files))) <= PER_FILE
    assert any("gospel" in piece.text or "LORD" in piece.text for piece in found["scripture"])
    assert all(ord(max(piece.text)) > 0x2E80 for piece in found["chinese"][:20])
    assert found == {**corpora.experts(0), **corpora.outside(0)}


def test_lines_and_paragraphs_are_cut_to_what_is_drawn() -> None:
    text = "\n\n".join(f"paragraph {number} " + "of several words " * number for number in range(1, 30))
    for cut in (corpora._lines, corpora._paragraphs):
        pieces = list(cut(text, random.Random(0)))
        assert len(pieces) > 5
        assert all(len(piece) <= LONGEST for piece in pieces)
        assert len({len(piece) for piece in pieces}) > 3


def test_what_stands_in_two_places_is_in_none() -> None:
    pieces = {
        "a": [Piece("Alone", "1"), Piece("twice  in one", "1"), Piece("twice in ONE", "1"), Piece("in two files", "1")],
        "b": [Piece("in two files", "2"), *(Piece(f"piece {number}", "3") for number in range(9))],
    }
    found = distinct(pieces, 4, 0)
    assert sorted(piece.text.lower().split()[0] for piece in found["a"]) == ["alone", "twice"]
    assert len(found["b"]) == 4
    assert found == distinct(pieces, 4, 0)


def test_no_file_is_both_trained_on_and_tested_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(names: tuple[str, ...]) -> dict[str, list[Piece]]:
        return {
            name: [Piece(f"{name} {file} {row}", f"{name} {file}") for file in range(60) for row in range(5)] for name in names
        }

    monkeypatch.setattr(router, "experts", lambda _: made(("a", "b")))
    monkeypatch.setattr(router, "outside", lambda _: made(("c",)))
    data = router.data_of(3, 10_000, tmp_path)
    parts = {
        which: [text for rows in each_part(data.prepared.parts(which)) for text in rows.texts]
        for which in ("train", "validation")
    }
    files = {which: {text.rpartition(" ")[0] for text in texts} for which, texts in parts.items()}
    tested = {text.rpartition(" ")[0] for text, _ in data.test}
    for one, other in ((tested, files["train"]), (tested, files["validation"]), (files["train"], files["validation"])):
        assert not one & other
    assert tested | files["train"] | files["validation"] == {f"{name} {file}" for name in "ab" for file in range(60)}
    assert 10 <= len(tested) <= 40
    assert {label for _, label in data.test} == {0, 1}
    assert all(text.startswith("ab"[label]) for text, label in data.test)
    assert len(data.outside["c"]) == 300
    assert all(json.loads(line)["file"] not in tested for line in (tmp_path / "a.jsonl").read_text().splitlines())


def test_the_table_has_a_column_per_router_and_pairs_seeds() -> None:
    def record(accuracy: float) -> dict[str, object]:
        trace = [{"choice": "oracle", "margin": None, "accuracy": 1.0, "switches_per_1000": 7.0}]
        return dict.fromkeys(router.FIGURES, accuracy) | {"right per kind": {"a": accuracy}, "trace": trace}

    runs = [
        {"linear": record(0.5), "bert": record(0.75)},
        {"linear": record(0.75), "bert": record(0.5)},
        {"linear": record(0.625)},
    ]
    lines = router.table(runs).split("\n")
    assert lines[0] == "| | linear, 3 seeds | bert, 2 seeds |"
    assert "| accuracy, % | 62.50 ± 12.50 | 62.50 ± 17.68 |" in lines
    assert lines[-1] == "Accuracy of bert less that of linear, seed by seed: 0.00 ± 35.36 points, above 0 in 1 of 2."
