"""Where blocks are computed: in this process or on a Dask cluster. Same function, same tasks, same results in order."""

from __future__ import annotations

import heapq
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, as_completed, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pipeline.memory import return_freed_memory
from pipeline.recipe import ClusterSection
from storage.errors import ClusterError

Task = TypeVar("Task")
Result = TypeVar("Result")


class Cancelled(Exception):  # noqa: N818 - no error: what a stage meets when another one has failed
    """The engine was told to stop while, or before, this call ran. Who cancels knows the reason and reports that."""


class Reporter(Protocol):
    """Receives progress: a command line draws it, a flow logs it. Called from several threads at once."""

    def start(self, stage: str, total: int) -> None:
        """A stage has this many blocks more to compute."""

    def skip(self, stage: str, count: int) -> None:
        """This many of a stage's blocks were found finished, by an earlier run."""

    def advance(self, stage: str, label: str) -> None:
        """One block is done."""

    def done(self, stage: str) -> None:
        """The stage is over: nothing more of it will come."""

    def note(self, text: str) -> None:
        """Something a user should know."""


class Silent:
    """Reports nothing."""

    def start(self, stage: str, total: int) -> None:
        pass

    def skip(self, stage: str, count: int) -> None:
        pass

    def advance(self, stage: str, label: str) -> None:
        pass

    def done(self, stage: str) -> None:
        pass

    def note(self, text: str) -> None:
        pass


class Waiting:
    """What a lock calls while another run holds it: tells so once, and gives up when ``check`` raises."""

    def __init__(self, reporter: Reporter, text: str, check: Callable[[], None] = lambda: None) -> None:
        self._tell: Callable[[], None] | None = partial(reporter.note, text)
        self._check = check

    def __call__(self) -> None:
        if self._tell is not None:
            self._tell()
            self._tell = None
        self._check()


class Engine(Protocol):
    """Runs a function over tasks. Every method may be called from several threads at once."""

    reporter: Reporter
    threads: int
    """Threads that a task may compute on."""

    def run(
        self,
        stage: str,
        function: Callable[[Task], Result],
        tasks: Sequence[Task],
        labels: Sequence[str],
        priority: int = 0,
    ) -> list[Result]:
        """Results in the order of the tasks. The first error ends this call: its tasks that wait are dropped.

        Blocks of calls with a higher ``priority`` are begun first. Reports the blocks to come and each that is done; that
        the stage is over is the caller's to say. Raises what a task raised; Cancelled after ``cancel``; ClusterError when
        the cluster is lost.
        """
        ...

    def check(self) -> None:
        """Cancelled after ``cancel``."""
        ...

    def cancel(self) -> None:
        """End all calls of ``run``, under way and to come, with Cancelled; blocks at work in this process end first."""
        ...

    def check_places(self, folders: Sequence[Path], files: Sequence[Path] = ()) -> None:
        """ClusterError when a worker does not see these folders of this machine, made if missing, or other files than these.

        Folders are written to: a token is put there for a moment. Files are only read.
        """
        ...


class SerialEngine:
    """One task after the other in this process, in the order of calls: the reference the others must match."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter
        self.threads = default_workers()
        self._one_at_a_time = threading.Lock()
        self._stopped = False

    def run(
        self,
        stage: str,
        function: Callable[[Task], Result],
        tasks: Sequence[Task],
        labels: Sequence[str],
        priority: int = 0,
    ) -> list[Result]:
        self.reporter.start(stage, len(tasks))
        results = []
        for task, label in zip(tasks, labels, strict=True):
            with self._one_at_a_time:
                self.check()
                results.append(function(task))
            self.reporter.advance(stage, label)
        self.check()
        return results

    def check(self) -> None:
        if self._stopped:
            raise Cancelled

    def cancel(self) -> None:
        self._stopped = True

    def check_places(self, folders: Sequence[Path], files: Sequence[Path] = ()) -> None:
        pass


class ThreadEngine:
    """Tasks on threads of this process: what they do most of the time, reading, decoding, computing, needs no interpreter.

    All calls share the threads. A thread that is free takes the waiting task of the highest priority, of equal ones the
    oldest.
    """

    def __init__(self, reporter: Reporter, workers: int) -> None:
        self.reporter = reporter
        self.workers = workers
        self.threads = 1
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="block")
        self._lock = threading.Lock()
        self._waiting: list[tuple[int, int, Future[Any], Callable[[], Any]]] = []
        self._count = itertools.count()
        self._stopped = False

    def run(
        self,
        stage: str,
        function: Callable[[Task], Result],
        tasks: Sequence[Task],
        labels: Sequence[str],
        priority: int = 0,
    ) -> list[Result]:
        self.reporter.start(stage, len(tasks))
        calls = [partial(function, task) for task in tasks]
        futures: dict[Future[Result], str] = dict(zip(self._put(calls, priority), labels, strict=True))
        try:
            for future in as_completed(futures):
                future.result()
                self.reporter.advance(stage, futures[future])
        except BaseException as error:
            wait([future for future in futures if not future.cancel()])  # what a caller tears down must not be written to
            if isinstance(error, CancelledError):
                raise Cancelled from None
            raise
        return [future.result() for future in futures]

    def _put(self, calls: Sequence[Callable[[], Result]], priority: int) -> list[Future[Result]]:
        """Queue calls; as many turns of the pool's threads are queued, and each takes the best call of its time."""
        futures: list[Future[Result]] = [Future() for _ in calls]
        with self._lock:
            if self._stopped:
                raise Cancelled
            for future, call in zip(futures, calls, strict=True):
                heapq.heappush(self._waiting, (-priority, next(self._count), future, call))
                self._pool.submit(self._take)
        return futures

    def _take(self) -> None:
        with self._lock:
            if not self._waiting:
                return
            _, _, future, call = heapq.heappop(self._waiting)
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(call())
        except BaseException as error:  # raised where the result is waited for
            future.set_exception(error)

    def check(self) -> None:
        if self._stopped:
            raise Cancelled

    def cancel(self) -> None:
        with self._lock:
            self._stopped = True
            dropped, self._waiting = self._waiting, []
        for _, _, future, _ in dropped:
            future.cancel()
            future.set_running_or_notify_cancel()

    def check_places(self, folders: Sequence[Path], files: Sequence[Path] = ()) -> None:
        pass

    def close(self) -> None:
        """Drop what waits, and wait for what is at work."""
        self.cancel()
        self._pool.shutdown()


def default_workers() -> int:
    """One worker process per core this process may use, at most eight."""
    return min(8, len(os.sched_getaffinity(0)))


def check_gpu() -> None:
    """ClusterError when torch finds no GPU for this process."""
    import torch

    if not torch.cuda.is_available():
        raise ClusterError("cluster.kernel is cuda, but torch finds no GPU here. Use a machine with one, or kernel: fused.")


@contextmanager
def open_engine(cluster: ClusterSection, reporter: Reporter) -> Iterator[Engine]:
    """The engine a recipe asks for; a local cluster lives as long as the context.

    Leaving it cancels what runs. ClusterError, before anything is computed, when the cluster cannot be reached or its
    workers cannot do what the recipe asks for.
    """
    if cluster.where != "none":
        from pipeline.dask_cluster import open_cluster

        with open_cluster(cluster, reporter) as engine:
            yield engine
        return
    if cluster.kernel == "cuda":
        check_gpu()
    return_freed_memory()
    threads = ThreadEngine(reporter, cluster.workers or default_workers())
    try:
        yield threads
    finally:
        threads.close()
