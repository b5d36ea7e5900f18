"""A BERT router trained on a worker of a cluster in other processes, which are killed; the workers say that they have a GPU."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from distributed import Client

from router_training import placement
from router_training.attempt import Place
from router_training.data import RECORD, prepare
from router_training.keeping import Kept
from router_training.placement import seen_here, train_placed
from router_training.training import Training, train_router
from serving.encoder import load_encoder
from storage.errors import ClusterError, RecipeError
from storage.local_store import LocalStore
from storage.stores import Store
from storage.trees import copy_up
from tests.router_training.test_training import KINDS, BertSection, section, texts
from tests.support import dask_processes
from tests.support.encoders import write_encoder

pytestmark = pytest.mark.usefixtures("one_thread")
ON_WORKER = "the router is trained on worker tcp://"


def until(ready: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@dataclass
class Cluster:
    """A scheduler and workers in processes of their own."""

    address: str
    client: Client
    workers: ExitStack
    folder: Path

    def worker(self, *options: str) -> subprocess.Popen[str]:
        known = len(self.client.scheduler_info(n_workers=-1)["workers"])
        process = self.workers.enter_context(dask_processes.worker(self.address, *options, folder=self.folder))
        self.client.wait_for_workers(known + 1, timeout=60)
        return process

    def trainers(self) -> list[psutil.Process]:
        """Processes that workers have started to train in."""
        pids = list(self.client.run(os.getpid).values())
        started = [child for pid in pids for child in psutil.Process(pid).children()]
        return [process for process in started if "router_training.attempt" in process.cmdline()]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    folder = tmp_path / "worker"
    folder.mkdir()
    with dask_processes.scheduler() as (address, _), Client(address) as client, ExitStack() as workers:
        yield Cluster(address, client, workers, folder)


@dataclass(frozen=True)
class Task:
    """A training, its place, and what a second one like it would have."""

    training: Training
    place: Place


@pytest.fixture
def task(tmp_path: Path, output: Store) -> Task:
    """A training whose queries are prepared, of a run whose output is here or there."""
    linear = section(tmp_path, threshold="auto", fallback="math")
    encoder = write_encoder(tmp_path / "encoder", [text for name in KINDS for text in texts(name, 400)])
    fields = {name: getattr(linear, name) for name in ("queries", "outside", "threshold", "fallback")}
    asked = BertSection(**fields, encoder=str(encoder), epochs=2)
    shared = output.under("work/router")
    folder = Path(shared.place) if shared.is_local else tmp_path / "folder"
    prepared = prepare(asked, 1, folder / "queries")
    if not shared.is_local:
        copy_up(folder / "queries", shared.under("queries"), last=RECORD)
    kept = None if shared.is_local else Kept(shared.under("checkpoints"), every=0.0)
    return Task(Training(asked, 1, prepared, kept), Place(folder, shared, output.under("staged/router")))


def checkpoints(task: Task) -> list[str]:
    """Those a training that died could go on from."""
    return [key for key in task.place.shared.sizes() if "checkpoint-" in key and key.endswith("whole.json")]


def longer(task: Task, epochs: int = 5) -> Task:
    """So long that it is met at work."""
    return replace(task, training=replace(task.training, section=replace(task.training.section, epochs=epochs)))


def test_a_worker_with_a_gpu_trains_and_writes_the_router(cluster: Cluster, task: Task, tmp_path: Path) -> None:
    cluster.worker("--nthreads", "1")
    cluster.worker("--nthreads", "1", "--resources", "GPU=1")
    has_gpu = {address for address, gpus in placement._workers(cluster.client).items() if gpus == 1}
    train_router(replace(task.training, kept=None), tmp_path / "here", tmp_path / "expected")
    if not task.place.shared.is_local:  # what the worker reads is a copy
        shutil.rmtree(task.place.folder / "queries")
    said: list[str] = []
    record = train_placed(task.training, task.place, said.append)
    assert said[0].removeprefix("the router is trained on worker ") in has_gpu
    assert [line for line in said if line.startswith("update ")]
    config = json.loads(task.place.into.get("router.json"))
    assert config["validation"]["accuracy"] == record["accuracy"] > 0.8
    assert record["seconds"].keys() == {"train", "measure"}
    assert not list(cluster.folder.rglob("*.parquet"))
    sample = texts("code", 20) + texts("math", 20)
    found = load_encoder(task.place.into, config).logits(sample)
    expected = load_encoder(LocalStore(tmp_path / "expected"), config).logits(sample)
    np.testing.assert_allclose(found, expected, atol=0.05)


def interrupted(cluster: Cluster, task: Task, interrupt: Callable[[str], None]) -> tuple[list[str], psutil.Process]:
    """Lines of a training whose worker is interrupted once, when there is a checkpoint, and the process that it had."""
    said: list[str] = []
    found: list[psutil.Process] = []

    def tell(line: str) -> None:
        said.append(line)
        if not found and checkpoints(task):
            found.extend(cluster.trainers())
            interrupt(said[0].removeprefix("the router is trained on worker "))

    asked = longer(task)
    assert train_placed(asked.training, asked.place, tell)["accuracy"] > 0.8
    assert "router.safetensors" in task.place.into.sizes()
    assert len(found) == 1
    return said, found[0]


def test_another_worker_goes_on_where_one_died(cluster: Cluster, task: Task) -> None:
    """A nanny starts the next worker; the queries and checkpoints of a store are not on its disk."""
    cluster.worker("--nthreads", "1", "--resources", "GPU=1")

    def kill(worker: str) -> None:
        os.kill(cluster.client.run(os.getpid)[worker], signal.SIGKILL)

    said, process = interrupted(cluster, task, kill)
    until(lambda: not process.is_running())  # though it alone was not killed
    assert sum(line.startswith(ON_WORKER) for line in said) == 2
    (went_on,) = [line for line in said if line.startswith("goes on from update ")]
    assert int(went_on.rpartition(" ")[2]) > 0


@pytest.mark.parametrize("output", ["local"], indirect=True)
def test_another_worker_goes_on_where_one_is_retired(cluster: Cluster, task: Task) -> None:
    """As a cluster does that grows smaller."""
    for _ in range(2):
        cluster.worker("--nthreads", "1", "--resources", "GPU=1")

    def retire(worker: str) -> None:
        cluster.client.retire_workers([worker], close_workers=True)

    said, process = interrupted(cluster, task, retire)
    until(lambda: not process.is_running())
    first, second = (line for line in said if line.startswith(ON_WORKER))
    assert first != second
    assert [line for line in said if line.startswith("goes on from update ")]


@pytest.mark.parametrize("output", ["local"], indirect=True)
def test_a_task_that_kills_its_workers_is_given_up(
    task: Task, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setenv("DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES", "0")
    cluster = request.getfixturevalue("cluster")
    cluster.worker("--nthreads", "1", "--resources", "GPU=1")

    killed: list[int] = []

    def tell(line: str) -> None:
        if line.startswith("update ") and not killed:
            killed.extend(cluster.client.run(os.getpid).values())
            os.kill(killed[0], signal.SIGKILL)

    asked = longer(task)
    with pytest.raises(
        ClusterError, match=r"every worker that tried it died, 1 of them; often memory ran out: raise router\.acc"
    ):
        train_placed(asked.training, asked.place, tell)


@pytest.mark.parametrize("output", ["local"], indirect=True)
def test_workers_that_are_gone_are_not_waited_for_for_ever(
    cluster: Cluster, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "WAIT_S", 2.0)
    monkeypatch.setattr(placement, "LOOK_S", 0.2)
    worker = cluster.worker("--nthreads", "1", "--resources", "GPU=2")
    cluster.worker("--nthreads", "1", "--resources", "GPU=1")  # too few for what was begun

    def tell(line: str) -> None:
        if line.startswith("update ") and worker.poll() is None:
            dask_processes.end(worker)

    asked = longer(task)
    with pytest.raises(ClusterError, match=r"training was lost: no worker declares GPU=2 any more. Run again: it goes on from"):
        train_placed(asked.training, asked.place, tell)


SCRIPT = """
import pickle, signal, sys
from pathlib import Path
from distributed import Client
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
from router_training.placement import train_placed
address, training, place = pickle.loads(Path(sys.argv[1]).read_bytes())
with Client(address):
    train_placed(training, place, lambda text: print(text, flush=True))
"""


@pytest.mark.parametrize("output", ["local"], indirect=True)
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_a_training_ends_with_who_wanted_it(cluster: Cluster, task: Task, tmp_path: Path, end: signal.Signals) -> None:
    cluster.worker("--nthreads", "1", "--resources", "GPU=1")
    asked = longer(task, epochs=1000)
    (tmp_path / "call").write_bytes(pickle.dumps((cluster.address, asked.training, asked.place)))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent.parent)}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "call")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment) as process:
        assert process.stdout is not None
        assert next(line for line in process.stdout if line.startswith("update "))
        (training,) = cluster.trainers()
        process.send_signal(end)
        until(lambda: not training.is_running())
    assert not (Path(asked.place.folder) / "bert" / "trained").exists()
    assert cluster.client.submit(sum, [1, 2], resources={"GPU": 1}).result(timeout=60) == 3  # the worker is free again


@pytest.mark.parametrize("output", ["local"], indirect=True)
def test_workers_that_do_not_see_what_is_read_train_nothing(cluster: Cluster, task: Task) -> None:
    """Another encoder lies on their disks; here, it is another than was identified."""
    cluster.worker("--nthreads", "1", "--resources", "GPU=1")
    said: list[str] = []
    encoder = task.training.section.encoder
    other = replace(task.training, encoder={"config.json": "0" * 64})
    assert train_placed(other, task.place, said.append)["accuracy"] > 0.8
    assert said[0].startswith(f"workers with a GPU do not see the same {task.place.folder} and {encoder} (tcp://")
    assert said[0].endswith("): the router is trained in this process")


def test_what_a_process_sees(tmp_path: Path) -> None:
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    (encoder / "config.json").write_text("{}")
    files = {"config.json": hashlib.sha256(b"{}").hexdigest()}
    assert seen_here([str(tmp_path)], str(encoder), files)
    assert seen_here([], None, {})
    assert not seen_here([str(tmp_path / "none")], None, {})
    assert not seen_here([], str(encoder), {**files, "model.safetensors": "0" * 64})
    assert not seen_here([], str(tmp_path / "none"), files)
    (encoder / "config.json").write_text("{ }")
    assert not seen_here([], str(encoder), files)


@pytest.mark.parametrize("output", ["local"], indirect=True)
def test_what_is_wrong_is_told_as_it_would_be_here(cluster: Cluster, task: Task) -> None:
    cluster.worker("--nthreads", "1", "--resources", "GPU=2")
    wrong = replace(task.training.section, learning_rate=1e30, warmup=0.0)
    with pytest.raises(RecipeError, match=r"router.learning_rate: after \d+ of \d+ updates .* loss is no number"):
        train_placed(replace(task.training, section=wrong), task.place, lambda _: None)


def test_how_many_gpus_workers_declare() -> None:
    workers: dict[str, dict[str, Any]] = {
        "a": {"status": "running", "resources": {"GPU": 1.0, "MEMORY": 5.0}},
        "b": {"status": "running", "resources": {}},
        "c": {"status": "closing", "resources": {"GPU": 4.0}},
        "f": {"status": "paused", "resources": {"GPU": 3.0}},
        "d": {"status": "running", "resources": {"GPU": 2.0}},
        "e": {"status": "running", "resources": {"GPU": 0.5}},
    }

    class Known:
        def scheduler_info(self, n_workers: int) -> dict[str, Any]:
            assert n_workers == -1
            return {"workers": workers}

    assert placement._workers(Known()) == {"a": 1, "d": 2, "f": 3}
