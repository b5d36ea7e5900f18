"""Scripted faults inside real processes: every block is logged, and what a script says goes wrong with one of them, once.

Dask workers load this module as a preload, clients start by ``main``; both are told by their environment where script and log
lie. Blocks are met where a stage keeps their receipts (``pipeline.ledger``), so the log tells which were begun and which have a
receipt. Tests write scripts and read logs by ``Faults``.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).parents[2]
FOLDER, CONSTANTS, WATCHED = "FAULTY_FOLDER", "FAULTY_CONSTANTS", "FAULTY_WATCHED"
START = (sys.executable, "-c", "from tests.support.faulty import main; main()")
"""The command line of a client that fails as the script says."""
FILE_EVENTS = ("open", "os.listdir", "os.scandir", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")
_SCRIPT, _LOG, _PATHS = "script.json", "log.jsonl", "paths.txt"

Action = Literal["kill", "stop", "hold", "full", "fill", "damage"]
Moment = Literal["begun", "write", "kept"]
Piece = tuple[str, int, int]
"""Tensor, first row, row after the last."""
Work = tuple[str, str, str, int]
"""Stage, expert in ingest, tensor and row; of a block without rows its stage, label and key, and 0."""


@dataclass(frozen=True)
class Fault:
    """What goes wrong, once, with the first block that it fits."""

    stage: str
    """Of the block: ingest, similarity, cluster, merge or pack."""
    action: Action
    """The process kills itself (SIGKILL) or hangs (SIGSTOP); ``hold``: the block waits for ``Faults.release``; ``full``: a
    write meets ENOSPC; ``fill``: the disk of ``path`` is filled; ``damage``: a byte is flipped in each file of ``path``."""
    after: int = 0
    """Blocks of the stage that have receipts."""
    label: str = ""
    """What is in its label."""
    moment: Moment = "begun"
    """When it has begun, in the middle of its next write to a local disk, or when its receipt is written."""
    path: str = ""
    """A file, or a pattern of files."""


@dataclass(frozen=True)
class Event:
    """Something that became of a block."""

    what: Literal["begun", "kept"]
    stage: str
    label: str
    key: str
    pieces: tuple[Piece, ...]
    process: int

    @property
    def work(self) -> list[Work]:
        """What the block is about, row by row: however blocks are cut, the same work is equal."""
        source = self.label.rpartition(" ")[0]
        rows = [(self.stage, source, tensor, row) for tensor, start, stop in self.pieces for row in range(start, stop)]
        return rows or [(self.stage, self.label, self.key, 0)]


@dataclass(frozen=True)
class Faults:
    """A script and a log, as a test sees them."""

    folder: Path

    def environment(self, constants: Mapping[str, Any], watched: Path | None = None) -> dict[str, str]:
        """What processes need to know. ``constants``: 'module.NAME' -> a value to set there; what they do below the folder
        ``watched`` is logged too."""
        found = {
            FOLDER: str(self.folder),
            CONSTANTS: json.dumps(dict(constants)),
            "DASK_DISTRIBUTED__WORKER__PRELOAD": "tests.support.faulty",
            "PYTHONPATH": str(ROOT),
        }
        return found | ({WATCHED: str(watched)} if watched else {})

    def script(self, *faults: Fault) -> None:
        """Let these happen, and begin a new log."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.iterdir():
            path.unlink()
        (self.folder / _SCRIPT).write_text(json.dumps([asdict(fault) for fault in faults]))

    def happened(self, number: int = 0) -> bool:
        """Whether a fault of the script has."""
        return (self.folder / f"fault-{number}").exists()

    def release(self) -> None:
        """Let blocks go on that were held."""
        (self.folder / "go").touch()

    def events(self) -> list[Event]:
        """What the log holds."""
        fields = (json.loads(line) for line in _lines(self.folder / _LOG))
        return [Event(**{**found, "pieces": tuple(tuple(piece) for piece in found["pieces"])}) for found in fields]

    def paths(self) -> list[Path]:
        """Files and folders below the watched one that were opened, listed or changed, absolute."""
        return (
            [Path(line) for line in (self.folder / _PATHS).read_text().splitlines()] if (self.folder / _PATHS).exists() else []
        )

    def survivors(self) -> list[int]:
        """Processes that were told of this folder and still live."""
        mark = f"{FOLDER}={self.folder}\0".encode()
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has just ended
                if mark in (folder / "environ").read_bytes() and "\nState:\tZ" not in (folder / "status").read_text():
                    found.append(int(folder.name))
        return found

    def end(self) -> None:
        """Kill them."""
        while alive := self.survivors():
            for process in alive:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.02)


def _lines(path: Path) -> list[str]:
    """Those that are whole: the last may be under way."""
    return path.read_text().split("\n")[:-1] if path.exists() else []


def begun(events: Sequence[Event]) -> Counter[Work]:
    """Work that was begun, and how often."""
    return Counter(work for event in events if event.what == "begun" for work in event.work)


def kept(events: Sequence[Event]) -> set[Work]:
    """Work that has receipts."""
    return {work for event in events if event.what == "kept" for work in event.work}


# in the processes that fail


class _Armed(threading.local):
    """The fault that the next write of this thread meets."""

    fault: Fault | None = None


_armed = _Armed()
_is_active = False


def main() -> None:
    """The command line, with faults."""
    activate()
    from flows.cli import main as command_line

    command_line()


def dask_setup(worker: Any) -> None:
    """What Dask calls in a worker, before it is given tasks."""
    activate()


def activate() -> None:
    """Set the constants, and meet every block and write of this process."""
    global _is_active  # noqa: PLW0603 - of the process, as what it patches
    if _is_active:
        return
    _is_active = True
    if WATCHED in os.environ:
        sys.addaudithook(partial(_watch, os.environ[WATCHED], Path(os.environ[FOLDER])))
    for name, value in json.loads(os.environ[CONSTANTS]).items():
        module, _, constant = name.rpartition(".")
        loaded = importlib.import_module(module)
        setattr(loaded, constant, type(getattr(loaded, constant))(value))
    from pipeline.ledger import _Kept
    from storage import parts

    for owner, name, around in ((_Kept, "__call__", _block), (Path, "replace", _renaming), (parts, "write_at", _write_at)):
        setattr(owner, name, around(getattr(owner, name)))


def _watch(root: str, folder: Path, event: str, arguments: tuple[Any, ...]) -> None:
    """Log the paths below a root that this process touches, but for those of this module."""
    if event not in FILE_EVENTS:
        return
    for path in arguments[: 2 if event == "os.rename" else 1]:
        if isinstance(path, str | bytes | os.PathLike):
            found = os.path.abspath(os.fsdecode(path))  # noqa: PTH100 - resolves no links
            if found.startswith(f"{root}{os.sep}") and Path(found).parent != folder:
                _append(folder / _PATHS, found)


def _append(path: Path, line: str) -> None:
    """A line of its own, whoever else writes; seen by all even when this process is killed at once."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(file, f"{line}\n".encode())
    os.close(file)


def _block(keep: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """How a block is done and its receipt kept, with log and faults around it; none for what has been done before."""
    folder = Path(os.environ[FOLDER])

    def call(self: Any, item: Any) -> Any:
        stage = self.function.__name__.partition("_")[0]
        pieces = (
            [(piece.tensor, piece.start, piece.stop) for piece in item.task.block.pieces] if hasattr(item.task, "block") else []
        )
        said = {"stage": stage, "label": item.label, "key": item.key, "pieces": pieces, "process": os.getpid()}
        met: list[Fault | None] = []

        def function(task: Any) -> Any:
            _append(folder / _LOG, json.dumps({"what": "begun", **said}))
            met.append(fault := _due(folder, stage, item.label))
            if fault is not None and fault.moment == "begun":
                _act(fault)
            _armed.fault = fault if fault is not None and fault.moment == "write" else None
            return self.function(task)

        receipt = keep(replace(self, function=function), item)
        if met:
            _append(folder / _LOG, json.dumps({"what": "kept", **said}))
            if met[0] is not None and met[0].moment == "kept":
                _act(met[0])
        return receipt

    return call


def _due(folder: Path, stage: str, label: str) -> Fault | None:
    """The fault that this block is to meet; it is nobody else's then."""
    if not (folder / _SCRIPT).exists():
        return None
    finished = [event for event in Faults(folder).events() if event.what == "kept" and event.stage == stage]
    for number, fields in enumerate(json.loads((folder / _SCRIPT).read_text())):
        fault = Fault(**fields)
        if fault.stage == stage and fault.label in label and len(finished) >= fault.after:
            with suppress(FileExistsError):
                (folder / f"fault-{number}").touch(exist_ok=False)
                return fault
    return None


def _act(fault: Fault) -> None:
    if fault.action == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if fault.action == "hold":
        go = Path(os.environ[FOLDER]) / "go"
        while not go.exists():
            time.sleep(0.01)
    elif fault.action == "fill":
        _fill(Path(fault.path))
    elif fault.action == "damage":
        _damage(Path(fault.path))
    else:
        os.kill(os.getpid(), signal.SIGKILL if fault.action == "kill" else signal.SIGSTOP)


def _fill(path: Path) -> None:
    """Take all room of a small disk."""
    with path.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            with suppress(OSError):
                while file.write(bytes(size)):
                    pass


def _damage(pattern: Path) -> None:
    """Flip a bit in the middle of each of these files."""
    for path in Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor))):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)


def _due_now() -> Fault | None:
    fault, _armed.fault = _armed.fault, None
    return fault


def _renaming(function: Callable[[Path, Any], Path]) -> Callable[[Path, Any], Path]:
    """Files appear by being renamed: what fails before leaves the temporary file."""

    def rename(self: Path, target: Any) -> Path:
        if self.suffix == ".part" and (fault := _due_now()):
            _act(fault)
        return function(self, target)

    return rename


def _write_at(function: Callable[[Path, int, Any], None]) -> Callable[[Path, int, Any], None]:
    """Rows of a pool file: a fault comes when half of them are written."""

    def write_at(path: Path, offset: int, rows: Any) -> None:
        if fault := _due_now():
            function(path, offset, rows[: len(rows) // 2])
            _act(fault)
        function(path, offset, rows)

    return write_at
