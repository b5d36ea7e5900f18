"""Sources of the router's queries: what a recipe says of one, and what its content is known by.

A source is a file of this machine or a data set on the Hub; here neither is read but for its digest or its commit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from storage.digests import DigestCache, stamp
from storage.errors import QueriesChangedError, QueryDataError
from storage.files import is_same
from storage.places import split_revision

UNREADABLE = "the router's queries cannot be read"
SETTINGS = ("column", "messages", "group", "language", "limit")
"""Of a source, besides where it lies: what its rows become."""


class QuerySource(Protocol):
    """One source of queries; ``pipeline.sections.QuerySource`` of a recipe."""

    @property
    def source(self) -> str:
        """As a loaded recipe names it: an absolute path, or ``org/name[@revision]``."""
        ...

    @property
    def config(self) -> str | None: ...
    @property
    def split(self) -> str: ...
    @property
    def column(self) -> str | None: ...
    @property
    def messages(self) -> str | None: ...
    @property
    def group(self) -> str | None: ...
    @property
    def language(self) -> str | None: ...
    @property
    def limit(self) -> int | None: ...


class QuerySection(Protocol):
    """Sources of queries by expert, and of queries of no expert's kind; ``pipeline.sections.RouterSection`` of a recipe."""

    @property
    def queries(self) -> Mapping[str, Sequence[QuerySource]]: ...
    @property
    def outside(self) -> Sequence[QuerySource]: ...


@dataclass(frozen=True)
class Placed:
    """A source with its place in the section."""

    expert: str | None
    """None outside."""
    spec: QuerySource

    @property
    def label(self) -> str:
        """How errors name whose it is."""
        return "outside" if self.expert is None else f"expert {self.expert}"

    @property
    def key(self) -> str:
        """The recipe's key."""
        return "router.outside" if self.expert is None else f"router.queries.{self.expert}"


def placed(section: QuerySection) -> Iterator[Placed]:
    """All sources: the experts' by name, each one's in their order, then those outside."""
    for expert, sources in sorted(section.queries.items()):
        yield from (Placed(expert, spec) for spec in sources)
    yield from (Placed(None, spec) for spec in section.outside)


def is_local(spec: QuerySource) -> bool:
    """Whether a source is a file of this machine."""
    return spec.source.startswith("/")


@dataclass(frozen=True)
class QueryFile:
    """A file of queries as it was when it was hashed."""

    key: str
    """The recipe's."""
    path: Path
    stamp: list[int]
    sha256: str


@dataclass(frozen=True)
class Identities:
    """What the content of a section's sources is known by. Small, and it pickles."""

    experts: Mapping[str, tuple[dict[str, Any], ...]]
    """By expert and source: the sha256 of a file, or data set and commit; and what of it is read. No paths."""
    outside: tuple[dict[str, Any], ...]
    files: tuple[QueryFile, ...]

    @property
    def covered(self) -> dict[str, Any]:
        """All of it that determines a result, as a JSON value."""
        return {"queries": {name: list(records) for name, records in self.experts.items()}, "outside": list(self.outside)}

    def check(self) -> None:
        """QueryDataError when a file is no longer what was hashed."""
        changed = [file for file in self.files if not is_same(file.path, file.stamp, file.sha256)]
        if changed:
            keys = ", ".join(dict.fromkeys(file.key for file in changed))
            raise QueriesChangedError(f"{keys}: the file changed while the run read it. Run again.")


NOTHING = Identities({}, (), ())
"""Where there is no router."""


def _record(spec: QuerySource, digest: str | None) -> dict[str, Any]:
    settings = {name: value for name in SETTINGS if (value := getattr(spec, name)) is not None}
    if digest is not None:
        kind = Path(spec.source.removesuffix(".gz")).suffix.lower()  # the name says how a file is read
        return {"sha256": digest, **({"read_as": kind} if kind in (".parquet", ".txt") else {}), **settings}
    name, commit = split_revision(spec.source)
    config = {} if spec.config is None else {"config": spec.config}
    return {"dataset": name, "commit": commit, "split": spec.split, **config, **settings}


def identify(section: QuerySection) -> Identities:
    """The identities of a section whose data sets are pinned. QueryDataError lists files that cannot be read."""
    found: dict[str | None, list[dict[str, Any]]] = {expert: [] for expert in (*sorted(section.queries), None)}
    files, problems = [], []
    for one in placed(section):
        if not is_local(one.spec):
            found[one.expert].append(_record(one.spec, None))
            continue
        path = Path(one.spec.source)
        try:
            seen = stamp(path.resolve())
            digest = DigestCache().sha256([path])[path]
        except OSError as error:
            problems.append(f"{one.label}: {path}: {error}")
            continue
        files.append(QueryFile(one.key, path, seen, digest))
        found[one.expert].append(_record(one.spec, digest))
    if problems:
        raise QueryDataError.listing(UNREADABLE, problems)
    outside = tuple(found.pop(None))
    return Identities({str(name): tuple(records) for name, records in found.items()}, outside, tuple(files))


def pinned_place(label: str, place: str) -> str:
    """A source's place with a data set's revision as the commit that it names now.

    QueryDataError when there is no such data set, SourceError when the Hub cannot be reached.
    """
    if place.startswith("/"):
        return place
    from storage.hub_datasets import open_dataset

    return open_dataset(label, *split_revision(place)).place
