"""Where queries come from: the recipe's words for it, and the streams that can be read side by side.

A source is a file of this machine (JSON Lines, Parquet, plain text; the first and the last also as ``.gz``) or a data set
on the Hub, pinned to a commit. Sources are named as a resolved recipe names them: an absolute path, or ``org/name@commit``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import storage.queries
from storage.queries import QuerySource

TEXT = "text"
"""The column that is read when a source names none."""

Format = Literal["lines", "text", "parquet", "hub"]


class QuerySection(storage.queries.QuerySection, Protocol):
    """What the data are made of; ``pipeline.sections.RouterSection`` of a recipe, or ``Queries``."""

    @property
    def total(self) -> int | None: ...
    @property
    def bad_share(self) -> float: ...


@dataclass(frozen=True)
class Source:
    """A source without a recipe."""

    source: str
    config: str | None = None
    split: str = "train"
    column: str | None = None
    messages: str | None = None
    group: str | None = None
    language: str | None = None
    limit: int | None = None


@dataclass(frozen=True)
class Queries:
    """Sources without a recipe."""

    queries: Mapping[str, Sequence[Source]]
    outside: Sequence[Source] = ()
    total: int | None = None
    bad_share: float = 0.01


@dataclass(frozen=True)
class Columns:
    """What of a row is read."""

    text: str = TEXT
    is_chat: bool = False
    """Whether the column holds messages, of which the user's first is the query."""
    group: str | None = None

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(filter(None, (self.text, self.group))))


@dataclass(frozen=True)
class Stream:
    """A part of a source that one task reads from its beginning to its end. Small, and it pickles."""

    index: int
    """Of the source among all of the section."""
    place: str
    format: Format
    columns: Columns
    language: str | None
    limit: int | None = None
    start: int = 0
    """Of a file of lines, its first byte; of Parquet, the first row."""
    stop: int | None = None
    """Of a file of lines, the byte before which its last line begins."""
    groups: tuple[int, ...] = ()
    """Row groups of a Parquet file."""
    hub: Mapping[str, Any] = field(default_factory=dict)
    """Of a data set: config, split, and which of how many shards."""


@dataclass(frozen=True)
class Part:
    """One source of the section with its streams."""

    label: str
    """How errors name whose it is: ``expert math``, ``outside``."""
    expert: str | None
    label_of_rows: int
    """Position of the expert by name; -1 outside."""
    spec: QuerySource
    index: int
    is_local: bool
    streams: tuple[Stream, ...]


def columns_of(spec: QuerySource) -> Columns:
    """What is read of a source's rows."""
    return Columns(spec.messages or spec.column or TEXT, spec.messages is not None, spec.group)


def format_of(path: Path) -> tuple[Format, bool]:
    """How a file is read, by its name, and whether it is compressed; JSON Lines where the name tells nothing."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    packed = suffixes[-1:] == [".gz"]
    last = suffixes[-1 - packed :][:1] if len(suffixes) > packed else []
    if last == [".parquet"] and not packed:
        return "parquet", False
    return ("text" if last == [".txt"] else "lines"), packed
