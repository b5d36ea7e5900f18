"""What artifacts and runs need of a delta store, by what outputs and the store's run records say.

Needed is what the manifests of the recipe's output name, of all outputs in the store's run records that can be looked at, and
what recent or running runs name. Of an output that cannot be looked at, the record stands for its artifacts. Nothing is
written.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from storage import leases
from storage.artifact import WORK
from storage.deltas import BASE, JOB, RUNS, TABLES, THRESHOLDS, base_group, expert_group, table_group
from storage.digests import ID_LENGTH
from storage.errors import StoreError
from storage.layout import LATEST, MANIFEST
from storage.local_store import LOCK
from storage.manifest import VERSION_LENGTH
from storage.places import OBJECT_STORES, scheme_of
from storage.stores import Store, open_store

ALIAS = ".version"
ID, VERSION_ID = re.compile(rf"[0-9a-f]{{{ID_LENGTH}}}"), re.compile(rf"[0-9a-f]{{{VERSION_LENGTH}}}")
FOLDERS = frozenset({BASE, TABLES, RUNS, THRESHOLDS})
"""What lies beside the experts' groups of one base."""

Use = tuple[str, tuple[str, ...]]
"""What an artifact or a run needs: the id of its base, and its experts' in order."""


class BusyError(Exception):
    """Another process holds a lock."""


@dataclass(frozen=True)
class Run:
    """What a run has written down of itself."""

    started: datetime
    host: str
    output: str
    use: Use

    @classmethod
    def parsed(cls, data: bytes) -> Run | None:
        """A run record, or a ``job.json``; None for what is neither. Pure."""
        try:
            found = json.loads(data)
            started = datetime.fromisoformat(found["started"])
            use = _checked_use(found["base"], found["experts"])
            output = str(found["output"])
            if not Path(output).is_absolute() and scheme_of(output) not in OBJECT_STORES:
                raise ValueError("no place")
            return cls(started if started.tzinfo else started.replace(tzinfo=UTC), str(found["host"]), output, use)
        except (ValueError, KeyError, TypeError):
            return None


def _checked_use(base: object, experts: object) -> Use:
    if not isinstance(base, str) or not isinstance(experts, list) or not all(isinstance(one, str) for one in experts):
        raise ValueError("no ids")
    return base, tuple(sorted(experts))


def use_of(manifest: bytes) -> tuple[str, Use] | None:
    """Inputs of an artifact and what it needs, of any format that names them; None where they cannot be read. Pure."""
    try:
        found = json.loads(manifest)
        use = _checked_use(found["base"]["id"], [expert["id"] for expert in found["experts"].values()])
        return str(found["inputs"]), use
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


@dataclass(frozen=True)
class Seen:
    """What an output holds."""

    artifacts: Mapping[str, tuple[str, Use] | None] = field(default_factory=dict)
    """Version -> inputs and needs; None where its manifest cannot be read."""
    bare: tuple[str, ...] = ()
    """Folders named as versions are, without a manifest."""
    names: tuple[tuple[str, str], ...] = ()
    """(inputs, version) of what was published, or was about to be."""
    jobs: Mapping[str, Run | None] = field(default_factory=dict)
    """Places of unfinished work -> whose they are; None where they do not say."""
    kept: frozenset[str] = frozenset()
    """Those of recent and running runs."""
    strange: tuple[str, ...] = ()

    @property
    def is_readable(self) -> bool:
        return None not in self.artifacts.values()

    @property
    def uses(self) -> set[Use]:
        made = {found[1] for found in self.artifacts.values() if found is not None}
        return made | {run.use for name in self.kept if (run := self.jobs[name]) is not None}

    def has_made(self, inputs: str) -> bool:
        """Whether an artifact is there, or under way, of the inputs that begin like this. Pure."""
        made = [found[0] for found in self.artifacts.values() if found is not None]
        named = [whole for whole, version in self.names if version in self.artifacts]
        return inputs in self.kept or any(whole.startswith(inputs) for whole in (*made, *named))

    def is_completable(self, version: str) -> bool:
        """Whether some unfinished run may still complete a version without a manifest. Pure."""
        makers = {inputs[:40] for inputs, named in self.names if named == version}
        return bool(makers & self.kept if makers else self.kept)


def see(output: Store, since: datetime) -> Seen | None:
    """What an output holds; None when it is no output of ours. StoreError when it cannot be reached."""
    entries = output.children()
    if not {LATEST, WORK} & set(entries):
        return None
    artifacts: dict[str, tuple[str, Use] | None] = {}
    bare, names, jobs, strange = [], [], {}, []
    for name in entries:
        data = None if name in (LATEST, WORK) else got(output, f"{name}/{MANIFEST}")
        if data is not None:
            artifacts[name] = use_of(data)
        elif VERSION_ID.fullmatch(name):
            bare.append(name)
    for name in output.children(WORK):
        inputs, _, version = name.removesuffix(ALIAS).partition(".")
        if name.endswith(ALIAS) and version:
            names.append((inputs, version))
        elif ID.fullmatch(name):
            jobs[name] = Run.parsed(got(output, f"{WORK}/{name}/{JOB}") or b"")
        else:
            strange.append(name)
    kept = frozenset(name for name, run in jobs.items() if is_recent(run, since) or is_busy(output, f"{WORK}/{name}"))
    return Seen(artifacts, tuple(bare), tuple(names), jobs, kept, tuple(strange))


def got(store: Store, key: str) -> bytes | None:
    try:
        return store.get(key)
    except (FileNotFoundError, NotADirectoryError):
        return None


def is_recent(run: Run | None, since: datetime) -> bool:
    return run is not None and run.started >= since


def raise_busy() -> None:
    raise BusyError


def is_busy(store: Store, name: str) -> bool:
    """Whether someone holds a lock. Nothing is written; on an object store the lock of a killed run counts as held."""
    if not store.is_local:
        state = store.tagged(f"{name}{leases.LEASE}")
        return state is not None and not is_released(state[0])
    if not _lock_file(store, name).exists():
        return False
    try:
        with store.lock(name, raise_busy):
            return False
    except (BusyError, StoreError):  # another user's lock cannot be tried
        return True


def _lock_file(store: Store, name: str) -> Path:
    path = Path(store.place) / f"{name}{LOCK}"
    return path.with_name(f".{path.name}")


def is_released(lease: bytes) -> bool:
    try:
        return json.loads(lease)["released"] is True
    except (ValueError, KeyError, TypeError):
        return False


@dataclass(frozen=True)
class Survey:
    """All that decides what is needed."""

    deltas: Store
    output: Store
    since: datetime
    bases: tuple[str, ...]
    """Folders of the store that look like its own."""
    records: Mapping[str, Run | None]
    """Key of a run record -> what it says; None where it is damaged."""
    own: Seen
    """The recipe's output."""
    has_output: bool
    """Whether there is one."""
    others: Mapping[tuple[str, str], Seen | None]
    """(place, host) of the outputs of run records; None of those that cannot be looked at."""
    notes: tuple[str, ...]

    def seen(self, run: Run) -> Seen | None:
        """A run's output."""
        return self.own if run.output == self.output.place else self.others[run.output, run.host]

    def uses(self) -> set[Use]:
        """What artifacts and runs need. Pure."""
        found = set(self.own.uses)
        for seen in self.others.values():
            found |= seen.uses if seen is not None else set()
        for run in self.records.values():
            if run is not None:
                seen = self.seen(run)
                if seen is None or not seen.is_readable or run.started >= self.since:
                    found.add(run.use)
        return found

    def is_spent(self, key: str) -> bool:
        """Whether a run record has nothing more to say: its run is long over, and what it made is gone. Pure."""
        run = self.records[key]
        if run is None or run.started >= self.since:
            return False
        seen = self.seen(run)
        return seen is not None and seen.is_readable and not seen.has_made(key.rpartition("/")[2].removesuffix(".json"))


def needed_places(deltas: Store, uses: set[Use]) -> set[str]:
    """The places of all groups and thresholds that these need, whether they are there or not. Pure."""
    found = set()
    for base, experts in uses:
        groups = [base_group(deltas, base), table_group(deltas, base, experts)]
        groups += [expert_group(deltas, base, expert) for expert in experts]
        found |= {group.place for group in groups}
        found |= {deltas.under(f"{base}/{THRESHOLDS}/{expert}").place for expert in experts}
    return found


def _bases(deltas: Store) -> list[str]:
    """Folders of a delta store that look like its own."""
    names = [name for name in deltas.children() if ID.fullmatch(name)]
    return [name for name in names if any(one in FOLDERS or ID.fullmatch(one) for one in deltas.children(name))]


def records_of(deltas: Store, base: str) -> dict[str, Run | None]:
    keys = [f"{base}/{RUNS}/{name}" for name in deltas.children(f"{base}/{RUNS}") if name.endswith(".json")]
    return {key: Run.parsed(data) for key in keys if (data := got(deltas, key)) is not None}


def survey(deltas: Store, output: Store, since: datetime) -> Survey:
    """Look at a delta store, at the output, and at the outputs that the store's run records name.

    StoreError when the store or the recipe's output cannot be reached.
    """
    notes = []
    bases = _bases(deltas)
    records = {key: run for base in bases for key, run in records_of(deltas, base).items()}
    own = see(output, since)
    if own is None:
        notes.append(f"{output.place} holds no artifacts and no unfinished runs")
    others: dict[tuple[str, str], Seen | None] = {}
    for run in records.values():
        if run is not None and run.output != output.place and (run.output, run.host) not in others:
            others[run.output, run.host] = _seen_from_here(run, since, notes)
    damaged = sorted(key for key, run in records.items() if run is None)
    notes += [f"{deltas.place}/{key} cannot be read; what its run needs is not known, and it is left" for key in damaged]
    has_output, own = own is not None, own or Seen()
    strange = [*sorted(set(deltas.children()) - set(bases)), *_strange_in(deltas, bases)]
    notes += [f"{deltas.place}/{name} is nothing of a delta store; it is left" for name in strange]
    notes += [f"{output.place}/{WORK}/{name} is nothing of a run; it is left" for name in own.strange]
    looked = {output.place: own, **{place: seen for (place, _), seen in others.items() if seen is not None}}
    for place, seen in looked.items():
        damaged = [version for version, found in seen.artifacts.items() if found is None]
        notes += [f"{place}/{name}/{MANIFEST} cannot be read; what runs there used is kept" for name in damaged]
    return Survey(deltas, output, since, tuple(bases), records, own, has_output, others, tuple(notes))


def _strange_in(deltas: Store, bases: Sequence[str]) -> Iterator[str]:
    for base in bases:
        names = {name: f"{base}/{name}" for name in deltas.children(base)}
        yield from (key for name, key in names.items() if name not in FOLDERS and not ID.fullmatch(name))
        for kind in (TABLES, THRESHOLDS):
            yield from (f"{base}/{kind}/{name}" for name in deltas.children(f"{base}/{kind}") if not ID.fullmatch(name))


def _seen_from_here(run: Run, since: datetime, notes: list[str]) -> Seen | None:
    """Another run's output, empty when it is gone; None when it cannot be looked at."""
    is_here = run.host == platform.node() or scheme_of(run.output) in OBJECT_STORES
    try:
        seen = see(open_store(run.output), since)
    except StoreError as error:
        notes.append(f"{run.output} cannot be looked at ({error}); what runs there used is kept")
        return None
    if seen is None and not is_here:
        notes.append(f"{run.output} of host {run.host} cannot be looked at from here; what runs there used is kept")
        return None
    return seen or Seen()
