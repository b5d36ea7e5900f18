"""What is asked of the workers of a cluster before they are given blocks: the same formats, the same folders."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from distributed import Client

from pipeline.dask_worker import seen_as, unseen
from storage.errors import ClusterError
from storage.layout import ARTIFACT_FORMAT, DELTA_FORMAT

ANSWER_S = 30.0
"""How long a worker may take to answer: it does so beside its tasks."""
PAUSE_S = 1.0
"""How long a shared disk is given to show a new file, twice."""
SHOWN = 3
"""Workers that an error names."""


def ask_workers(client: Client, function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """Address -> what the function returned in that worker's process, or the exception it raised."""

    async def ask() -> dict[str, Any]:
        return dict(await asyncio.wait_for(client.run(function, *arguments, on_error="return"), ANSWER_S))

    try:
        return dict(client.sync(ask))
    except TimeoutError:
        raise ClusterError(
            f"some worker of {client.scheduler.address} did not answer in {ANSWER_S:.0f} s. Close it, and run again."
        ) from None


def _listing(headline: str, found: Mapping[str, str]) -> ClusterError:
    """One error about workers, which it names up to a few."""
    problems = [f"worker {address}: {problem}" for address, problem in sorted(found.items())]
    more = len(problems) - SHOWN
    return ClusterError.listing(headline, [*problems[:SHOWN], *([f"and {more} workers more"] if more > 0 else [])])


def check_workers(client: Client) -> int:
    """The threads that a task may compute on at every worker. ClusterError when they do not run this version of the project."""

    def version() -> tuple[int, int, int]:  # inside, so that it pickles whole: a worker need not have the project
        from pipeline.dask_worker import task_threads
        from storage.layout import ARTIFACT_FORMAT, DELTA_FORMAT

        return DELTA_FORMAT, ARTIFACT_FORMAT, task_threads()

    answers = ask_workers(client, version)
    here = (DELTA_FORMAT, ARTIFACT_FORMAT)
    wrong = {
        address: f"{type(answer).__name__}: {answer}"
        if isinstance(answer, BaseException)
        else f"delta stores of format {answer[0]} and artifacts of format {answer[1]}"
        for address, answer in answers.items()
        if isinstance(answer, BaseException) or answer[:2] != here
    }
    if wrong:
        raise _listing(
            f"the workers must run this version of channel-merging, with delta stores of format {here[0]} and artifacts of "
            f"format {here[1]}; install it there and restart them",
            wrong,
        )
    return min((answer[2] for answer in answers.values()), default=1)


def check_places(client: Client, folders: Sequence[Path], files: Sequence[Path]) -> None:
    """ClusterError when a worker does not see a token in each of these folders, or sees other files than these here.

    Folders that are not there are made. Files are compared by size and time: equal copies on every machine will do. Asked
    three times, as shared disks may show a new file late.
    """
    tokens = [folder.absolute() / f".seen-{uuid.uuid4().hex}.part" for folder in folders]
    known = {str(file.absolute()): seen_as(str(file)) for file in files}
    try:
        for token in tokens:
            token.parent.mkdir(parents=True, exist_ok=True)
            token.touch()
        for attempt in range(3):
            time.sleep(PAUSE_S if attempt else 0)
            answers = ask_workers(client, unseen, [str(token) for token in tokens], known)
            missing = {address: answer for address, answer in answers.items() if answer}
            if not missing:
                return
    except OSError as error:
        raise ClusterError(f"{error.filename}: cannot be written to: {error.strerror}. Choose another folder.") from None
    finally:
        for token in tokens:
            with suppress(OSError):
                token.unlink()
    named = {str(token): str(token.parent) for token in tokens}
    raise _listing(
        "the workers must see the folders of this machine; use a disk that all share, or URLs of an object store",
        {address: _told(answer, named) for address, answer in missing.items()},
    )


def _told(answer: Any, tokens: Mapping[str, str]) -> str:
    if isinstance(answer, BaseException):
        return f"{type(answer).__name__}: {answer}"
    host, paths = answer
    places = [f"folder {tokens[path]}" if path in tokens else f"file {path}" for path in paths]
    return f"host {host} does not see {', '.join(places)} as this machine does"
