"""Real text of eight kinds for the router, from what an installation of this project has on its disk; nothing is downloaded.

Cut into pieces of the size of queries. Every piece knows its file, so that one file's pieces are never both trained on and
tested with. Which files there are depends on the packages installed beside the project: their number is printed.
"""

from __future__ import annotations

import ast
import json
import random
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

TEXTS = Path(__file__).parent.parent / "examples" / "tiny-mistral"
LIBRARY = Path(sysconfig.get_paths()["stdlib"])
PACKAGES = Path(sysconfig.get_paths()["purelib"])
SHORTEST, LONGEST = 40, 240
"""Characters of a piece; those of languages that write a word in few characters are as short as they come."""
PER_FILE = 12
"""Pieces of one file, so that no file is most of a kind."""
BLOCK_LINES = 8
"""Lines of the examples' texts that count as one file: of these kinds there is one file only."""
MOST_FILES = 1500
MOST_BYTES = 1_000_000
DESCRIBED = ("numpy", "scipy", "pandas", "sklearn")
"""Packages whose documentation is read."""


@dataclass(frozen=True)
class Piece:
    """A text of the size of a query."""

    text: str
    file: str


def _content(path: Path) -> str:
    try:
        return path.read_text("utf-8") if path.stat().st_size <= MOST_BYTES else ""
    except (OSError, UnicodeDecodeError):
        return ""


def _lines(text: str, draw: random.Random) -> Iterator[str]:
    """Runs of consecutive lines, of a length that is drawn for each; blank lines end nothing."""
    held, wanted = "", draw.randint(SHORTEST, LONGEST)
    for line in text.split("\n"):
        if not line.strip():
            continue
        held = f"{held}\n{line}" if held else line.lstrip()
        if len(held) >= wanted:
            yield held[:LONGEST].rstrip()
            held, wanted = "", draw.randint(SHORTEST, LONGEST)


def _paragraphs(text: str, draw: random.Random) -> Iterator[str]:
    """Paragraphs as one line each, cut at a word where they are longer than what is drawn. Tables and rulers are left out."""
    for paragraph in re.split(r"\n\s*\n", text):
        words = " ".join(paragraph.split())
        if len(words) >= SHORTEST and sum(map(str.isalpha, words)) > 0.6 * len(words):
            wanted = draw.randint(SHORTEST, LONGEST)
            yield words if len(words) <= wanted else words[:wanted].rpartition(" ")[0] or words[:wanted]


Cut = Callable[[str, random.Random], Iterator[str]]


def _pieces(files: Iterator[tuple[str, str]], cut: Cut, draw: random.Random) -> list[Piece]:
    """Pieces of files given by name and content: of each a few, drawn."""
    found = []
    for name, content in files:
        pieces = list(cut(content, draw))
        found += [Piece(text, name) for text in draw.sample(pieces, min(PER_FILE, len(pieces)))]
    return found


def _files(folders: list[Path], pattern: str, draw: random.Random, without: str = r"$^") -> Iterator[tuple[str, str]]:
    unwanted = re.compile(without)
    paths = sorted(path for folder in folders for path in folder.rglob(pattern) if not unwanted.search(str(path)))
    for path in draw.sample(paths, min(MOST_FILES, len(paths))):
        yield str(path), _content(path)


def _documentation(draw: random.Random) -> Iterator[tuple[str, str]]:
    """The docstrings of a module each: their paragraphs, without examples and lists of parameters."""
    for name, content in _files([PACKAGES / package for package in DESCRIBED], "*.py", draw, r"/tests?/|/_vendor/"):
        try:
            tree = ast.parse(content)
        except (SyntaxError, ValueError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        found = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
        yield name, "\n\n".join(re.split(r"\n\w[\w ]+\n-{3,}\n|\n\s*>>> ", text)[0] for text in found)


def _descriptions(draw: random.Random) -> Iterator[tuple[str, str]]:
    """What packages say of themselves on their index page: the text below the headers of METADATA."""
    for name, content in _files([PACKAGES], "METADATA", draw):
        yield name, content.partition("\n\n")[2]


def _topics(draw: random.Random) -> Iterator[tuple[str, str]]:
    """Python's language reference as its help shows it; a topic is a file."""
    from pydoc_data.topics import topics

    yield from sorted(topics.items())


def _example(name: str) -> Iterator[tuple[str, str]]:
    """Lines of the demo's texts and queries, in blocks that count as files."""
    queries = [json.loads(line)["text"] for line in (TEXTS / "queries" / f"{name}.jsonl").read_text("utf-8").splitlines()]
    lines = (TEXTS / "texts" / f"{name}.txt").read_text("utf-8").split("\n") if name != "math" else []
    kept = [line for line in lines if len(line) > 4 and not line.startswith((" --", "作者"))]
    for part in (queries, kept):
        for start in range(0, len(part), BLOCK_LINES):
            yield f"{name} {part is kept} {start}", "\n".join(part[start : start + BLOCK_LINES])


def _as_they_are(text: str, draw: random.Random) -> Iterator[str]:
    yield from text.split("\n")


def experts(seed: int) -> dict[str, list[Piece]]:
    """Pieces of the eight kinds that have an expert. The seed draws files and pieces."""
    draw = random.Random(seed)  # noqa: S311 - no cryptography
    torch, numpy = PACKAGES / "torch" / "include", PACKAGES / "numpy" / "_core" / "include"
    return {
        "python": _pieces(
            _files([LIBRARY], "*.py", draw, r"site-packages|/test/|lib2to3|pydoc_data|/encodings/"), _lines, draw
        ),
        "cpp": _pieces(_files([torch, numpy], "*.h", draw), _lines, draw),
        "documentation": _pieces(_documentation(draw), _paragraphs, draw),
        "licence": _pieces(_files([PACKAGES], "*LICENSE*", draw, r"\.py"), _paragraphs, draw),
        "description": _pieces(_descriptions(draw), _paragraphs, draw),
        "scripture": _pieces(_example("prose"), _as_they_are, draw),
        "chinese": _pieces(_example("chinese"), _as_they_are, draw),
        "arithmetic": _pieces(_example("math"), _as_they_are, draw),
    }


def outside(seed: int) -> dict[str, list[Piece]]:
    """Pieces of two kinds that no expert is for: one beside documentation, one beside code."""
    draw = random.Random(seed)  # noqa: S311 - no cryptography
    return {
        "python's reference": _pieces(_topics(draw), _paragraphs, draw),
        "cmake": _pieces(_files([PACKAGES / "torch"], "*.cmake", draw), _lines, draw),
    }


def distinct(pieces: dict[str, list[Piece]], most: int, seed: int) -> dict[str, list[Piece]]:
    """At most so many of each kind; none that is, but for spaces and case, in two files or two kinds."""
    homes: dict[str, set[tuple[str, str]]] = {}
    for kind, found in pieces.items():
        for piece in found:
            homes.setdefault(" ".join(piece.text.lower().split()), set()).add((kind, piece.file))
    draw, kept = random.Random(seed), {}  # noqa: S311 - no cryptography
    for kind, found in pieces.items():
        alone: dict[str, Piece] = {}
        for piece in found:
            same = " ".join(piece.text.lower().split())
            if len(homes[same]) == 1:
                alone.setdefault(same, piece)
        kept[kind] = draw.sample(sorted(alone.values(), key=lambda piece: piece.text), min(most, len(alone)))
    return kept
