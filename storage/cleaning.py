"""Leftovers of a delta store and an output: found, and removed.

``storage.needed`` says what artifacts and runs need. Whatever does not look like this program's own is left where it is, and
published versions are never touched. What is a leftover is decided again right before it is removed, on a local disk under the
lock that a run takes to write it; so a run that begins meanwhile finds it whole, or makes it anew.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from storage import leases
from storage.arrays import COMPLETE
from storage.artifact import WORK
from storage.atomic import canonical_json
from storage.deltas import BASE, JOB, TABLES, THRESHOLDS
from storage.layout import DOCUMENTS
from storage.local_store import LOCK, TEMPORARY
from storage.needed import (
    ALIAS,
    ID,
    BusyError,
    Run,
    Seen,
    Survey,
    got,
    is_recent,
    is_released,
    needed_places,
    raise_busy,
    records_of,
    see,
    survey,
)
from storage.publishing import LOCK as PUBLISH
from storage.stores import Store

EXPERT, RECORD, WORKPLACE, VERSION, NAME, PARTIAL = (
    "expert", "run record", "unfinished run", "version", "version name", "temporary file",
)  # fmt: skip
"""Kinds of leftovers, beside ``base``, ``tables`` and ``thresholds``."""
PARTIAL_AGE = timedelta(days=1)
_PARTIAL = re.compile(rf"\..+\.[0-9a-f]{{8}}{re.escape(TEMPORARY)}")
_ARRAYS = re.compile(r"(?:.+/)?(?:zarr\.json|complete\.json|c(?:\.\d+)+)|receipts/.+\.json")
_OURS = {
    EXPERT: _ARRAYS,
    BASE: _ARRAYS,
    TABLES: _ARRAYS,
    THRESHOLDS: re.compile(r"[0-9a-f]{40}\.json"),
    VERSION: re.compile("|".join([r"pool.*|experts/.+|router/.+", *map(re.escape, DOCUMENTS)])),
}
"""The names of files in what is removed. Others stay, with the folder that they lie in."""
_Found = tuple[str, str, str]
"""Key, kind and reason."""


class _NeededError(Exception):
    """What was a leftover is none any more."""


@dataclass(frozen=True)
class Leftover:
    """Something that nothing needs."""

    store: Store
    key: str
    kind: str
    reason: str
    bytes: int
    files: int

    @property
    def place(self) -> str:
        return f"{self.store.place}/{self.key}"


@dataclass(frozen=True)
class Cleaned:
    """What was found, or removed."""

    leftovers: tuple[Leftover, ...]
    notes: tuple[str, ...]
    removed: bool


def _in_deltas(found: Survey) -> Iterator[_Found]:
    """What of the delta store nothing needs."""
    deltas, day = found.deltas, _day(found.since)
    needed = needed_places(deltas, found.uses())
    unused = f"no artifact has it, and no run since {day}"
    reasons = {
        EXPERT: unused,
        BASE: f"no artifact has an expert of it, and no run since {day}",
        TABLES: f"no artifact has these experts together, and no run since {day}",
        THRESHOLDS: unused,
    }
    for base in found.bases:
        names = deltas.children(base)
        groups = [(f"{base}/{name}", BASE if name == BASE else EXPERT) for name in names if name == BASE or ID.fullmatch(name)]
        for kind in (TABLES, THRESHOLDS):
            groups += [(f"{base}/{kind}/{name}", kind) for name in deltas.children(f"{base}/{kind}") if ID.fullmatch(name)]
        yield from ((key, kind, reasons[kind]) for key, kind in groups if deltas.under(key).place not in needed)
    for key, run in sorted(found.records.items()):
        if run is not None and found.is_spent(key):
            yield key, RECORD, f"its run began on {_day(run.started)}, and {run.output} has no artifact of it"


def _in_output(seen: Seen) -> Iterator[_Found]:
    """What of an output's unfinished work nothing needs. Pure."""
    for name in sorted(seen.jobs.keys() - seen.kept):
        run = seen.jobs[name]
        began = f"it began on {_day(run.started)}" if run is not None else "it does not say when it began"
        yield f"{WORK}/{name}", WORKPLACE, f"{began}, and no run is at work on it"
    for version in seen.bare:
        if not seen.is_completable(version):
            yield version, VERSION, "it has no manifest, and no unfinished run can complete it"
    for inputs, version in seen.names:
        if version not in seen.artifacts and not seen.is_completable(version):
            yield f"{WORK}/{inputs}.{version}{ALIAS}", NAME, f"there is no version {version}"


def _day(when: datetime) -> str:
    return when.astimezone(UTC).date().isoformat()


def _temporary(store: Store, folders: Sequence[str], before: datetime) -> Iterator[Leftover]:
    """Old files under way in these folders of a local disk; ``""`` is the store's own, without those below it."""
    for folder in folders if store.is_local else ():
        for path, below, names in os.walk(Path(store.place) / folder):
            if not folder:
                below.clear()
            for name in filter(_PARTIAL.fullmatch, names):
                with suppress(FileNotFoundError):
                    status = (Path(path) / name).stat()
                    written = datetime.fromtimestamp(status.st_mtime, UTC)
                    if written < before:
                        key = (Path(path) / name).relative_to(store.place).as_posix()
                        yield Leftover(store, key, PARTIAL, f"last written on {_day(written)}", status.st_size, 1)


def _measured(store: Store, one: _Found, notes: list[str]) -> Leftover | None:
    """A leftover with its size; None when all in it is a stranger's."""
    key, kind, reason = one
    if kind in (RECORD, NAME):
        return Leftover(store, key, kind, reason, len(got(store, key) or b""), 1)
    sizes, ours = _files(store, key, kind)
    if len(ours) < len(sizes):
        strange = sorted(sizes.keys() - ours.keys())
        notes.append(f"{store.place}/{key} holds what is not ours ({', '.join(strange[:3])}); that is left")
    return Leftover(store, key, kind, reason, sum(ours.values()), len(ours)) if ours or not sizes else None


def _files(store: Store, key: str, kind: str) -> tuple[dict[str, int], dict[str, int]]:
    """All files below a key, and those of its kind."""
    sizes, pattern = store.sizes(key), _OURS.get(kind)
    ours = {name: size for name, size in sizes.items() if pattern is None or pattern.fullmatch(name[len(key) + 1 :])}
    return sizes, ours


def leftovers(found: Survey, now: datetime) -> tuple[list[Leftover], list[str]]:
    """What nothing needs, and notes on what was left out."""
    notes: list[str] = []
    listed = [_measured(found.deltas, one, notes) for one in _in_deltas(found)]
    listed += [_measured(found.output, one, notes) for one in _in_output(found.own)]
    items = [one for one in listed if one is not None]
    gone = tuple(f"{one.place}/" for one in items)
    folders = ["", WORK, *found.own.bare] if found.has_output else []
    partial = [
        *_temporary(found.deltas, found.bases, now - PARTIAL_AGE),
        *_temporary(found.output, folders, now - PARTIAL_AGE),
    ]
    return items + [one for one in partial if not one.place.startswith(gone)], notes


def _remove(found: Survey, item: Leftover) -> None:
    """Remove one thing. BusyError when a run has its lock; _NeededError when it is no leftover by now."""
    if item.kind == PARTIAL:
        with suppress(FileNotFoundError):
            (Path(item.store.place) / item.key).unlink()
    elif item.kind == RECORD:
        if Run.parsed(got(item.store, item.key) or b"") != found.records[item.key]:
            raise _NeededError
        item.store.delete([item.key])
    elif item.kind == WORKPLACE:
        with item.store.lock(item.key, raise_busy):
            if is_recent(Run.parsed(got(item.store, f"{item.key}/{JOB}") or b""), found.since):
                raise _NeededError
            item.store.clear(item.key)
    elif item.kind in (VERSION, NAME):
        with item.store.lock(PUBLISH, raise_busy):
            if item.key not in {key for key, _, _ in _in_output(see(item.store, found.since) or Seen())}:
                raise _NeededError
            _take(item)
    else:
        _remove_from_deltas(found, item)


def _remove_from_deltas(found: Survey, item: Leftover) -> None:
    """Under the lock that those who write it take: what a run has written down before that counts, and the next one waits."""
    base = item.key.partition("/")[0]
    folder, _, name = item.key.rpartition("/")
    is_locked = item.store.is_local and item.kind != THRESHOLDS
    with item.store.under(folder).lock(name, raise_busy) if is_locked else nullcontext():
        fresh = {run.use for key, run in records_of(item.store, base).items() if run and run != found.records.get(key)}
        if item.store.under(item.key).place in needed_places(item.store, fresh):
            raise _NeededError
        _take(item)


def _take(item: Leftover) -> None:
    """Remove files that are ours; what declares them whole goes first."""
    if item.kind == NAME:
        item.store.delete([item.key])
        return
    item.store.delete([f"{item.key}/{COMPLETE}"])
    sizes, ours = _files(item.store, item.key, item.kind)
    if len(ours) == len(sizes):
        item.store.clear(item.key)
    else:
        item.store.delete(ours)


def _prune(deltas: Store, base: str) -> None:
    """Remove what is left of a base on a local disk when no file is: folders, and locks that nobody holds."""
    if not deltas.is_local or deltas.sizes(base):
        return
    for path, _, names in os.walk(Path(deltas.place) / base, topdown=False):
        for name in names:
            if name.startswith(".") and name.endswith(LOCK):
                with suppress(BusyError), deltas.under(base).lock(_lock_name(deltas, base, path, name), raise_busy):
                    (Path(path) / name).unlink(missing_ok=True)
        with suppress(OSError):  # something is in it
            Path(path).rmdir()


def _lock_name(deltas: Store, base: str, folder: str, file: str) -> str:
    """The name of the lock, below a base, whose file this is."""
    return (Path(folder) / file[1:].removesuffix(LOCK)).relative_to(Path(deltas.place) / base).as_posix()


def release_silent(store: Store, names: Sequence[str], tell: Callable[[str], None]) -> None:
    """Free those locks of an object store that show no sign of life for as long as a lease lasts; all are watched at once.

    As one who waits for such a lock takes it over. ``tell`` is called before the wait, when there is one.
    """
    keys = [f"{name}{leases.LEASE}" for name in names]
    watched = {key: state[1] for key in keys if (state := store.tagged(key)) is not None and not is_released(state[0])}
    if watched:
        tell(f"{store.place}: looking for {leases.LEASE_TTL_S:g} s whether those who hold {len(watched)} locks are alive")
    end = time.monotonic() + leases.LEASE_TTL_S
    while watched and time.monotonic() < end:
        time.sleep(leases.LEASE_POLL_S)
        watched = {key: tag for key, tag in watched.items() if (state := store.tagged(key)) is not None and state[1] == tag}
    for key, tag in watched.items():
        store.swap(key, canonical_json({"owner": "", "beat": 0, "released": True}), tag)


def clean(
    deltas: Store,
    output: Store,
    days: float,
    *,
    delete: bool,
    tell: Callable[[str], None],
    now: datetime | None = None,
) -> Cleaned:
    """Find what no artifact needs, nor a run that began within so many days or is at work; remove it with ``delete``.

    Without, nothing is written. ``tell`` takes what to say before a wait. StoreError when a place cannot be reached or written.
    """
    now = now or datetime.now(UTC)
    since = now - timedelta(days=days)
    if delete and not output.is_local:
        old = [name for name in output.children(WORK) if ID.fullmatch(name) and not is_recent(_job(output, name), since)]
        release_silent(output, [PUBLISH, *(f"{WORK}/{name}" for name in old)], tell)
    found = survey(deltas, output, since)
    items, notes = leftovers(found, now)
    notes = [*found.notes, *_held(found, delete=delete), *notes]
    if not delete:
        return Cleaned(tuple(items), tuple(notes), removed=False)
    gone = []
    for item in items:
        try:
            _remove(found, item)
            gone.append(item)
        except BusyError:
            notes.append(f"{item.place} is left: a run holds its lock")
        except _NeededError:
            notes.append(f"{item.place} is left: a run that has just begun needs it")
    for base in set(found.bases) - {base for base, _ in found.uses()}:
        _prune(deltas, base)
    return Cleaned(tuple(gone), tuple(notes), removed=True)


def _job(output: Store, name: str) -> Run | None:
    return Run.parsed(got(output, f"{WORK}/{name}/{JOB}") or b"")


def _held(found: Survey, *, delete: bool) -> list[str]:
    """Notes on old unfinished runs that are kept for their locks."""
    held = sorted(name for name in found.own.kept if not is_recent(found.own.jobs[name], found.since))
    is_sure = found.output.is_local or delete
    why = "a run holds its lock" if is_sure else "a run holds its lock, or was killed; --delete looks which"
    return [f"{found.output.place}/{WORK}/{name} is left: {why}" for name in held]
