"""A scheduler and workers in processes of their own, on loopback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SCHEDULER = (
    "import asyncio, distributed\n"
    "async def main():\n"
    "    async with distributed.Scheduler(host='127.0.0.1', port=0, dashboard_address='127.0.0.1:0') as scheduler:\n"
    "        print(scheduler.address, flush=True)\n"
    "        await scheduler.finished()\n"
    "asyncio.run(main())"
)


def end(process: subprocess.Popen[str]) -> None:
    """Kill a process and all of its group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout:
        process.stdout.close()


@contextmanager
def scheduler() -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Address and process of a scheduler without workers."""
    line = [sys.executable, "-c", SCHEDULER]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip(), process
    finally:
        end(process)


@contextmanager
def worker(address: str, *options: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A ``dask worker`` process with a nanny, whose files and current folder are there."""
    dask = str(Path(sys.executable).parent / "dask")
    local = ["--host", "127.0.0.1", "--no-dashboard", "--local-directory", str(folder)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(
        [dask, "worker", address, *local, *options],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True, cwd=folder, env=environment, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        end(process)
