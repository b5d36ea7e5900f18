"""A section's sources, cut into streams that can be read side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from router_training.hub_data import PassingError, hub_shards
from router_training.reading import UnreadableError, parquet_groups
from router_training.settling import OUTSIDE
from router_training.sources import Part, QuerySection, Stream, columns_of, format_of
from storage.errors import ChannelMergingError, QueryDataError, SourceError
from storage.queries import UNREADABLE, QuerySource, is_local, pinned_place, placed

CHECKED_ROWS = 1000
"""Of a data set on the Hub, read before a run begins."""


def open_parts(section: QuerySection, block_bytes: int, first: int | None = None) -> list[Part]:
    """The sources of a section with their streams. ``first``: rows of a data set on the Hub that are read at most.

    QueryDataError when there is one domain only or a data set cannot be opened; SourceError when the Hub cannot be reached.
    """
    if len(section.queries) < 2:
        names = ", ".join(section.queries) or "none"
        raise QueryDataError(f"the router's queries: expected those of at least two experts to tell apart, got {names}.")
    positions = {name: position for position, name in enumerate(sorted(section.queries))}
    parts = []
    problems: list[str] = []
    for index, one in enumerate(placed(section)):
        position = OUTSIDE if one.expert is None else positions[one.expert]
        try:
            streams = tuple(_streams(one.spec, index, block_bytes, first))
        except PassingError as error:
            raise SourceError(f"{one.label}: {error}") from None
        except UnreadableError as error:
            problems.append(f"{one.label}: {error}")
        else:
            parts.append(Part(one.label, one.expert, position, one.spec, index, is_local(one.spec), streams))
    without = [f"expert {name}: no source of queries" for name, sources in sorted(section.queries.items()) if not sources]
    if problems + without:
        raise QueryDataError.listing(UNREADABLE, problems + without)
    return parts


def _streams(spec: QuerySource, index: int, block_bytes: int, first: int | None) -> Iterator[Stream]:
    columns = columns_of(spec)
    if not is_local(spec):
        yield from _shards(spec, Stream(index, spec.source, "hub", columns, spec.language, spec.limit), first)
        return
    path = Path(spec.source)
    kind, is_packed = format_of(path)
    stream = Stream(index, spec.source, kind, columns, spec.language, spec.limit)
    if kind == "parquet":
        whole = spec.limit is not None
        found = parquet_groups(path, 2**63 if whole else block_bytes)
        yield from (replace(stream, start=start, groups=groups) for start, groups in found)
    elif is_packed or spec.limit is not None or not path.is_file():
        yield stream
    else:
        size = path.stat().st_size
        for start in range(0, max(size, 1), block_bytes):
            yield replace(stream, start=start, stop=start + block_bytes)


def _shards(spec: QuerySource, stream: Stream, first: int | None) -> Iterator[Stream]:
    options = {"config": spec.config, "split": spec.split}
    if first is not None:
        stream = replace(stream, limit=min(first, spec.limit or first))
    # the first so many are in one stream
    count = hub_shards(spec, stream.columns.names) if stream.limit is None else 1
    yield from (replace(stream, hub={**options, "shards": count, "shard": shard}) for shard in range(count))


def pinned_parts(parts: Sequence[Part], errors: list[ChannelMergingError]) -> list[Part]:
    """The parts with data sets pinned, but for those that there are not: their errors are added to the list."""
    found = []
    for part in parts:
        try:
            place = part.spec.source if part.is_local else pinned_place(part.label, part.spec.source)
        except ChannelMergingError as error:
            errors.append(error)
        else:
            found.append(replace(part, streams=tuple(replace(stream, place=place) for stream in part.streams)))
    return found
