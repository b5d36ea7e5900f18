"""Where a router is trained: in this process, or on a worker of a Dask cluster that has the GPU which this process lacks.

A worker that shares no disk with this process reads the queries from a store and keeps its checkpoints there, so that another
worker goes on when it dies. It trains in a process of its own, which ends with the wish for it: when the client gives the task
up or is gone. What is written comes by a store too, lines of progress by Dask's events, so nothing large passes the scheduler.
"""

from __future__ import annotations

import json
import pickle
import queue
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from router_training.attempt import CALL, DONE, Place, carry_out
from router_training.data import RECORD
from router_training.processes import run_together
from router_training.tasks import active_client
from router_training.training import Training
from storage.errors import ChannelMergingError, ClusterError
from storage.files import open_local
from storage.trees import copy_down

GPU = "GPU"
"""The resource that workers with GPUs declare."""
POLL_S = 0.5
LOOK_S = 5.0
"""How often it is asked which workers there are."""
WAIT_S = 120.0
"""How long a training waits while no worker is there that could take it."""

Tell = Callable[[str], None]


def train_placed(training: Training, place: Place, tell: Tell) -> dict[str, Any]:
    """Train a router and write its files; the record for the manifest.

    A BERT router is trained on a worker of the active Dask client that declares a GPU, if this process has none and such
    workers see what is read. ClusterError when they are gone for too long or each that tries dies.
    """
    client = active_client() if training.section.kind == "bert" else None
    workers = _workers(client) if client is not None else {}
    if workers and not has_gpu():
        if not (blind := _blind(client, [*workers], training, place)):
            return _on_some_worker(client, training, place, tell, max(workers.values()))
        tell(f"{blind}: the router is trained in this process")
    return carry_out(training, place, tell)


def has_gpu() -> bool:
    """Whether torch finds a GPU for this process."""
    import torch

    return torch.cuda.is_available()


def _workers(client: Any) -> dict[str, int]:
    """Address -> GPUs that it declares, of the workers with any. One that is paused will go on."""
    workers = client.scheduler_info(n_workers=-1)["workers"]
    there = {address: worker["resources"] for address, worker in workers.items() if worker["status"] in ("running", "paused")}
    return {address: int(declared[GPU]) for address, declared in there.items() if declared.get(GPU, 0) >= 1}


def _blind(client: Any, workers: list[str], training: Training, place: Place) -> str | None:
    """What keeps these workers from reading what is read; None when they see it all."""
    folders = [str(place.folder)] if place.shared.is_local else []
    encoder = training.section.encoder if Path(training.section.encoder).is_absolute() else None
    answers = client.run(seen_here, folders, encoder, training.encoder, workers=workers, on_error="return")
    blind = sorted(worker for worker, answer in answers.items() if answer is not True)  # an error says no, too
    paths = [*folders, *([encoder] if encoder else [])]
    return f"workers with a GPU do not see the same {' and '.join(paths)} ({', '.join(blind[:3])})" if blind else None


def seen_here(folders: list[str], encoder: str | None, files: Mapping[str, str]) -> bool:
    """Whether the process that is asked sees these folders, and these files, by their sha256, in the encoder's."""
    if not all(Path(folder).is_dir() for folder in folders):
        return False
    try:
        return encoder is None or open_local("router.encoder", Path(encoder)).identities(files) == dict(files)
    except (ChannelMergingError, OSError):
        return False


@dataclass(frozen=True)
class _Call:
    """What a worker is told."""

    training: Training
    place: Place
    devices: int
    topic: str
    """Of the events that its lines of progress are."""


def _in_worker(call: _Call) -> dict[str, Any]:
    """Have a process train, on the worker that calls."""
    from distributed import Reschedule, get_worker

    worker, training, place = get_worker(), call.training, call.place
    key = worker.get_current_task()

    def tell(line: str) -> None:
        worker.log_event(call.topic, line)

    def check() -> None:
        task = worker.state.tasks.get(key)
        if task is None or task.state in ("cancelled", "resumed"):
            raise ClusterError("the training was given up")
        if worker.status.name not in ("running", "paused"):
            raise Reschedule  # to another worker

    tell(f"the router is trained on worker {worker.address}")
    with TemporaryDirectory(dir=worker.local_directory) as name:
        folder = Path(name)
        if not place.shared.is_local:
            queries = folder / training.prepared.folder.name
            copy_down(place.shared.under(queries.name), queries, last=RECORD)
            training = replace(training, prepared=replace(training.prepared, folder=queries))
            place = replace(place, folder=folder)
        (folder / CALL).write_bytes(pickle.dumps((training, place, call.devices)))
        run_together("router_training.attempt", 1, folder, tell, check)
        record: dict[str, Any] = json.loads((folder / DONE).read_bytes())
        return record


def _on_some_worker(client: Any, training: Training, place: Place, tell: Tell, devices: int) -> dict[str, Any]:
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    topic = f"router-{uuid.uuid4().hex[:8]}"
    client.subscribe_topic(topic, lambda event: lines.put(event[1]))
    call = _Call(training, place, devices, topic)
    future = client.submit(_in_worker, call, key=f"router bert-{topic}", pure=False, resources={GPU: devices})
    try:
        return _followed(client, future, lines, tell, devices)
    finally:
        if client.status == "running":
            future.cancel()  # nothing where it is done
            client.unsubscribe_topic(topic)


def _followed(client: Any, future: Any, lines: queue.SimpleQueue[str], tell: Tell, devices: int) -> dict[str, Any]:
    """The task's result, once it is there."""
    from distributed import KilledWorker

    met = looked = time.monotonic()
    while not future.done():
        with suppress(queue.Empty):
            tell(lines.get(timeout=POLL_S))
        now = time.monotonic()
        if now - looked >= LOOK_S:
            looked = now
            met = now if any(count >= devices for count in _workers(client).values()) else met
        if client.status != "running" or now - met >= WAIT_S:
            break
    while not lines.empty():
        tell(lines.get())
    if not future.done() or future.cancelled():
        lost = "the Dask scheduler is gone" if client.status != "running" else f"no worker declares {GPU}={devices} any more"
        raise ClusterError(f"the BERT router's training was lost: {lost}. Run again: it goes on from its last checkpoint.")
    try:
        result: dict[str, Any] = future.result()
    except KilledWorker as error:
        raise ClusterError(
            f"the BERT router's training: every worker that tried it died, {error.allowed_failures + 1} of them; often memory "
            "ran out: raise router.accumulate, or give workers more memory, and run again"
        ) from None
    return result
