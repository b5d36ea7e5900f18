"""Blocks on the workers of a Dask cluster: submitted a window at a time, watched while they run."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import queue
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from distributed import Client, Future, KilledWorker

from pipeline.dask_checks import check_places
from pipeline.dask_worker import in_worker
from pipeline.engine import Cancelled, Reporter
from storage.errors import ClusterError

WAIT_FOR_WORKERS_S = 120.0
"""How long a run waits, at its beginning and later, while no worker is there that could take a block."""
ANSWER_S = 30.0
"""How long the scheduler may take to say which workers there are."""
WATCH_S = 2.0
"""How often that is asked."""
AHEAD = 8
"""Blocks submitted per worker beyond those that it can run, at least: it finds the next at hand when it has finished one. With
fewer it waits for the way to the scheduler, the client and back, some milliseconds."""

Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Demand:
    """What one task asks of a worker."""

    memory: int
    """Bytes."""
    gpu: bool = False

    def resources(self, workers: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """What Dask's scheduler is told to account for. Memory only where workers declare it."""
        asked: dict[str, float] = {"GPU": 1} if self.gpu else {}
        declared = any("MEMORY" in worker["resources"] for worker in workers)
        return asked | ({"MEMORY": self.memory} if declared else {})

    def slots(self, worker: Mapping[str, Any], resources: Mapping[str, float]) -> int:
        """Tasks that a worker can run at once, from how the scheduler describes it; 0 when it never can."""
        declared = worker["resources"]
        if any(declared.get(name, 0) < amount for name, amount in resources.items()):
            return 0
        limits = [int(declared[name] // amount) for name, amount in resources.items() if amount]
        if worker["memory_limit"] and "MEMORY" not in resources:
            limits.append(max(1, worker["memory_limit"] // self.memory))
        return int(min([worker["nthreads"], *limits]))

    def problem(self, workers: Sequence[Mapping[str, Any]]) -> str | None:
        """Why none of these workers can ever run a task, with the remedy; None when one can, or when there is none."""
        resources = self.resources(workers)
        if not workers or any(self.slots(worker, resources) for worker in workers):
            return None
        if self.gpu and not any(worker["resources"].get("GPU") for worker in workers):
            return (
                f"cluster.kernel is cuda, but none of the {len(workers)} workers declares a GPU. Start workers where there is "
                "one by `dask worker ADDRESS --nthreads 1 --resources GPU=1` or `dask cuda worker ADDRESS --resources GPU=1`, "
                "or use kernel: fused"
            )
        most = max(worker["resources"].get("MEMORY", 0) for worker in workers)
        return (
            f"cluster.memory is {self.memory:,} bytes, but no worker declares that much MEMORY{' beside a GPU' * self.gpu}, at "
            f"most {most:,.0f}; lower cluster.memory, or start workers with --resources MEMORY=<bytes for tasks>"
        )


def shown_key(stage: str, label: str, run: str, number: int) -> str:
    """The unique key of a block, which Dask's dashboard shows as ``merge model.layers.7.mlp.up_proj``.

    Dask cuts a key at the first part between hyphens that is not of letters, so names keep none.
    """
    name = f"{stage} {label.removesuffix('.weight')}".replace("-", "_")
    return f"{name}-{run}-{number}"


@dataclass
class _Batch:
    """One call of ``run``."""

    stage: str
    function: Callable[[Any], Any]
    tasks: Sequence[Any]
    labels: Sequence[str]
    priority: int
    name: str = field(default_factory=lambda: uuid.uuid4().hex[:8])  # completion is decided by the stores, not by Dask's cache
    flying: dict[int, Future] = field(default_factory=dict)
    """Submitted and not seen done."""
    landed: queue.SimpleQueue[int | None] = field(default_factory=queue.SimpleQueue)
    """Positions of tasks that are done; None wakes the caller."""
    error: Exception | None = None
    """Why a task could not be submitted."""

    def take(self, timeout: float) -> list[int]:
        """Positions that have landed since the last call, waiting for one at most this many seconds."""
        found: list[int | None] = []
        with suppress(queue.Empty):
            found.append(self.landed.get(timeout=timeout))
            while True:
                found.append(self.landed.get_nowait())
        return [position for position in found if position is not None]


class DaskEngine:
    """Tasks on the workers of a Dask cluster.

    All calls of ``run`` share one window: of what waits, as much of the highest priority is submitted as the workers that
    are there can run, and as much again. Whether there are any, and whether the scheduler is there, is seen to while a call
    waits.
    """

    def __init__(self, client: Client, reporter: Reporter, demand: Demand, threads: int, *, shares_disk: bool) -> None:
        self.client = client
        self.reporter = reporter
        self.threads = threads
        self._demand = demand
        self._shares_disk = shares_disk
        self._lock = threading.Lock()
        self._waiting: list[tuple[int, int, _Batch, int]] = []
        self._count = itertools.count()
        self._batches: dict[str, _Batch] = {}
        self._flying = 0
        self._window = 0
        self._resources: dict[str, float] = {}
        self._looking = threading.Lock()
        self._looked = self._met_worker = time.monotonic()
        self._stopped = False
        if problem := demand.problem(self._look()):
            raise ClusterError(f"Dask scheduler {self._address}: {problem}")

    def run(
        self,
        stage: str,
        function: Callable[[Task], Result],
        tasks: Sequence[Task],
        labels: Sequence[str],
        priority: int = 0,
    ) -> list[Result]:
        self.reporter.start(stage, len(tasks))
        batch = _Batch(stage, function, tasks, labels, priority)
        results: dict[int, Result] = {}
        self._admit(batch)
        try:
            while len(results) < len(tasks):
                self._watch()
                self._submit()
                if batch.error:
                    self._check_connection(batch.error)
                    raise batch.error
                landed = batch.take(WATCH_S)
                results |= zip(landed, self._values(batch, landed), strict=True)
                for position in landed:
                    self.reporter.advance(stage, labels[position])
        finally:
            self._dismiss(batch)
        return [results[position] for position in range(len(tasks))]

    def _admit(self, batch: _Batch) -> None:
        with self._lock:
            if not self._batches:  # nobody has looked for workers since the last call
                self._met_worker = time.monotonic()
            self._batches[batch.name] = batch
            for position, _ in enumerate(zip(batch.tasks, batch.labels, strict=True)):
                heapq.heappush(self._waiting, (-batch.priority, next(self._count), batch, position))

    def _dismiss(self, batch: _Batch) -> None:
        """Forget a call, and what of it has not ended; a block at work on a worker ends there, and nobody is told."""
        with self._lock:
            del self._batches[batch.name]
            self._flying -= len(batch.flying)
            others = list(self._batches.values())
        if batch.flying and self.client.status == "running":
            with suppress(Exception):  # the cluster may go away at any time, and that is no news here
                self.client.cancel(list(batch.flying.values()))
        for other in others:
            other.landed.put(None)

    def _submit(self) -> None:
        """Fill the window from what waits, whoever's it is."""
        with self._lock:
            while self._waiting and self._flying < self._window:
                _, _, batch, position = heapq.heappop(self._waiting)
                if batch.name not in self._batches:
                    continue
                key = shown_key(batch.stage, batch.labels[position], batch.name, position)
                limit = 0 if "MEMORY" in self._resources else None  # what the scheduler accounts for, the worker need not
                try:
                    future = self.client.submit(
                        in_worker, batch.function, batch.tasks[position], self._demand.memory, limit,
                        key=key, pure=False, priority=batch.priority, resources=self._resources or None,
                    )  # fmt: skip
                except Exception as error:  # raised where that call waits
                    batch.error = error
                    batch.landed.put(None)
                    continue
                batch.flying[position] = future
                self._flying += 1
                future.add_done_callback(partial(_land, batch, position))

    def _values(self, batch: _Batch, landed: Sequence[int]) -> list[Any]:
        """Results of blocks that are done. A result that is lost with its worker is computed again meanwhile."""
        futures = [batch.flying.pop(position) for position in landed]
        with self._lock:
            self._flying -= len(futures)
        while futures:
            for position, future in zip(landed, futures, strict=True):
                if future.cancelled():
                    raise self._gone()
                if future.status == "error":
                    _raise(batch, position, future)
            try:
                return list(self.client.sync(self._gather, futures))
            except (TimeoutError, CancelledError, OSError):  # of the network: what a task raised has been raised above
                self._watch()
        return []

    async def _gather(self, futures: list[Future]) -> list[Any]:
        return list(await asyncio.wait_for(self.client.gather(futures), ANSWER_S))

    def _watch(self) -> None:
        """See to the cluster, now and then, in the thread of one of the callers."""
        if self._stopped:
            raise Cancelled
        self._check_connection(None)
        if time.monotonic() - self._looked < WATCH_S or not self._looking.acquire(blocking=False):
            return
        try:
            self._look()
        finally:
            self._looking.release()

    def _look(self) -> list[dict[str, Any]]:
        """Ask for the workers and size the window; ClusterError when there have been none for too long."""
        try:
            workers: list[dict[str, Any]] = self.client.sync(self._workers)
        except (TimeoutError, CancelledError, OSError) as error:
            raise self._gone() from error
        self._looked = now = time.monotonic()
        self._resources = self._demand.resources(workers)
        slots = [self._demand.slots(worker, self._resources) for worker in workers]
        self._window = sum(count + max(count, AHEAD) for count in slots if count)
        if self._window:
            self._met_worker = now
        elif now - self._met_worker >= WAIT_FOR_WORKERS_S:
            problem = self._demand.problem(workers) or "there is no running worker"
            raise ClusterError(
                f"Dask scheduler {self._address}: {problem}, and none came in {WAIT_FOR_WORKERS_S:.0f} s. Start workers by "
                f"`dask worker {self._address}` and run again; finished blocks are kept"
            )
        return workers

    async def _workers(self) -> list[dict[str, Any]]:
        identity = await asyncio.wait_for(self.client.scheduler.identity(), ANSWER_S)
        workers: list[dict[str, Any]] = list(identity["workers"].values())
        return [worker for worker in workers if worker["status"] == "running"]

    def _check_connection(self, cause: Exception | None) -> None:
        if self.client.status != "running":
            raise self._gone() from cause

    def _gone(self) -> ClusterError:
        return ClusterError(
            f"the Dask scheduler at {self._address} is gone or was restarted; start it and run again; finished blocks are kept"
        )

    @property
    def _address(self) -> str:
        return str(self.client.scheduler.address)

    def check(self) -> None:
        if self._stopped:
            raise Cancelled

    def cancel(self) -> None:
        self._stopped = True
        with self._lock:
            batches = list(self._batches.values())
        for batch in batches:
            batch.landed.put(None)

    def check_places(self, folders: Sequence[Path], files: Sequence[Path] = ()) -> None:
        if not self._shares_disk:
            check_places(self.client, folders, files)


def _land(batch: _Batch, position: int, future: Future) -> None:
    batch.landed.put(position)


def _raise(batch: _Batch, position: int, future: Future) -> NoReturn:
    """What a task raised."""
    try:
        future.result()
    except KilledWorker as error:
        raise ClusterError(
            f"{batch.stage}: {batch.labels[position]}: every worker that tried this block died, {error.allowed_failures + 1} "
            "of them; often memory ran out: lower cluster.memory or cluster.workers, and run again"
        ) from error
    raise AssertionError("a block that failed has a result")
