"""Wall time and peak memory of a program with all the processes it starts, measured from outside."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

SAMPLE_SECONDS = 0.02
PROGRAM, WORKER, OTHER = "program", "worker", "other"
"""Kinds of processes: the program itself; processes that Python's multiprocessing spawned; all others."""
SPAWNED = b"multiprocessing.spawn"
"""In the command line of a process that multiprocessing spawned, as Dask's local cluster does with its workers."""
PAGE = os.sysconf("SC_PAGE_SIZE")
TAIL_LINES = 8


class RunError(Exception):
    """A program that ended with another exit status than 0; carries the end of what it printed."""


@dataclass(frozen=True)
class Measured:
    """One run."""

    seconds: float
    cpu_seconds: float
    """Of all processes that were waited for."""
    resident: int
    """Peak of the sum of all processes' resident sets, in bytes. Pages that processes share count once for each, and so
    do files they have mapped, which the system may drop."""
    anonymous: int
    """Peak of the sum of what is not backed by a file: memory that must be there."""
    output: str
    """Standard output."""
    largest: Mapping[str, int]
    """Kind of process -> the largest resident set that one of them had at any time, in bytes, as the system kept it (VmHWM)."""

    def figures(self) -> dict[str, float]:
        """The numbers alone."""
        return {key: value for key, value in asdict(self).items() if key not in ("output", "largest")}


def _session_members(session: int) -> list[int]:
    members = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError, IndexError):  # a process may end at any time
                # pid (name) state parent group session: a name may hold spaces and brackets
                if int((entry / "stat").read_text().rpartition(")")[2].split()[3]) == session:
                    members.append(int(entry.name))
    return members


def _memory(processes: Sequence[int]) -> tuple[int, int]:
    """Resident and anonymous bytes of these processes together."""
    resident = anonymous = 0
    for process in processes:
        with suppress(OSError, IndexError):
            pages, backed = (int(field) for field in Path(f"/proc/{process}/statm").read_text().split()[1:3])
            resident += pages * PAGE
            anonymous += (pages - backed) * PAGE
    return resident, anonymous


def _high_water(process: int, session: int) -> tuple[str, int]:
    """A process' kind, and the largest resident set it has had, in bytes. OSError or ValueError when it has ended."""
    status = Path(f"/proc/{process}/status").read_text()
    largest = int(status.partition("VmHWM:")[2].split(maxsplit=1)[0]) * 1024
    if process == session:
        return PROGRAM, largest
    return WORKER if SPAWNED in Path(f"/proc/{process}/cmdline").read_bytes() else OTHER, largest


class _Watch:
    """Looks at all processes of a session every so often and keeps the largest sums, and the largest of each kind."""

    def __init__(self, session: int, every: float) -> None:
        self.session = session
        self.every = every
        self.resident = self.anonymous = 0
        self.largest: dict[str, int] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def _look(self) -> None:
        while not self._stop.wait(self.every):
            members = _session_members(self.session)
            resident, anonymous = _memory(members)
            self.resident, self.anonymous = max(self.resident, resident), max(self.anonymous, anonymous)
            for process in members:
                with suppress(OSError, ValueError, IndexError):
                    kind, size = _high_water(process, self.session)
                    self.largest[kind] = max(self.largest.get(kind, 0), size)

    def end(self) -> None:
        self._stop.set()
        self._thread.join()


def measure(
    command: Sequence[str | Path], environment: Mapping[str, str], cwd: Path, every: float = SAMPLE_SECONDS
) -> Measured:
    """Run a program to its end, with a look at its memory ``every`` so many seconds. RunError when it fails."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        started = time.monotonic()
        # a session of its own: that is how the processes it starts are found
        process = subprocess.Popen(
            command, env=dict(environment), cwd=cwd, stdout=out, stderr=errors, stdin=subprocess.DEVNULL, start_new_session=True
        )
        watch = _Watch(process.pid, every)
        try:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            seconds = time.monotonic() - started
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        finally:
            watch.end()
        out.seek(0)
        errors.seek(0)
        output = out.read()
        if process.returncode:
            tail = "\n".join((output + errors.read()).strip().splitlines()[-TAIL_LINES:])
            raise RunError(f"{' '.join(map(str, command))} ended with status {process.returncode}:\n{tail}")
    cpu_seconds = usage.ru_utime + usage.ru_stime
    return Measured(seconds, cpu_seconds, watch.resident, watch.anonymous, output, dict(sorted(watch.largest.items())))
