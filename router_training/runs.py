"""The first pass: rows of a stream become runs on disk, sorted so that equal questions can be brought together.

A run is an Arrow IPC file of 256 record batches. A question's rank (128 bits of a digest of seed and question) has its
bucket in the first 8 bits: batch ``b`` of every run holds the rows of bucket ``b``. So equal questions are
in the same bucket, buckets in order are ranks in order, and what one bucket needs of a run is read without the rest.
"""

from __future__ import annotations

import uuid
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router_training.hub_data import PassingError, hub_rows
from router_training.questions import DIGEST_BYTES, digest, guess_language, identity, rank
from router_training.reading import BLANK, Bad, Found, UnreadableError, line_rows, parquet_rows
from router_training.sources import Stream
from storage.errors import StoreError

BUCKETS = 256
RUN_CHARACTERS = 8 * 1024**2
"""Characters of text that a task holds before it writes them as a run."""
RUN_ROWS = 1 << 16
LISTED = 20
"""Bad rows of one source that an error lists."""


@dataclass(frozen=True)
class Reading:
    """What a stream came to."""

    stream: Stream
    lines: int = 0
    """By which numbers of the next stream of the same file are moved."""
    rows: int = 0
    """Bad ones included."""
    bad: int = 0
    cut: int = 0
    listed: tuple[tuple[int, str], ...] = ()
    """The first bad rows: number within the stream, and what is wrong."""
    runs: tuple[str, ...] = ()
    links: NDArray[np.bytes_] = field(default_factory=lambda: np.empty((0, 2), f"S{DIGEST_BYTES}"))
    """(links, 2): digests of questions, and of what their source calls them phrasings of."""
    weights: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BUCKETS, np.int64))
    """Bytes of the runs by bucket."""
    failure: str | None = None
    """Why the source cannot be read at all."""
    is_passing: bool = False
    """Whether the failure may be gone the next time: the network's."""


@dataclass
class _Held:
    """Rows that are not written yet."""

    ranks: list[bytes] = field(default_factory=list)
    groups: list[bytes] = field(default_factory=list)
    languages: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    links: set[bytes] = field(default_factory=set)
    characters: int = 0

    def add(self, row: Found, seed: int, language: str | None) -> None:
        same = identity(row.text)
        self.ranks.append(rank(seed, same))
        own = digest(same)
        group = own if row.group is None else digest(identity(row.group))
        if group != own:
            self.links.add(own + group)
        self.groups.append(group)
        self.languages.append(guess_language(row.text) if language is None else language)
        self.texts.append(row.text)
        self.characters += len(row.text)


def halves(digests: list[bytes]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Digests of 16 bytes as two columns of numbers that order as they do."""
    pairs = np.frombuffer(b"".join(digests), ">u8").reshape(-1, 2).astype(np.uint64)
    return pairs[:, 0], pairs[:, 1]


def write_ipc(path: Path, batches: list[Any], schema: Any) -> None:
    """An Arrow IPC file that is whole or not there; the same by whichever of two equal tasks comes last."""
    import pyarrow as pa

    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        with pa.OSFile(str(temporary), "wb") as sink:
            options = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)
            with pa.ipc.new_file(sink, schema, options=options) as writer:
                for batch in batches:
                    writer.write_batch(batch)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_run(path: Path, held: _Held, source: int) -> NDArray[np.int64]:
    """Write a run; bytes of text by bucket."""
    import pyarrow as pa

    high, low = halves(held.ranks)
    group_high, group_low = halves(held.groups)
    order = np.lexsort((low, high))
    batch = pa.record_batch(
        {
            "high": high, "low": low, "group_high": group_high, "group_low": group_low,
            "source": np.full(len(high), source, np.int32),
            "language": pa.array(held.languages, pa.string()), "text": pa.array(held.texts, pa.string()),
        }
    ).take(pa.array(order))  # fmt: skip
    buckets = (high >> np.uint64(56)).astype(np.int64)
    bounds = np.searchsorted(buckets[order], np.arange(BUCKETS + 1))
    pieces = [batch.slice(first, last - first) for first, last in pairwise(bounds.tolist())]
    write_ipc(path, pieces, batch.schema)
    sizes = np.array([len(text.encode("utf-8")) for text in held.texts], np.float64)
    return np.bincount(buckets, sizes, BUCKETS).astype(np.int64)


def rows_of(stream: Stream) -> Iterator[tuple[int, Found | Bad]]:
    """The rows of a stream with their numbers. UnreadableError or OSError when it cannot be read."""
    if stream.format == "hub":
        return hub_rows(stream)
    return parquet_rows(stream) if stream.format == "parquet" else line_rows(stream)


def read_stream(stream: Stream, seed: int, folder: Path, run_characters: int = RUN_CHARACTERS) -> Reading:
    """Read a stream to its end and write its rows as runs into the folder. What goes wrong is in the result, not raised."""
    held, reading = _Held(), Reading(stream)
    lines = rows = bad = cut = 0
    listed: list[tuple[int, str]] = []
    runs: list[str] = []
    links: list[NDArray[np.bytes_]] = []
    weights = np.zeros(BUCKETS, np.int64)

    def flush() -> None:
        nonlocal held, weights
        links.append(np.frombuffer(b"".join(held.links), f"S{DIGEST_BYTES}").reshape(-1, 2))
        name = f"{stream.index:04}-{stream.start:015}-{stream.hub.get('shard', 0):04}-{len(runs):05}.arrow"
        try:
            weights += _write_run(folder / name, held, stream.index)
        except OSError as error:  # this disk's fault, not the queries'
            raise StoreError(f"{folder}: {error.strerror or error}. Free space there and run again.") from None
        runs.append(name)
        held = _Held()

    try:
        for lines, row in rows_of(stream):
            if row is BLANK:
                continue
            rows += 1
            if isinstance(row, Bad):
                bad += 1
                if len(listed) < LISTED:
                    listed.append((lines, row.why))
            else:
                cut += row.is_cut
                held.add(row, seed, stream.language)
                if held.characters >= run_characters or len(held.texts) >= RUN_ROWS:
                    flush()
            if rows == stream.limit:
                break
        if held.texts:
            flush()
    except PassingError as error:
        reading = replace(reading, failure=str(error), is_passing=True)
    except (UnreadableError, OSError, EOFError, zlib.error) as error:
        shown = str(error) if isinstance(error, UnreadableError) else f"{stream.place}: {error}"
        reading = replace(reading, failure=shown)
    found = replace(reading, lines=lines, rows=rows, bad=bad, cut=cut, listed=tuple(listed))
    return replace(found, runs=tuple(runs), weights=weights, links=np.concatenate([reading.links, *links]))
