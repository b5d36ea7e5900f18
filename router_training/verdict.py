"""What was read, judged: sources that cannot be read, too many bad rows; and the same in numbers, for the router's card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from router_training.runs import LISTED, Reading
from router_training.settling import Settled
from router_training.sources import Part, Stream
from storage.errors import QueryDataError, SourceError
from storage.queries import UNREADABLE, Identities

Readings = Mapping[int, Sequence[Reading]]


def _position(stream: Stream, lines: int, number: int) -> str:
    """How a message names a row: by its line, or by its row in the file or the shard."""
    if stream.format in ("lines", "text"):
        return f"line {lines + number}"
    shards = stream.hub.get("shards", 1)
    return f"row {stream.start + number}" + (f" of shard {stream.hub['shard'] + 1} of {shards}" if shards > 1 else "")


def _listed(part: Part, readings: Sequence[Reading], bad_share: float) -> list[str]:
    """The first bad rows of a source, and how many there are besides."""
    found: list[str] = []
    lines = 0
    for reading in readings:
        found += [f"{_position(reading.stream, lines, number)}: {why}" for number, why in reading.listed]
        lines += reading.lines
    shown = [f"{part.label}: {part.spec.source} {row}" for row in found[:LISTED]]
    more = sum(reading.bad for reading in readings) - len(shown)
    noun = "lines" if part.streams[0].format in ("lines", "text") else "rows"
    allowed = f"a share of {bad_share:g} may be bad (router.bad_share)"
    return shown + ([f"{part.label}: … and {more} more {noun} of {part.spec.source}; {allowed}"] if more > 0 else [])


def refuse_unreadable(parts: Sequence[Part], readings: Readings, bad_share: float, *, first: bool = False) -> None:
    """QueryDataError for every source that is unreadable, empty, or has more bad rows than a share of ``bad_share``.

    ``first``: of data sets only the first rows were read, whose share says little of the rest: one good row will do.
    SourceError when nothing is wrong but that the Hub could not be reached.
    """
    problems: list[str] = []
    unreached: dict[str, None] = {}
    for part in parts:
        found = readings[part.index]
        failures = {reading.failure: reading.is_passing for reading in found if reading.failure is not None}
        unreached |= dict.fromkeys(f"{part.label}: {failure}" for failure, is_passing in failures.items() if is_passing)
        problems += [f"{part.label}: {failure}" for failure, is_passing in failures.items() if not is_passing]
        rows, bad = (sum(getattr(reading, name) for reading in found) for name in ("rows", "bad"))
        if not failures and not rows:
            problems.append(f"{part.label}: {part.spec.source} holds no queries")
        share = 1.0 if first and not part.is_local else bad_share
        if bad > share * rows or 0 < rows == bad:
            problems += _listed(part, found, bad_share)
    if problems:
        raise QueryDataError.listing(UNREADABLE, problems)
    if unreached:
        raise SourceError.listing("the router's queries cannot be reached", unreached)


def summed(parts: Sequence[Part], readings: Readings, settled: Sequence[Settled], identities: Identities) -> dict[str, Any]:
    """Every source by expert, and those outside: what it is known by, and what became of its rows.

    ``rows`` are all of it; of these ``unreadable``, ``repeated`` (a question of the same expert), ``shared`` (one of another
    expert's too) and ``distinct``, which can be sampled, are the parts. ``cut`` texts were too long.
    """
    known = {name: [dict(one) for one in records] for name, records in identities.experts.items()}
    outside = [dict(one) for one in identities.outside]
    order = {name: iter(records) for name, records in (*known.items(), (None, outside))}
    totals = {
        name: np.sum([getattr(found, name) for found in settled], axis=0).tolist() for name in ("kept", "repeated", "shared")
    }
    for part in parts:
        found = readings[part.index]
        record = next(order[part.expert])
        record["rows"] = sum(reading.rows for reading in found)
        record["unreadable"] = sum(reading.bad for reading in found)
        record["cut"] = sum(reading.cut for reading in found)
        record |= {"repeated": totals["repeated"][part.index], "shared": totals["shared"][part.index]}
        record["distinct"] = totals["kept"][part.index]
    return {"sources": known, "outside": outside}
