"""Where tasks run: one after another here, or by Dask on what is at hand."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

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


def on_dask(task: Callable[..., _T], calls: Sequence[tuple[Any, ...]], folder: Path, files: Sequence[Path]) -> list[_T]:
    """By Dask: on the cluster whose client is active, if all its workers see folder and files, else in threads."""
    import dask

    tasks = [dask.delayed(task, pure=False, traverse=False)(*call) for call in calls]
    scheduler = None if _is_shared(folder, files) else "threads"
    return list(dask.compute(*tasks, scheduler=scheduler))


def sees(paths: Sequence[str]) -> bool:
    """Whether all these paths are there for the process that is asked."""
    return all(Path(path).exists() for path in paths)


def _is_shared(folder: Path, files: Sequence[Path]) -> bool:
    """Whether the workers of the active client, if there is one, see a file that is written here and those to be read."""
    if "distributed" not in sys.modules:
        return True
    from distributed import default_client

    try:
        client = default_client()
    except ValueError:
        return True
    probe = folder / f"probe-{uuid.uuid4().hex}"
    probe.touch()
    try:
        # a file that is not there is missed by whoever reads it, and the error names it
        known = [str(path) for path in (probe, *files) if path.exists()]
        answers = client.run(sees, known)
        return bool(answers) and all(answers.values())
    finally:
        probe.unlink()
