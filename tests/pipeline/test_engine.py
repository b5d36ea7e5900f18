"""Engines in this process and on a cluster of it: one interface, the same results."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipeline.engine import Cancelled, Engine, SerialEngine, Silent, ThreadEngine, open_engine
from pipeline.recipe import ClusterSection
from storage.errors import CheckpointError, ClusterError


class Recorder(Silent):
    """Counts what is reported."""

    def __init__(self) -> None:
        self.totals: Counter[str] = Counter()
        self.advanced: Counter[str] = Counter()

    def start(self, stage: str, total: int) -> None:
        self.totals[stage] += total

    def advance(self, stage: str, label: str) -> None:
        self.advanced[f"{stage} {label}"] += 1


def square(number: int) -> int:
    return number * number


def refuse_three(number: int) -> int:
    if number == 3:
        raise CheckpointError("three is no number")
    return number


def labels(count: int) -> list[str]:
    return [f"layer {n}" for n in range(count)]


@pytest.fixture(scope="module", params=["serial", "threads", "cluster"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    if request.param == "serial":
        yield SerialEngine(Silent())
        return
    section = ClusterSection(kind="local" if request.param == "cluster" else "none", workers=2)
    with open_engine(section, Silent()) as opened:
        yield opened


def test_results_come_in_the_order_of_the_tasks(engine: Engine) -> None:
    engine.reporter = recorder = Recorder()
    assert engine.run("square", square, list(range(50)), labels(50)) == [n * n for n in range(50)]
    assert recorder.totals == {"square": 50}
    assert recorder.advanced == {f"square layer {n}": 1 for n in range(50)}
    assert engine.run("square", square, [], []) == []


def test_calls_from_several_threads_run_side_by_side(engine: Engine) -> None:
    engine.reporter = recorder = Recorder()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: engine.run(f"stage {n % 2}", square, [n, n + 1], labels(2), priority=n), range(8)))
    assert found == [[n * n, (n + 1) ** 2] for n in range(8)]
    assert recorder.totals == {"stage 0": 8, "stage 1": 8}


def test_the_first_error_ends_its_own_call_alone(engine: Engine) -> None:
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(engine.run, "square", square, list(range(30)), labels(30))
        with pytest.raises(CheckpointError, match="three is no number"):
            engine.run("refuse", refuse_three, list(range(30)), labels(30))
        assert other.result() == [n * n for n in range(30)]
    assert engine.run("square", square, [4], ["layer"]) == [16]


def test_every_task_has_a_label(engine: Engine) -> None:
    with pytest.raises(ValueError, match="zip"):
        engine.run("square", square, [1, 2], ["layer 1"])


def test_places_of_this_machine_are_seen_by_its_own_processes(engine: Engine, tmp_path: Path) -> None:
    engine.check_places([tmp_path / "not there"], [tmp_path / "nor this"])
    assert list(tmp_path.iterdir()) == []


class Gate:
    """A task that waits to be let through, and the order in which tasks were done."""

    def __init__(self) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()
        self.done: list[str] = []

    def __call__(self, task: str) -> str:
        if task == "gate":
            self.entered.set()
            assert self.opened.wait(60)
        self.done.append(task)
        return task


def until(condition: Callable[[], bool]) -> None:
    """Wait until something is so; the hang detector ends a wait in vain."""
    while not condition():
        time.sleep(0.001)


@pytest.fixture
def one_thread() -> Iterator[ThreadEngine]:
    opened = ThreadEngine(Silent(), 1)
    yield opened
    opened.close()


def test_what_matters_more_is_begun_first(one_thread: ThreadEngine) -> None:
    gate = Gate()

    def run(tasks: Sequence[str], priority: int) -> list[str]:
        return one_thread.run("stage", gate, tasks, tasks, priority=priority)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(run, ["gate", "a", "b"], 0)
        gate.entered.wait(60)
        second = pool.submit(run, ["c", "d"], 1)
        until(lambda: len(one_thread._waiting) == 4)
        gate.opened.set()
        assert first.result() == ["gate", "a", "b"]
        assert second.result() == ["c", "d"]
    assert gate.done == ["gate", "c", "d", "a", "b"]


def test_calls_share_the_threads() -> None:
    at_work, most, lock = 0, 0, threading.Lock()

    def count(task: int) -> None:
        nonlocal at_work, most
        with lock:
            at_work += 1
            most = max(most, at_work)
        time.sleep(0.001)
        with lock:
            at_work -= 1

    with open_engine(ClusterSection(kind="none", workers=3), Silent()) as engine, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: engine.run("count", count, range(20), labels(20)), range(4)))
    assert most == 3


def test_a_cancelled_engine_drops_what_waits_and_takes_nothing_more(one_thread: ThreadEngine) -> None:
    gate = Gate()
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(one_thread.run, "stage", gate, ["gate", "a"], ["gate", "a"])
        gate.entered.wait(60)
        waiting = pool.submit(one_thread.run, "other", gate, ["b"], ["b"])
        until(lambda: len(one_thread._waiting) == 2)
        one_thread.cancel()
        gate.opened.set()
        for future in (running, waiting):
            assert isinstance(future.exception(), Cancelled)
    assert gate.done == ["gate"]
    with pytest.raises(Cancelled):
        one_thread.run("stage", gate, ["c"], ["c"])


def nap(seconds: float) -> None:
    time.sleep(seconds)


@pytest.mark.parametrize("kind", ["none", "local"])
def test_leaving_an_engine_cancels_its_calls(kind: Any) -> None:
    with ThreadPoolExecutor(1) as pool:
        with open_engine(ClusterSection(kind=kind, workers=1), recorder := Recorder()) as engine:
            running = pool.submit(engine.run, "nap", nap, [0.01] * 1000, labels(1000))
            until(lambda: bool(recorder.advanced))
        assert isinstance(running.exception(), Cancelled)
    with pytest.raises(Cancelled):
        engine.run("nap", nap, [0.0], ["layer"])


def test_a_serial_engine_stops_too() -> None:
    engine = SerialEngine(Silent())
    engine.cancel()
    with pytest.raises(Cancelled):
        engine.run("square", square, [1], ["layer"])


@pytest.mark.parametrize("kind", ["none", "local"])
def test_the_gpu_kernel_without_a_gpu_is_refused_at_once(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    section = ClusterSection(kind=kind, kernel="cuda")
    with pytest.raises(ClusterError, match="torch finds no GPU here"), open_engine(section, Silent()):
        pass


def test_a_cluster_of_gpus_computes_on_them() -> None:
    assert ClusterSection(kind="cuda").kernel == "cuda"
    assert ClusterSection(kind="cuda", kernel="torch-cpu").kernel == "torch-cpu"
    assert ClusterSection(kind="local").kernel == "fused"


def test_a_cluster_of_gpus_needs_dask_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "dask_cuda", None)
    message = r"needs dask-cuda .* pip install 'channel-merging\[cuda\]'"
    with pytest.raises(ClusterError, match=message), open_engine(ClusterSection(kind="cuda"), Silent()):
        pass
