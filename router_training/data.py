"""Queries of every expert, prepared for training: read, deduplicated, sampled, split, and mixed, in bounded memory.

Two passes over the disk, each of many tasks that Dask runs wherever it runs (``tasks``):

1. *Read* (``reading``, ``hub_data``, ``runs``): blocks of files, row groups of Parquet and shards of data sets become runs on
   disk. A row has a rank, a digest of seed and question; a run holds its rows in 256 buckets by rank.
2. *Settle* (``settling``): buckets of all runs, as many at once as make 16 MiB, are brought together. Equal questions have one
   rank, so they meet here, whichever source they are from: repeats go, and so does what stands under several experts.

What is left is in order of rank, which is mixed and the same whatever order files have: the first of every expert, up to its
quota, are the sample. A question is held out by the digest of its group: of itself, or of the question that its source says it
is a phrasing of. Groups that one question belongs to both of go together. Rephrasings that no source marks are not found.

The same sources and seed give the same bytes for any blocks and workers. At no time are all rows in memory; of rows that name
a group, 32 bytes each are.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from router_training.checked import Checked, key_of
from router_training.opening import CHECKED_ROWS, open_parts, pinned_parts
from router_training.questions import DIGEST_BYTES, VALIDATION_SHARE, in_validation
from router_training.runs import BUCKETS, RUN_CHARACTERS, Reading, read_stream
from router_training.settling import OUTSIDE, Components, Settled, joined, quotas, settle
from router_training.sources import Part, QuerySection
from router_training.tasks import Runner, here, on_dask
from router_training.verdict import Readings, refuse_unreadable, summed
from storage.atomic import canonical_json, write_atomically
from storage.digests import digest_of
from storage.errors import ChannelMergingError, QueryDataError, together
from storage.queries import identify

FORMAT = 1
"""Of prepared folders: one of another format is prepared anew."""
PART_ROWS = 256
"""Rows of a part: what training takes at once, fixed, since the order of updates is part of the result."""
BLOCK_BYTES = 16 * 1024**2
PARTITION_BYTES = 16 * 1024**2
RECORD = "prepared.json"

Which = Literal["train", "validation", "outside"]


class Row(NamedTuple):
    """A prepared query."""

    text: str
    label: int
    """Position among the experts by name; -1 outside."""
    language: str


@dataclass(frozen=True)
class Sizes:
    """How the work is cut; no result depends on it."""

    block_bytes: int = BLOCK_BYTES
    """Of a file that one task reads."""
    run_characters: int = RUN_CHARACTERS
    """Held by a task that reads."""
    partition_bytes: int = PARTITION_BYTES
    """Of text that is brought together at once."""


@dataclass(frozen=True)
class Prepared:
    """Prepared queries in a folder. Small, and it pickles."""

    experts: tuple[str, ...]
    """By name."""
    folder: Path
    counts: Mapping[str, Mapping[str, int]]
    """Expert -> rows of ``train`` and ``validation``."""
    outside: int
    """Rows of no expert's kind."""
    card: dict[str, Any]
    """For ``router.json``: sources with digests and counts, sampling, split. No path, time or machine is in it."""

    def parts(self, which: Which) -> tuple[Path, ...]:
        """Parquet files of ``PART_ROWS`` rows each, the last of the rest, in order of rank: text, label (int32), language."""
        return tuple(sorted(self.folder.glob(f"{which}-*.parquet")))

    def rows(self, which: Which) -> Iterator[Row]:
        """All rows of a part in their order, a file's at once in memory."""
        import pyarrow.parquet as pq

        for path in self.parts(which):
            table = pq.read_table(path)
            yield from map(Row, *(table[name].to_pylist() for name in Row._fields))


@dataclass(frozen=True)
class _Work:
    """How and where it is done."""

    seed: int
    folder: Path
    runner: Runner
    sizes: Sizes

    @property
    def spill(self) -> Path:
        """Runs, and what is settled of them."""
        return self.folder / "spill"


def prepare(section: QuerySection, seed: int, folder: Path, runner: Runner = on_dask, sizes: Sizes | None = None) -> Prepared:
    """The queries of a router's section whose data sets are pinned, prepared into a folder; at once where they lie there.

    QueryDataError lists all that is wrong with the sources: unreadable or empty ones, a share of bad rows above ``bad_share``,
    an expert of which nothing is left. SourceError when the Hub cannot be reached.
    """
    work = _Work(seed, folder, runner, sizes or Sizes())
    identities = identify(section)
    key = digest_of([FORMAT, seed, section.total, section.bad_share, identities.covered])
    if (known := _known(folder, key)) is not None:
        return known
    shutil.rmtree(folder, ignore_errors=True)
    parts = open_parts(section, work.sizes.block_bytes)
    readings = _read(parts, work)
    identities.check()
    refuse_unreadable(parts, readings, section.bad_share)
    settled = _settle(parts, readings, work)
    experts = tuple(sorted(section.queries))
    counts, outside = _write(experts, section.total, parts, readings, settled, work)
    available = np.sum([found.available for found in settled], axis=0).tolist()
    ambiguous = sum(found.ambiguous for found in settled)
    card = {
        **summed(parts, readings, settled, identities),
        "counts": counts,
        "sampling": {"seed": seed, "total": section.total, "available": dict(zip(experts, available, strict=False))},
        "split": {"by": "question", "validation": VALIDATION_SHARE, "ambiguous": ambiguous},
    }
    shutil.rmtree(work.spill)
    record = {"key": key, "experts": experts, "outside": outside, "card": card, "parts": _sizes(folder)}
    write_atomically(folder / RECORD, canonical_json(record))
    return Prepared(experts, folder, counts, outside, card)


def check(section: QuerySection) -> None:
    """Raise what would stop ``prepare``, all of it at once, before a long run and without a cluster.

    Files of this machine are gone through as they will be. Data sets need not be pinned; of each the first rows are read, so
    that a wrong name of it, of a split or of a column is met now. What was found fit once is not read again.
    """
    errors: list[ChannelMergingError] = []
    parts = pinned_parts(open_parts(section, BLOCK_BYTES, CHECKED_ROWS), errors)
    key = None if errors else key_of(section, parts)
    if Checked().has(key):
        return
    with TemporaryDirectory() as folder:
        work = _Work(0, Path(folder) / "checked", here, Sizes())
        readings = _read(parts, work)
        try:
            refuse_unreadable(parts, readings, section.bad_share, first=True)
            if not errors and all(part.is_local for part in parts):
                settled = _settle(parts, readings, work)
                _write(tuple(sorted(section.queries)), section.total, parts, readings, settled, work)
        except ChannelMergingError as error:
            errors.append(error)
    if errors:
        raise together(errors)
    Checked().add(key)


def _known(folder: Path, key: str) -> Prepared | None:
    """What was prepared in a folder from the same sources and settings."""
    try:
        record = json.loads((folder / RECORD).read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict) or record.get("key") != key or record.get("parts") != _sizes(folder):
        return None
    card = record["card"]
    return Prepared(tuple(record["experts"]), folder, card["counts"], record["outside"], card)


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of every part."""
    return {path.name: path.stat().st_size for path in sorted(folder.glob("*.parquet"))}


def _read(parts: Sequence[Part], work: _Work) -> dict[int, list[Reading]]:
    """What every stream came to, by source."""
    work.spill.mkdir(parents=True)
    streams = [stream for part in parts for stream in part.streams]
    files = [Path(part.spec.source) for part in parts if part.is_local]
    calls = [(stream, work.seed, work.spill, work.sizes.run_characters) for stream in streams]
    try:
        found = work.runner(read_stream, calls, work.spill, files)
    except BaseException:
        shutil.rmtree(work.spill, ignore_errors=True)  # what is still at work ends when it writes there
        raise
    return {part.index: [reading for reading in found if reading.stream.index == part.index] for part in parts}


def _ranges(weights: NDArray[np.int64], limit: int) -> list[tuple[int, int]]:
    """Ranges of buckets that weigh no more than the limit each, or are one bucket."""
    bounds, held = [0], 0
    for bucket, weight in enumerate(weights.tolist()):
        if held and held + weight > limit:
            bounds.append(bucket)
            held = 0
        held += weight
    return list(zip(bounds, [*bounds[1:], BUCKETS], strict=True))


def _settle(parts: Sequence[Part], readings: Readings, work: _Work) -> list[Settled]:
    flat = [reading for part in parts for reading in readings[part.index]]
    runs = [name for reading in flat for name in reading.runs]
    labels = [part.label_of_rows for part in parts]
    weights = np.sum([reading.weights for reading in flat], axis=0)
    ranges = _ranges(weights, work.sizes.partition_bytes)
    calls = [(work.spill, runs, first, last, labels, 1 + max(labels)) for first, last in ranges]
    return work.runner(settle, calls, work.spill, [])


def _write(
    experts: Sequence[str],
    total: int | None,
    parts: Sequence[Part],
    readings: Readings,
    settled: Sequence[Settled],
    work: _Work,
) -> tuple[dict[str, dict[str, int]], int]:
    """Sample and write the parts; rows by expert and part, and those outside. QueryDataError when an expert lacks any."""
    available = np.sum([found.available for found in settled], axis=0).tolist()
    given = [*quotas(available[:-1], total), _outside_quota(available[-1], total, len(experts))]
    links = joined(reading.links for part in parts if part.expert is not None for reading in readings[part.index])
    *counted, (outside, _) = _write_parts(work.folder, work.spill, settled, given, links)
    counts = {name: {"train": train, "validation": held} for name, (train, held) in zip(experts, counted, strict=True)}
    _refuse_empty(counts)
    return counts, outside


def _outside_quota(available: int, total: int | None, experts: int) -> int:
    """As many as one expert's share: what is measured on them needs no more."""
    return available if total is None else min(available, -(-total // experts))


@dataclass
class _Writer:
    """Writes rows of one part of the data as files of ``PART_ROWS``."""

    folder: Path
    which: Which
    held: list[Any] = field(default_factory=list)
    rows: int = 0
    files: int = 0

    def add(self, table: Any) -> None:
        self.held.append(table)
        self.rows += table.num_rows
        if self.rows >= PART_ROWS:
            self._write(self.rows // PART_ROWS * PART_ROWS)

    def close(self) -> None:
        self._write(self.rows)

    def _write(self, count: int) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not count:
            return
        table = pa.concat_tables(self.held)
        for start in range(0, count, PART_ROWS):
            path = self.folder / f"{self.which}-{self.files:06}.parquet"
            part = table.slice(start, min(PART_ROWS, count - start))
            pq.write_table(part.combine_chunks(), path, compression="zstd")
            self.files += 1
        self.held, self.rows = [table.slice(count)], self.rows - count


def _first(labels: NDArray[np.int32], left: list[int]) -> NDArray[np.bool_]:
    """Which rows are among the first so many of their label; what is left of the quotas is lowered."""
    chosen = np.zeros(len(labels), bool)
    for label, quota in enumerate(left):
        mine = np.flatnonzero(labels == (label if label < len(left) - 1 else OUTSIDE))[:quota]
        chosen[mine] = True
        left[label] -= len(mine)
    return chosen


def _write_parts(
    folder: Path, spill: Path, settled: Sequence[Settled], given: Sequence[int], links: Components
) -> list[tuple[int, int]]:
    """Write the parts; rows of training and of validation by expert, and of outside at the end."""
    import pyarrow as pa

    left, counts = list(given), [[0, 0] for _ in given]
    writers = {which: _Writer(folder, which) for which in ("train", "validation", "outside")}
    for found in settled:
        with pa.memory_map(str(spill / found.name)) as file:
            table = pa.ipc.open_file(file).read_all()
        table = table.filter(pa.array(_first(table["label"].to_numpy(), left)))
        labels = table["label"].to_numpy()
        pairs = np.stack([table["group_high"].to_numpy(), table["group_low"].to_numpy()], axis=1).astype(">u8")
        groups = np.ascontiguousarray(pairs).view(f"S{DIGEST_BYTES}").reshape(-1)
        decisive = np.ascontiguousarray(links.roots_of(groups)).astype(f"S{DIGEST_BYTES}").view(">u8").reshape(-1, 2)[:, 0]
        held = in_validation(decisive)
        inner = labels != OUTSIDE
        rows = table.select(Row._fields)
        for which, chosen in (("train", inner & ~held), ("validation", inner & held), ("outside", ~inner)):
            writers[which].add(rows.filter(pa.array(chosen)))
        for label, count in enumerate(counts):
            mine = labels == (label if label < len(counts) - 1 else OUTSIDE)
            is_inner = label < len(counts) - 1
            count[0] += int((mine & ~held).sum()) if is_inner else int(mine.sum())
            count[1] += int((mine & held).sum()) if is_inner else 0
        if not any(left):
            break
    for writer in writers.values():
        writer.close()
    return [(train, held) for train, held in counts]


def _refuse_empty(counts: Mapping[str, Mapping[str, int]]) -> None:
    """QueryDataError when an expert has no query to train on, or none to measure with."""
    problems = []
    for part, name in (("train", "training"), ("validation", "validation")):
        empty = [expert for expert, rows in counts.items() if not rows[part]]
        if empty:
            problems.append(
                f"no {name} queries are left for {', '.join(empty)} after duplicates are removed and {VALIDATION_SHARE:.0%} "
                "are held out. Give at least 50 different ones per expert."
            )
    if problems:
        raise QueryDataError.listing("the router's queries", problems)
