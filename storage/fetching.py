"""Ranges of an artifact's files, fetched several at once into files of a local folder; what came outlives a death.

A journal beside the files says which ranges came. It is not synced with them: in the end all is compared with its sha256, and
what is not as it should be is fetched once more.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from storage.artifact import PARALLEL, RANGE_BYTES
from storage.digests import digest_of
from storage.errors import ArtifactError, StoreError
from storage.stores import Store

BRIDGED_BYTES = 128 * 1024
"""What lies between two ranges is fetched along up to this size: it takes no longer than a request of its own."""

FILES = "files"
_HASHED_BYTES = 1 << 20

Progress = Callable[[int, int], None]
"""Told the bytes that are here, and those there will be."""


@dataclass(frozen=True)
class Part:
    """Bytes of a file that are wanted, and where they go."""

    start: int
    """In the file they are fetched from."""
    length: int
    target: str
    offset: int
    """In the target."""

    @property
    def stop(self) -> int:
        return self.start + self.length


@dataclass(frozen=True)
class Range:
    """Bytes [start, stop) of a file, fetched by one request."""

    key: str
    start: int
    stop: int
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Check:
    """Bytes of a target that are known by their sha256."""

    target: str
    offset: int
    length: int
    sha256: str
    label: str
    """What they are, for a message."""


@dataclass(frozen=True)
class Plan:
    """What is fetched, and what comes of it."""

    sizes: Mapping[str, int]
    """Target -> bytes."""
    heads: Mapping[str, bytes]
    """Target -> what it begins with that is not fetched."""
    ranges: Sequence[Range]
    checks: Sequence[Check]

    @property
    def nbytes(self) -> int:
        """Bytes that are fetched."""
        return sum(part.stop - part.start for part in self.ranges)

    @property
    def digest(self) -> str:
        """What identifies it: a journal of another plan says nothing of this one."""
        ranges = [[r.key, r.start, r.stop, [[p.start, p.length, p.target, p.offset] for p in r.parts]] for r in self.ranges]
        heads = {target: hashlib.sha256(head).hexdigest() for target, head in self.heads.items()}
        return digest_of([dict(self.sizes), heads, ranges, [check.sha256 for check in self.checks]])


def cut(key: str, wanted: Iterable[Part]) -> list[Range]:
    """The ranges that fetch these parts of a file: neighbours together, at most ``RANGE_BYTES`` each. Pure.

    Parts do not overlap. One that is too large is cut; small gaps between parts are fetched along.
    """
    groups: list[list[Part]] = []
    for part in sorted(wanted, key=lambda part: part.start):
        for at in range(0, part.length, RANGE_BYTES):
            piece = Part(part.start + at, min(RANGE_BYTES, part.length - at), part.target, part.offset + at)
            if groups and _is_near(piece, groups[-1]):
                groups[-1].append(piece)
            else:
                groups.append([piece])
    return [Range(key, group[0].start, group[-1].stop, tuple(group)) for group in groups]


def _is_near(piece: Part, group: Sequence[Part]) -> bool:
    return piece.start - group[-1].stop <= BRIDGED_BYTES and piece.stop - group[0].start <= RANGE_BYTES


class Journal:
    """Which ranges of a plan came: a line each, after the plan's digest."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()

    def known(self, plan: Plan) -> set[int]:
        """Numbers of the ranges that came; empty when the journal is of another plan."""
        try:
            first, *lines = self._path.read_text("ascii").split("\n")[:-1]  # behind the last line's end nothing is whole
        except (FileNotFoundError, ValueError):
            return set()
        return {int(line) for line in lines if line.isdigit()} if first == plan.digest else set()

    def begin(self, plan: Plan, came: Iterable[int] = ()) -> None:
        """Write it anew."""
        partial = self._path.with_suffix(".part")
        partial.write_text("\n".join([plan.digest, *map(str, sorted(came)), ""]), "ascii")
        partial.replace(self._path)

    def add(self, number: int) -> None:
        with self._lock, self._path.open("a", encoding="ascii") as file:
            file.write(f"{number}\n")


@dataclass(frozen=True)
class Transfer:
    """A plan under way: from a store into ``<folder>/files``, with the journal beside them."""

    store: Store
    plan: Plan
    folder: Path
    progress: Progress
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def files(self) -> Path:
        """Where the targets lie."""
        return self.folder / FILES

    def run(self) -> None:
        """Fetch what is not here yet, and compare all of it with its sha256.

        ArtifactError when the store's files are not what the plan says, StoreError when it cannot be reached or the disk is
        full; what came is kept in both cases.
        """
        journal = Journal(self.folder / "journal")
        came = journal.known(self.plan) if self._is_laid_out() else set()
        if not came:
            self._lay_out()
        self._check_room(came)
        journal.begin(self.plan, came)
        self._fetch(set(range(len(self.plan.ranges))) - came, journal)
        if again := self._to_repeat(self._failed()):
            journal.begin(self.plan, set(range(len(self.plan.ranges))) - again)
            self._fetch(again, journal)
            if failed := self._failed():
                journal.begin(self.plan, set(range(len(self.plan.ranges))) - self._to_repeat(failed))
                raise ArtifactError.listing(
                    f"{self.store.place} is damaged: verify it, and publish it again",
                    [f"{check.label}: expected sha256 {check.sha256}, got another, twice" for check in failed],
                )

    def _is_laid_out(self) -> bool:
        paths = {target: self.files / target for target in self.plan.sizes}
        return all(path.is_file() and path.stat().st_size == self.plan.sizes[target] for target, path in paths.items())

    def _lay_out(self) -> None:
        """Every target with its beginning and its full size."""
        shutil.rmtree(self.files, ignore_errors=True)
        self.files.mkdir()
        for target, size in self.plan.sizes.items():
            path = self.files / target
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.plan.heads.get(target, b""))
            os.truncate(path, size)

    def _check_room(self, came: set[int]) -> None:
        here = sum(part.stop - part.start for number, part in enumerate(self.plan.ranges) if number in came)
        needed, free = self.plan.nbytes - here, shutil.disk_usage(self.folder).free
        if needed > free:
            raise StoreError(
                f"{self.folder}: {needed} bytes are to come, there is room for {free}. Free space there and run again."
            )

    def _fetch(self, numbers: set[int], journal: Journal) -> None:
        total = self.plan.nbytes
        missing = sum(self.plan.ranges[number].stop - self.plan.ranges[number].start for number in numbers)
        here = [total - missing]
        self.progress(here[0], total)

        def one(number: int) -> None:
            wanted = self.plan.ranges[number]
            self._write(wanted, self._read(wanted))
            journal.add(number)
            with self._lock:
                here[0] += wanted.stop - wanted.start
                self.progress(here[0], total)

        with ThreadPoolExecutor(PARALLEL) as pool:
            for _ in pool.map(one, sorted(numbers)):  # the first failure ends the others
                pass

    def _read(self, wanted: Range) -> bytes:
        where = f"{self.store.place}/{wanted.key}"
        try:
            data = self.store.read(wanted.key, wanted.start, wanted.stop)
        except FileNotFoundError:
            raise ArtifactError(f"{where} is missing. Publish the artifact again.") from None
        if len(data) != wanted.stop - wanted.start:
            raise ArtifactError(
                f"{where}: expected {wanted.stop - wanted.start} bytes from byte {wanted.start} on, got {len(data)}: it is cut "
                "short. Publish the artifact again."
            )
        return data

    def _write(self, wanted: Range, data: bytes) -> None:
        view = memoryview(data)
        for part in wanted.parts:
            piece = view[part.start - wanted.start : part.stop - wanted.start]
            try:
                with (self.files / part.target).open("r+b", buffering=0) as file:
                    done = 0
                    while done < len(piece):
                        done += os.pwrite(file.fileno(), piece[done:], part.offset + done)
            except OSError as error:
                raise StoreError(
                    f"{self.folder}: {error.strerror}. Free space there, or make it writable, and run again: what came is kept."
                ) from None

    def _failed(self) -> list[Check]:
        """Checks of bytes that are not what they should be."""
        with ThreadPoolExecutor(PARALLEL) as pool:
            found = pool.map(self._sha256, self.plan.checks)
            return [check for check, sha256 in zip(self.plan.checks, found, strict=True) if sha256 != check.sha256]

    def _sha256(self, check: Check) -> str:
        digest, left = hashlib.sha256(), check.length
        with (self.files / check.target).open("rb") as file:
            file.seek(check.offset)
            while left and (data := file.read(min(left, _HASHED_BYTES))):
                digest.update(data)
                left -= len(data)
        return digest.hexdigest()

    def _to_repeat(self, failed: Sequence[Check]) -> set[int]:
        """Ranges that wrote any of the bytes these checks are about."""
        doubted: dict[str, list[Check]] = {}
        for check in failed:
            doubted.setdefault(check.target, []).append(check)
        return {
            number
            for number, wanted in enumerate(self.plan.ranges)
            for part in wanted.parts
            for check in doubted.get(part.target, ())
            if part.offset < check.offset + check.length and check.offset < part.offset + part.length
        }


def no_progress(here: int, total: int) -> None:
    """Tell nobody."""
