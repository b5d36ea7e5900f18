"""What a Dask cluster is asked for, how much of it at a time, and what its workers must be."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, LocalCluster, get_worker
from distributed.utils import key_split

from pipeline import dask_checks
from pipeline.dask_engine import AHEAD, Demand, shown_key
from pipeline.engine import Engine, Silent, open_engine
from pipeline.recipe import ClusterSection
from storage.errors import ClusterError
from tests.support.dask_processes import worker

MIB = 1 << 20


@contextlib.contextmanager
def cluster(workers: int = 1, threads: int = 1, **options: Any) -> Iterator[tuple[str, Client]]:
    """A scheduler that knows nothing of the project, its workers, and a client of its own."""
    with (
        LocalCluster(
            n_workers=workers, threads_per_worker=threads, dashboard_address=None, **{"memory_limit": 0, **options}
        ) as local,
        Client(local, set_as_default=False) as client,
    ):
        yield local.scheduler_address, client


@contextlib.contextmanager
def engine_of(address: str, **section: Any) -> Iterator[Engine]:
    with open_engine(ClusterSection(address=address, **section), Silent()) as engine:
        yield engine


def named(name: str) -> str:
    return name


def labels(count: int) -> list[str]:
    return [f"layer {n}" for n in range(count)]


@pytest.mark.parametrize(
    ("stage", "label", "shown"),
    [
        ("merge", "model.layers.7.mlp.up_proj.weight", "merge model.layers.7.mlp.up_proj"),
        ("merge", "model.layers.7", "merge model.layers.7"),
        ("ingest code-v2", "lm_head.weight", "ingest code_v2 lm_head"),
        ("pack", "pool-00001-of-00002.safetensors", "pack pool_00001_of_00002.safetensors"),
    ],
)
def test_the_dashboard_shows_stage_and_block(stage: str, label: str, shown: str) -> None:
    assert key_split(shown_key(stage, label, "1a2b3c4d", 12)) == shown
    assert key_split(shown_key(stage, label, "abcdefab", 12)) == shown
    assert shown_key(stage, label, "1a2b3c4d", 1) != shown_key(stage, label, "1a2b3c4d", 2)


def test_the_scheduler_knows_blocks_by_their_names() -> None:
    with cluster() as (address, client), engine_of(address) as engine:
        engine.run("merge", named, ["a"], ["model.layers.7.mlp.up_proj.weight"])
        known = client.run_on_scheduler(lambda dask_scheduler: list(dask_scheduler.task_prefixes))
    assert "merge model.layers.7.mlp.up_proj" in known


def described(threads: int = 4, limit: int = 0, **resources: float) -> dict[str, Any]:
    """A worker as the scheduler describes it."""
    return {"nthreads": threads, "memory_limit": limit, "resources": resources}


@pytest.mark.parametrize(
    ("demand", "worker", "slots"),
    [
        (Demand(100), described(), 4),
        (Demand(100), described(limit=350), 3),
        (Demand(100), described(limit=50), 1),  # it may do: cluster.memory is a bound, and other workers may be worse
        (Demand(100), described(limit=350, MEMORY=200), 2),
        (Demand(100), described(MEMORY=1e9), 4),
        (Demand(100), described(MEMORY=99), 0),
        (Demand(100, gpu=True), described(), 0),
        (Demand(100, gpu=True), described(GPU=2), 2),
        (Demand(100, gpu=True), described(GPU=2, MEMORY=150), 1),
    ],
)
def test_a_worker_takes_what_its_threads_memory_and_resources_allow(demand: Demand, worker: dict[str, Any], slots: int) -> None:
    assert demand.slots(worker, demand.resources([worker])) == slots


def known_tasks(task: int) -> int:
    time.sleep(0.002)
    return len(get_worker().state.tasks)


def test_only_a_window_of_tasks_is_submitted() -> None:
    with cluster(workers=2) as (address, _), engine_of(address) as engine:
        found = engine.run("count", known_tasks, range(300), labels(300))
    assert max(found) <= 2 * (1 + AHEAD)


class Crowd:
    """How many tasks are at work at once in a worker's process."""

    def __init__(self) -> None:
        self.lock, self.inside, self.most = threading.Lock(), 0, 0

    def visit(self) -> int:
        with self.lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
        time.sleep(0.02)
        with self.lock:
            self.inside -= 1
            return self.most


CROWD = Crowd()


def visit(task: int) -> int:
    return CROWD.visit()


@pytest.mark.parametrize("options", [{"resources": {"MEMORY": 450 * MIB}}, {"memory_limit": 900 * MIB}])
def test_tasks_at_work_share_the_memory_of_a_worker(options: dict[str, Any]) -> None:
    """By what the scheduler accounts for, or, where nothing is declared, by the limit that the worker has."""
    memory = 200 * MIB if "resources" in options else 400 * MIB
    with cluster(threads=4, **options) as (address, _), engine_of(address, memory=memory) as engine:
        assert max(engine.run("visit", visit, range(40), labels(40))) == 2


def test_a_budget_that_no_worker_declares_is_refused() -> None:
    message = r"cluster.memory is 2,147,483,648 bytes, but no worker declares that much MEMORY, at most 1,000; .* --resources"
    with cluster(resources={"MEMORY": 1000}) as (address, _), pytest.raises(ClusterError, match=message), engine_of(address):
        pass


def test_the_gpu_kernel_needs_workers_that_declare_one() -> None:
    message = r"none of the 2 workers declares a GPU\. Start workers .* --resources GPU=1` .* or use kernel: fused"
    with cluster(workers=2) as (address, _), pytest.raises(ClusterError, match=message), engine_of(address, kernel="cuda"):
        pass


def where_am_i(task: int) -> str:
    return str(get_worker().name)


def test_blocks_for_gpus_go_to_workers_that_declare_one(tmp_path: Path) -> None:
    options = ["--name", "with-gpu", "--nthreads", "2", "--resources", "GPU=1"]
    with cluster() as (address, client), worker(address, *options, folder=tmp_path):
        client.wait_for_workers(2, timeout=60)
        with engine_of(address, kernel="cuda") as engine:
            assert set(engine.run("where", where_am_i, range(20), labels(20))) == {"with-gpu"}


def pools(task: None) -> tuple[int, int, int]:
    import numba
    import numpy
    import torch
    from threadpoolctl import threadpool_info  # type: ignore[import-untyped]

    assert numpy.ones(2).sum() == 2
    return torch.get_num_threads(), numba.get_num_threads(), max(pool["num_threads"] for pool in threadpool_info())


def test_a_task_on_a_cluster_of_this_machine_computes_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHANNEL_MERGING_THREADS", "2")  # for workers that somebody starts
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    with open_engine(ClusterSection(kind="local", workers=1), Silent()) as engine:
        assert engine.threads == 1
        assert engine.run("pools", pools, [None], ["layer"]) == [(1, 1, 1)]


def compiled_sum(task: int) -> tuple[float, int]:
    import numba

    def total(count: int) -> float:
        found = 0.0
        for n in range(count):
            found += n
        return found

    made: Any = numba.njit(total)
    return made(task), numba.get_num_threads()


@pytest.mark.parametrize("imported", [False, True])
@pytest.mark.parametrize("pool", ["2", None])
def test_numba_compiles_whatever_came_before(imported: bool, pool: str | None) -> None:
    """It looks at the environment whenever it compiles, and refuses another number of threads once they are started."""

    def before() -> None:
        import sys

        if imported:
            __import__("numba")
        assert imported or "numba" not in sys.modules

    with cluster(env={"NUMBA_NUM_THREADS": pool} if pool else {}) as (address, client), engine_of(address) as engine:
        client.run(before)
        assert engine.run("sum", compiled_sum, [4, 5], ["layer"] * 2) == [(6.0, 1), (10.0, 1)]


def test_workers_elsewhere_say_how_many_threads_a_task_has() -> None:
    with cluster(env={"CHANNEL_MERGING_THREADS": "2"}) as (address, _), engine_of(address) as engine:
        assert engine.threads == 2
        assert engine.run("pools", pools, [None], ["layer"])[0][::2] == (2, 2)
    with cluster() as (address, _), engine_of(address) as engine:
        assert engine.threads == 1
        assert engine.run("pools", pools, [None], ["layer"])[0][::2] == (1, 1)


def test_workers_of_another_version_are_named() -> None:
    def another_version(dask_worker: Any) -> None:
        from storage import layout

        if dask_worker.name == 1:
            layout.DELTA_FORMAT = 99

    message = r"must run this version of channel-merging.*: worker tcp://\S+: delta stores of format 99 and artifacts"
    with cluster(workers=2) as (address, client):
        client.run(another_version)
        with pytest.raises(ClusterError, match=message), engine_of(address):
            pass


def test_workers_without_the_project_are_named() -> None:
    def without(dask_worker: Any) -> None:
        import sys

        sys.modules["storage"] = None  # type: ignore[assignment]

    with cluster() as (address, client):
        client.run(without)
        with (
            pytest.raises(ClusterError, match=r"install it there .*: worker tcp://\S+: ModuleNotFoundError"),
            engine_of(address),
        ):
            pass


def test_places_must_be_those_of_the_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One path that leads elsewhere in every process stands for disks that are not shared."""
    monkeypatch.setattr(dask_checks, "PAUSE_S", 0.0)
    mine = Path("/proc/self/cwd")
    (tmp_path / "shared").mkdir()
    read = tmp_path / "shared" / "model.safetensors"
    read.write_bytes(b"weights")
    with cluster() as (address, _), engine_of(address) as engine:
        monkeypatch.chdir(tmp_path)
        engine.check_places([tmp_path / "shared"], [read])
        with pytest.raises(ClusterError, match=r"worker tcp://\S+: host \S+ does not see folder /proc/self/cwd/out as .*"):
            engine.check_places([tmp_path / "shared", mine / "out"], [read])
        with pytest.raises(
            ClusterError, match=r"a disk that all share, or URLs .* file /proc/self/cwd/shared/model.safetensors"
        ):
            engine.check_places([], [mine / "shared" / "model.safetensors"])
    assert [path for path in tmp_path.rglob("*") if path.name.startswith(".seen")] == []


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        cluster() as (address, _),
        engine_of(address) as engine,
        pytest.raises(ClusterError, match="file: cannot be written to"),
    ):
        engine.check_places([tmp_path / "file"])
