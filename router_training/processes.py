"""The processes of one training, one per device; several are joined by accelerate, by torch's own environment variables."""

from __future__ import annotations

import json
import os
import queue
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

from storage import errors
from storage.errors import ChannelMergingError, ClusterError

LOG = "processes.log"
RAISED = re.compile(r"([a-z_]\w*\.)*[A-Z]\w+: ")
"""The last line of a traceback."""
POLL_S = 0.5
"""How often it is looked whether all are alive: others wait long for one that died."""


def run_together(
    module: str, count: int, work: Path, tell: Callable[[str], None], check: Callable[[], None] = lambda: None
) -> None:
    """Run ``python -m module WORK`` in this many processes until all are done; what they write to stderr is kept in WORK.

    They say what they have to say by ``say`` and end with their standard input, that is with this process, whatever ends it.
    The first error that one of them says is raised, ClusterError when one died without a word; the others are then ended, as
    they all are when ``check``, which is asked now and then, raises.
    """
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    with (work / LOG).open("wb") as log:
        processes = [_start(module, rank, environment, work, log) for rank, environment in enumerate(_environments(count))]
        readers = [threading.Thread(target=_read, args=(process, lines)) for process in processes]
        for reader in readers:
            reader.start()
        try:
            while any(process.poll() is None for process in processes) and not any(process.poll() for process in processes):
                check()
                _pass_on(lines, tell, POLL_S)
        finally:
            for process, reader in zip(processes, readers, strict=True):
                process.kill()  # nothing where it is over
                reader.join()
                with process:  # closes its pipes
                    pass
        _pass_on(lines, tell, 0)
    codes = [process.returncode for process in processes]
    if any(codes):
        written = (work / LOG).read_text("utf-8", "replace").splitlines()
        last = next((line[:300] for line in reversed(written) if RAISED.match(line)), "none of them wrote why")
        raise ClusterError(
            f"the BERT router's training in {count} processes ended with exit codes {', '.join(map(str, codes))} ({last}). Run "
            "again: it goes on from its last checkpoint."
        )


def say(**record: str) -> None:
    """Tell the process that started this one: ``tell=`` a line of progress, or ``error=`` a class's name with its ``text``."""
    print(json.dumps(record), flush=True)


def end_with_parent() -> None:
    """End this process at once when its standard input ends."""

    def wait() -> None:
        while os.read(sys.stdin.fileno(), 1):  # past Python's own buffer, which is locked while it is read
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _environments(count: int) -> list[Mapping[str, str]]:
    root = str(Path(__file__).parent.parent)
    path = {"PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}
    if count == 1:  # nobody to join
        return [os.environ | path]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count))),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
    }  # fmt: skip
    return [os.environ | path | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def _start(module: str, rank: int, environment: Mapping[str, str], work: Path, log: IO[bytes]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", module, str(work)],
        env=dict(environment), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
    )  # fmt: skip


def _pass_on(lines: queue.SimpleQueue[str], tell: Callable[[str], None], timeout: float) -> None:
    """Tell what was said, once the first line is there or it did not come in time; raise the error that was."""
    while True:
        try:
            record = _record(lines.get(timeout=timeout))
        except queue.Empty:
            return
        timeout = 0.0  # of those that keep coming each will be told, but who waits is asked in between
        if "tell" in record:
            tell(record["tell"])
        elif "error" in record:
            raise getattr(errors, record["error"], ChannelMergingError)(record["text"])


def _read(process: subprocess.Popen[str], lines: queue.SimpleQueue[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)


def _record(line: str) -> dict[str, str]:
    """What one of the processes says; empty when it is a line of something else."""
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
