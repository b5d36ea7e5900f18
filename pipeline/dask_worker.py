"""What runs inside the worker processes of a Dask cluster: a task's thread limits, its room in memory, and their signals."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from distributed import WorkerPlugin

from pipeline.memory import return_freed_memory

THREADS = "CHANNEL_MERGING_THREADS"
"""Environment variable of a worker: the threads one task may compute on. Without it 1, as Dask runs as many tasks at once as
a worker has threads, by default one per core. How many other workers share the host's cores no worker can know, so nothing
is derived from counts of cores."""
POOLS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""What libraries that are loaded later read."""

Task = TypeVar("Task")
Result = TypeVar("Result")


def task_threads() -> int:
    """Threads that one task may compute on in this process, 1 unless the environment says otherwise."""
    value = os.environ.get(THREADS, "")
    return int(value) if value.isdecimal() and int(value) > 0 else 1


class _Prepared(threading.local):
    """Whether this thread has been prepared: OpenMP keeps its limits by thread."""

    done = False


_prepared = _Prepared()


def _prepare_thread() -> None:
    """Limit the pools of torch, numba and BLAS to a task's threads; none of them is imported for it."""
    if _prepared.done:
        return
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    threads = task_threads()
    os.environ.update(dict.fromkeys(POOLS, str(threads)))
    threadpool_limits(threads)
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(threads)
    _limit_numba(threads)
    return_freed_memory()  # Dask sets the allocator to keep nothing: most of a run would go into mapping pages
    _prepared.done = True


def _limit_numba(threads: int) -> None:
    """Limit numba's pool, whose size is fixed when numba is imported.

    From then on its variable must stay as it was: numba looks at it whenever it compiles, and refuses a change.
    """
    if numba := sys.modules.get("numba"):
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    else:
        os.environ["NUMBA_NUM_THREADS"] = str(threads)


class Room:
    """Memory that the tasks of one process share: a task waits while those at work leave no room for it."""

    def __init__(self) -> None:
        self._held = 0
        self._free = threading.Condition()

    @contextmanager
    def hold(self, size: int, limit: int) -> Iterator[None]:
        """Hold ``size`` bytes of ``limit``, once they are free; alone, a task may exceed the limit. A limit of 0 is none."""
        with self._free:
            self._free.wait_for(lambda: not limit or not self._held or self._held + size <= limit)
            self._held += size
        try:
            yield
        finally:
            with self._free:
                self._held -= size
                self._free.notify_all()


_room = Room()


def in_worker(function: Callable[[Task], Result], task: Task, budget: int, limit: int | None = None) -> Result:
    """Run a task of ``budget`` bytes on a worker. ``limit``: what its tasks share, by default the worker's own limit."""
    from distributed import get_worker

    _prepare_thread()
    if limit is None:
        limit = int(get_worker().memory_manager.memory_limit or 0)
    with _room.hold(budget, limit):
        return function(task)


class LocalWorker(WorkerPlugin):  # type: ignore[misc]
    """Makes a worker of a cluster of this machine end with its client alone, and compute on one thread per task.

    A terminal sends Ctrl-C, and a supervisor its signals, to the whole group of processes: workers would die with
    tracebacks before the client can close them. Their nanny kills them with SIGKILL if it must, and they exit when the
    client is gone.
    """

    name = "channel-merging"

    def setup(self, worker: Any) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.environ[THREADS] = "1"


def unseen(tokens: list[str], files: Mapping[str, tuple[int, int] | None]) -> tuple[str, list[str]] | None:
    """This host and the paths that it does not see as another one does: tokens by being there, files by size and time."""
    missing = [token for token in tokens if not Path(token).is_file()]
    missing += [path for path, known in files.items() if seen_as(path) != known]
    return (socket.gethostname(), missing) if missing else None


def seen_as(path: str) -> tuple[int, int] | None:
    """Size in bytes and modification time in seconds of a file; None when there is none.

    No inode: shared disks may number files anew on every machine.
    """
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return found.st_size, int(found.st_mtime)
