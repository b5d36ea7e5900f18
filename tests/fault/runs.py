"""Runs of the command line that may fail, and what must be so after the last of them."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from storage.arrays import COMPLETE
from storage.artifact import Artifact, latest
from storage.deltas import RUNS
from storage.errors import ArtifactError
from storage.stores import open_store
from tests.support.faulty import START, Fault, Faults, Work, begun, kept

MEMORY = "10KB"
"""Of a task: about a hundred blocks."""
CONSTANTS = {"storage.layout.CHUNK_ELEMENTS": 128, "pipeline.plan.LEAST_WAVE_BYTES": 6000}
"""Chunks of 8 rows, and several waves."""
FEW_BLOCKS = {"pipeline.plan.LEAST_WAVE_BYTES": 6000}, "40KB"
"""Constants and memory where every request takes its time: chunks are whole tensors."""
PATIENCE_S = 120.0
"""After which a process that should do something is taken to hang."""


def until(condition: Callable[[], object], what: str) -> None:
    """Wait until something is so. This finds hangs; nothing is measured."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < PATIENCE_S, f"waited in vain: {what}"
        time.sleep(0.01)


def has_namespaces() -> bool:
    """Whether a process may mount a disk for itself alone here."""
    line = ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    try:
        return subprocess.run(line, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


Listing = dict[str, tuple[int, str]]
"""Key -> bytes, and of a file whose content is compared its sha256."""


def stored(place: str) -> Listing:
    """What a delta store holds, but for the records of who ran when. On an object store only what declares others whole is
    read: it has their checksums."""
    store = open_store(place)
    sizes = {key: size for key, size in store.sizes().items() if f"/{RUNS}/" not in f"/{key}"}
    read = {key for key in sizes if store.is_local or key.endswith(f"/{COMPLETE}")}
    return {key: (size, hashlib.sha256(store.get(key)).hexdigest() if key in read else "") for key, size in sizes.items()}


@dataclass(frozen=True)
class Undisturbed:
    """What comes of the recipe when nothing goes wrong."""

    version: str
    deltas: Listing
    work: frozenset[Work]


@dataclass
class Client:
    """A ``channel-merge run`` in a process and a group of its own."""

    process: subprocess.Popen[bytes]
    out: Path
    err: Path

    @property
    def said(self) -> str:
        """On standard error, so far."""
        return self.err.read_text()

    def wait(self) -> int:
        """Its exit code."""
        return self.process.wait(PATIENCE_S)

    def answer(self) -> dict[str, Any]:
        """Of a run that succeeds, what it printed."""
        assert self.wait() == 0, self.said
        found: dict[str, Any] = json.loads(self.out.read_text())
        return found

    def signal(self, number: int) -> None:
        """Send its whole group a signal."""
        os.killpg(self.process.pid, number)


@dataclass
class World:
    """A place with an output and a delta store, and the runs there."""

    folder: Path
    recipe: Path
    faults: Faults
    output: str
    deltas: str
    constants: Mapping[str, Any] = field(default_factory=lambda: CONSTANTS)
    memory: str = MEMORY
    settings: tuple[str, ...] = ()
    """Options of every run."""
    clients: list[Client] = field(default_factory=list)

    @classmethod
    def of(cls, folder: Path, recipe: Path) -> World:
        return cls(folder, recipe, Faults(folder / "faults"), str(folder / "output"), str(folder / "deltas"))

    def environment(self) -> dict[str, str]:
        return os.environ | self.faults.environment(self.constants) | {"XDG_CACHE_HOME": str(self.folder / "cache")}

    def start(self, *options: str, cluster: str = "none", before: tuple[str, ...] = ()) -> Client:
        """Begin a run; ``before`` is a command that starts it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        out, err = (self.folder / f"{len(self.clients)}.{end}" for end in ("out", "err"))
        places = (
            "--output",
            self.output,
            "--deltas",
            self.deltas,
            "--cluster",
            cluster,
            "--set",
            f"cluster.memory={self.memory}",
        )
        line = [*before, *START, "run", str(self.recipe), "--json", *places, *self.settings, *options]
        with out.open("wb") as stdout, err.open("wb") as stderr:
            process = subprocess.Popen(line, stdout=stdout, stderr=stderr, env=self.environment(), start_new_session=True)
        client = Client(process, out, err)
        self.clients.append(client)
        return client

    def run(self, *options: str, cluster: str = "none") -> Client:
        """A run from its beginning to its end."""
        client = self.start(*options, cluster=cluster)
        client.wait()
        return client

    def held(self, stage: str, *options: str, after: int = 2, cluster: str = "none") -> Client:
        """A run one of whose blocks of a stage is at work, until it is released."""
        self.faults.script(Fault(stage, "hold", after))
        client = self.start(*options, cluster=cluster)
        until(lambda: self.faults.happened() or client.process.poll() is not None, f"a block of {stage} to begin")
        assert client.process.poll() is None, client.said
        return client

    def check_nothing_is_published(self) -> None:
        """Of an unfinished run nothing can be read."""
        assert open_store(self.output).children() in ([], [".work"])
        with pytest.raises(ArtifactError, match="is not an artifact"):
            Artifact(self.output)

    def check_whole(self, expected: Undisturbed) -> None:
        """The output holds the version of an undisturbed run and nothing else, the delta store what it would hold then."""
        output = open_store(self.output)
        assert output.children() == sorted([expected.version, ".work", "latest.json"])
        manifest = Artifact(self.output).manifest
        assert manifest.version == expected.version
        assert output.children(".work") == [f"{manifest.inputs}.{expected.version}.version"]
        assert latest(output)["version"] == expected.version
        assert Artifact(self.output).verify() == []
        self.check_deltas(expected)

    def check_deltas(self, expected: Undisturbed) -> None:
        """The delta store holds the same bytes."""
        found, nothing = stored(self.deltas), (0, "")
        wanted = {key: (size, digest if found.get(key, nothing)[1] else "") for key, (size, digest) in expected.deltas.items()}
        other = {key: (found.get(key), wanted.get(key)) for key in found.keys() | wanted.keys()}
        different = {key: pair for key, pair in other.items() if pair[0] != pair[1]}
        assert not different, f"found and expected: {different}"

    def resume(self, expected: Undisturbed, *options: str, cluster: str = "none") -> None:
        """Run again after a run that failed; what has receipts is not begun again, and the result is the undisturbed one."""
        self.check_nothing_is_published()
        before = self.faults.events()
        finished, tried = kept(before), begun(before)  # a process may die between a receipt and its line in the log
        self.faults.script()
        answer = self.run(*options, cluster=cluster).answer()
        assert (answer["version"], answer["new"]) == (expected.version, True)
        again = begun(self.faults.events())
        assert finished
        assert not finished & again.keys()
        assert tried.keys() | again.keys() == expected.work
        assert [work for work, count in again.items() if count > 1] == []
        self.check_whole(expected)

    def end(self) -> None:
        """Let no process outlive a test."""
        for client in self.clients:
            if client.process.poll() is None:
                client.signal(signal.SIGKILL)
            client.process.wait()


@contextmanager
def world_in(folder: Path, recipe: Path) -> Iterator[World]:
    found = World.of(folder, recipe)
    own = found.faults  # a test may use those of a cluster that others use too
    try:
        yield found
    finally:
        found.end()
        own.end()
