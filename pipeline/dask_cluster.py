"""The clusters a recipe can ask for: processes of this machine, one per GPU of it, or a scheduler that runs elsewhere."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from multiprocessing import resource_tracker
from typing import Any

import dask
from distributed import Client, LocalCluster
from distributed.utils import silence_logging_cmgr

from pipeline.dask_checks import check_workers
from pipeline.dask_engine import WAIT_FOR_WORKERS_S, DaskEngine, Demand
from pipeline.dask_worker import LocalWorker
from pipeline.engine import Engine, Reporter, check_gpu, default_workers
from pipeline.recipe import ClusterSection
from storage.errors import ClusterError

CONNECT_S = 30.0
"""How long a scheduler may take to answer."""
WORKER_TTL_S = 60.0
"""A worker of this machine that gives no sign of life for so long is killed and started anew; its blocks go elsewhere."""
QUIET = {
    "dashboard_address": "127.0.0.1:0",
    "silence_logs": logging.CRITICAL,  # errors of tasks come back with their results; the rest is noise of closing
}


def _cpu_cluster(section: ClusterSection) -> Any:
    gpu = section.kernel == "cuda"
    if gpu:
        check_gpu()
    # one thread per process: the arithmetic is memory-bound, and torch's threads would oversubscribe the cores
    return LocalCluster(
        n_workers=section.workers or default_workers(),
        threads_per_worker=1,
        memory_limit=0,
        resources={"GPU": 1} if gpu else None,
        **QUIET,
    )


def _gpu_cluster(section: ClusterSection) -> Any:
    """One process per GPU, each of which sees its own first."""
    try:
        from dask_cuda import LocalCUDACluster  # type: ignore[import-not-found]
    except ImportError as error:
        raise ClusterError(
            f"cluster.kind is cuda, which needs dask-cuda ({error}). Install it by pip install 'channel-merging[cuda]', or use "
            "kind: local."
        ) from None
    check_gpu()
    return LocalCUDACluster(
        n_workers=section.workers,
        threads_per_worker=1,
        memory_limit=0,
        device_memory_limit=None,  # results are receipts: there is nothing to spill
        resources={"GPU": 1},
        **QUIET,
    )


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Put off Ctrl-C and SIGTERM to the end of the context, and keep them from processes that are started in it.

    A cluster that is interrupted while it starts leaves processes and tracebacks. Its threads, begun here, inherit that these
    signals are blocked, and so do the processes that they start, now and when a worker has died.
    """
    ends = (signal.SIGINT, signal.SIGTERM)
    caught: list[int] = []
    resource_tracker.ensure_running()  # started later, it would let the signals through to its starter's thread
    held = signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    main = threading.current_thread() is threading.main_thread()
    handlers = {end: signal.signal(end, lambda number, _: caught.append(number)) for end in ends if main}
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        for end, handler in handlers.items():
            signal.signal(end, handler)
        if caught:
            signal.raise_signal(caught[0])


def _started(section: ClusterSection) -> Any:
    try:
        with dask.config.set({"distributed.scheduler.worker-ttl": f"{WORKER_TTL_S} s"}):
            return (_gpu_cluster if section.where == "cuda" else _cpu_cluster)(section)
    except (OSError, RuntimeError, ValueError) as error:
        raise ClusterError(
            f"no cluster could be started on this machine ({error}). Ask for fewer cluster.workers, or use --cluster none."
        ) from error


@contextmanager
def _this_machine(section: ClusterSection) -> Iterator[Any]:
    """A cluster of processes of this machine, which lives as long as the context."""
    with ExitStack() as stack:
        with _undisturbed():
            cluster = stack.enter_context(_started(section))
        yield cluster


@contextmanager
def _connected(place: Any) -> Iterator[Client]:
    """A client of a cluster, or of the scheduler at an address."""
    try:
        client = Client(place, timeout=CONNECT_S)
    except (OSError, ValueError) as error:
        raise ClusterError(
            f"no Dask scheduler answers at {place} ({error}). Start one there, or use --cluster local."
        ) from None
    with client:
        yield client


def _await_workers(client: Client) -> None:
    try:
        client.wait_for_workers(1, timeout=WAIT_FOR_WORKERS_S)
    except TimeoutError:
        address = client.scheduler.address
        raise ClusterError(
            f"the Dask scheduler at {address} has had no worker for {WAIT_FOR_WORKERS_S:.0f} s. Start workers by "
            f"`dask worker {address}` and run again."
        ) from None


@contextmanager
def open_cluster(section: ClusterSection, reporter: Reporter) -> Iterator[Engine]:
    """The engine of a cluster whose workers can do what the recipe asks for; otherwise ClusterError."""
    here = section.where in ("local", "cuda")
    demand = Demand(section.memory, section.kernel == "cuda")
    with (
        silence_logging_cmgr(logging.CRITICAL),  # what is lost is told once, as an error
        _this_machine(section) if here else nullcontext(section.where) as place,
        _connected(place) as client,
    ):
        if here:
            client.register_plugin(LocalWorker())
        _await_workers(client)
        threads = 1 if here else check_workers(client)
        engine = DaskEngine(client, reporter, demand, threads, shares_disk=here)
        try:
            yield engine
        finally:
            engine.cancel()
