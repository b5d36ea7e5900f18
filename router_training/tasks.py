"""Where tasks run: one after another here, or by Dask on what is at hand."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

POLL_S = 1.0

_T = TypeVar("_T")


class Runner(Protocol):
    """Calls a function with each of these arguments and returns what it returned, in order."""

    def __call__(
        self, task: Callable[..., _T], calls: Sequence[tuple[Any, ...]], folder: Path, files: Sequence[Path]
    ) -> list[_T]:
        """``folder``: what the tasks write to; ``files``: what they read."""
        ...


def here(task: Callable[..., _T], calls: Sequence[tuple[Any, ...]], folder: Path, files: Sequence[Path]) -> list[_T]:
    """One after another in this process, without Dask."""
    return [task(*call) for call in calls]


def on_dask(
    task: Callable[..., _T],
    calls: Sequence[tuple[Any, ...]],
    folder: Path,
    files: Sequence[Path],
    check: Callable[[], None] = lambda: None,
) -> list[_T]:
    """By Dask: on the cluster whose client is active, if all its workers see folder and files, else in threads.

    ``check`` is asked now and then; what it raises ends this, once the tasks that are at work here have ended.
    """
    import dask
    from dask.callbacks import Callback

    tasks = [dask.delayed(task, pure=False, traverse=False)(*call) for call in calls]
    client = active_client()
    if client is not None and _sees_all(client, folder, files):
        return _on_cluster(client, tasks, check)
    with Callback(pretask=lambda *_: check()):
        return list(dask.compute(*tasks, scheduler=None if client is None else "threads"))


def _on_cluster(client: Any, tasks: Sequence[Any], check: Callable[[], None]) -> list[Any]:
    from distributed import wait

    futures = client.compute(list(tasks))
    try:
        while futures:
            check()
            with suppress(TimeoutError):
                wait(futures, timeout=POLL_S)
                break
        return list(client.gather(futures))
    finally:
        client.cancel(futures)  # what is done is not needed there any more


def active_client() -> Any:
    """The client of a Dask cluster that is active in this process, if there is one."""
    if "distributed" not in sys.modules:
        return None
    from distributed import default_client

    with suppress(ValueError):
        return default_client()
    return None


def sees(paths: Sequence[str]) -> bool:
    """Whether all these paths are there for the process that is asked."""
    return all(Path(path).exists() for path in paths)


def _sees_all(client: Any, folder: Path, files: Sequence[Path]) -> bool:
    """Whether all workers see a file that is written here and those to be read."""
    probe = folder / f"probe-{uuid.uuid4().hex}"
    probe.touch()
    try:
        # a file that is not there is missed by whoever reads it, and the error names it
        known = [str(path) for path in (probe, *files) if path.exists()]
        answers = client.run(sees, known, on_error="return")
        return bool(answers) and all(answer is True for answer in answers.values())  # an error says no, too
    finally:
        probe.unlink()
