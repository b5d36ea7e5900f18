"""Where blocks are computed: in this process or on a Dask cluster. Same function, same tasks, same results in order."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from pipeline.memory import return_freed_memory
from pipeline.recipe import ClusterSection
from storage.errors import ClusterError

CONNECT_SECONDS = 30

Task = TypeVar("Task")
Result = TypeVar("Result")


class Reporter(Protocol):
    """Receives progress: a command line draws it, a flow logs it."""

    def start(self, stage: str, total: int) -> None:
        """A stage begins with this many blocks."""

    def advance(self, stage: str, label: str) -> None:
        """One block is done."""

    def note(self, text: str) -> None:
        """Something a user should know."""


class Silent:
    """Reports nothing."""

    def start(self, stage: str, total: int) -> None:
        pass

    def advance(self, stage: str, label: str) -> None:
        pass

    def note(self, text: str) -> None:
        pass


class Engine(Protocol):
    """Runs a function over tasks."""

    reporter: Reporter
    threads: int
    """Threads that a task may compute on."""

    def run(self, stage: str, function: Callable[[Task], Result], tasks: Sequence[Task], labels: Sequence[str]) -> list[Result]:
        """Results in the order of the tasks. The first error ends the stage."""
        ...


class SerialEngine:
    """One task after the other in this process: the reference the others must match."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter
        self.threads = default_workers()

    def run(self, stage: str, function: Callable[[Task], Result], tasks: Sequence[Task], labels: Sequence[str]) -> list[Result]:
        self.reporter.start(stage, len(tasks))
        results = []
        for task, label in zip(tasks, labels, strict=True):
            results.append(function(task))
            self.reporter.advance(stage, label)
        return results


class ThreadEngine:
    """Tasks on threads of this process: what they do most of the time, reading, decoding, computing, needs no interpreter."""

    def __init__(self, reporter: Reporter, workers: int) -> None:
        self.reporter = reporter
        self.workers = workers
        self.threads = 1

    def run(self, stage: str, function: Callable[[Task], Result], tasks: Sequence[Task], labels: Sequence[str]) -> list[Result]:
        self.reporter.start(stage, len(tasks))
        with ThreadPoolExecutor(self.workers, thread_name_prefix=stage) as pool:
            futures = {pool.submit(function, task): i for i, task in enumerate(tasks)}
            try:
                for future in as_completed(futures):
                    future.result()
                    self.reporter.advance(stage, labels[futures[future]])
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        return [future.result() for future in futures]


def _in_worker(function: Callable[[Task], Result], task: Task) -> Result:
    """Run a task on a worker, whose allocator Dask has set to keep nothing: most of a run would go into mapping pages."""
    return_freed_memory()
    return function(task)


class DaskEngine:
    """Tasks on the workers of a Dask cluster."""

    def __init__(self, client: Any, reporter: Reporter) -> None:
        self.client = client
        self.reporter = reporter
        self.threads = 1  # workers are as many as cores

    def run(self, stage: str, function: Callable[[Task], Result], tasks: Sequence[Task], labels: Sequence[str]) -> list[Result]:
        from distributed import KilledWorker
        from distributed import as_completed as completed

        self.reporter.start(stage, len(tasks))
        run = uuid.uuid4().hex[:8]  # keys are unique per run: completion is decided by the stores, not by Dask's cache
        futures = {
            self.client.submit(_in_worker, function, task, key=f"{stage} {label}-{run}-{i}", pure=False): i
            for i, (task, label) in enumerate(zip(tasks, labels, strict=True))
        }
        results: list[Any] = [None] * len(tasks)
        try:
            for future in completed(list(futures)):
                position = futures[future]
                try:
                    results[position] = future.result()
                except KilledWorker as error:
                    raise ClusterError(
                        f"{stage}: {labels[position]}: every worker that tried this block died, {error.allowed_failures + 1} "
                        "of them; often memory ran out: lower cluster.memory or cluster.workers, and run again"
                    ) from error
                self.reporter.advance(stage, labels[position])
        finally:
            self.client.cancel(list(futures))
        return results


def default_workers() -> int:
    """One worker process per core this process may use, at most eight."""
    return min(8, len(os.sched_getaffinity(0)))


@contextmanager
def open_engine(cluster: ClusterSection, reporter: Reporter) -> Iterator[Engine]:
    """The engine a recipe asks for; a local cluster lives as long as the context."""
    if cluster.where == "none":
        return_freed_memory()
        yield ThreadEngine(reporter, cluster.workers or default_workers())
        return
    from distributed import Client, LocalCluster

    if cluster.where != "local":
        try:
            remote = Client(cluster.where, timeout=CONNECT_SECONDS)
        except (OSError, ValueError) as error:
            raise ClusterError(
                f"no Dask scheduler answers at {cluster.where} ({error}). Start one there, or use --cluster local."
            ) from None
        with remote as client:
            yield DaskEngine(client, reporter)
        return
    workers = cluster.workers or default_workers()
    # one thread per process: the arithmetic is memory-bound, and torch's threads would oversubscribe the cores
    with (
        LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            dashboard_address="127.0.0.1:0",
            memory_limit=0,
            silence_logs=logging.CRITICAL,  # errors of tasks come back with their results; the rest is noise of closing
        ) as local,
        Client(local) as client,
    ):
        yield DaskEngine(client, reporter)
