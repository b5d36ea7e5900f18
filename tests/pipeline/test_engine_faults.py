"""Workers that die or hang, schedulers that go away, and signals: real processes, on loopback."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipeline import dask_cluster, dask_engine
from pipeline.engine import Engine, Silent, open_engine
from pipeline.recipe import ClusterSection
from storage.errors import ClusterError
from tests.support import dask_processes


def once(task: tuple[Path, int]) -> int:
    """Send this process a signal, the first time; then its number."""
    marker, number = task
    if not marker.exists():
        marker.write_text(str(os.getpid()))
        os.kill(os.getpid(), number)
        time.sleep(300 if number == signal.SIGSTOP else 0)
    return number


def sleep_when_told(task: tuple[Path, float]) -> None:
    marker, seconds = task
    marker.write_text(str(os.getpid()))
    time.sleep(seconds)


def die(task: None) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def is_alive(process: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def until(condition: Callable[[], object]) -> None:
    """Wait until something is so; the hang detector ends a wait in vain."""
    while not condition():
        time.sleep(0.01)


@contextlib.contextmanager
def local(workers: int) -> Iterator[Engine]:
    with open_engine(ClusterSection(kind="local", workers=workers), Silent()) as engine:
        yield engine


@pytest.mark.parametrize("workers", [1, 2])
def test_a_block_whose_worker_is_killed_is_computed_again(tmp_path: Path, workers: int) -> None:
    with local(workers) as engine:
        tasks = [(tmp_path / f"block {n}", signal.SIGKILL) for n in range(2)]
        assert engine.run("merge", once, tasks, ["layer 1", "layer 2"]) == [signal.SIGKILL] * 2


def test_a_block_that_kills_every_worker_is_named() -> None:
    message = r"merge: layer 7: every worker that tried this block died, 4 of them; .* lower cluster.memory"
    with local(1) as engine, pytest.raises(ClusterError, match=message):
        engine.run("merge", die, [None], ["layer 7"])


def test_a_scheduler_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask_cluster, "CONNECT_S", 1)
    with socket.socket() as closed:  # bound, not listening: nothing answers there
        closed.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{closed.getsockname()[1]}"
        message = rf"no Dask scheduler answers at {address} .* Start one there, or use --cluster local"
        with pytest.raises(ClusterError, match=message), open_engine(ClusterSection(address=address), Silent()):
            pass


def test_a_task_that_cannot_be_sent_is_an_error_of_its_own_call() -> None:
    with local(1) as engine:
        with pytest.raises(TypeError, match="serialize"):
            engine.run("merge", repr, [threading.Lock()], ["layer 1"])
        assert engine.run("merge", str, [1], ["layer 1"]) == ["1"]


def test_the_blocks_of_a_worker_that_hangs_go_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask_cluster, "WORKER_TTL_S", 1.0)
    marker = tmp_path / "block"
    with local(2) as engine:
        assert engine.run("merge", once, [(marker, signal.SIGSTOP)], ["layer 1"]) == [signal.SIGSTOP]
    assert not is_alive(int(marker.read_text()))


def test_a_cluster_is_closed_though_a_worker_hangs(tmp_path: Path) -> None:
    marker = tmp_path / "block"
    with ThreadPoolExecutor(1) as pool, local(1) as engine:
        pool.submit(engine.run, "merge", once, [(marker, signal.SIGSTOP)], ["layer 1"])
        until(lambda: marker.exists() and marker.read_text())
    assert not is_alive(int(marker.read_text()))


@contextlib.contextmanager
def remote(folder: Path) -> Iterator[tuple[Engine, Any, Any]]:
    """An engine on a scheduler and one worker, and their processes."""
    with (
        dask_processes.scheduler() as (address, scheduler),
        dask_processes.worker(address, folder=folder) as worker,
        open_engine(ClusterSection(address=address), Silent()) as engine,
    ):
        yield engine, scheduler, worker


def begun(pool: ThreadPoolExecutor, engine: Engine, folder: Path) -> Any:
    """A run whose block is at work and would go on for long."""
    marker = folder / "begun"
    running = pool.submit(engine.run, "merge", sleep_when_told, [(marker, 300.0)], ["layer 1"])
    until(marker.exists)
    return running


def test_a_scheduler_that_is_gone_ends_the_run(tmp_path: Path) -> None:
    message = r"the Dask scheduler at tcp://127.0.0.1:\d+ is gone .*; start it and run again; finished blocks are kept"
    with ThreadPoolExecutor(1) as pool, remote(tmp_path) as (engine, scheduler, _):
        running = begun(pool, engine, tmp_path)
        scheduler.kill()
        with pytest.raises(ClusterError, match=message):
            running.result()
        with pytest.raises(ClusterError, match=message):
            engine.run("merge", once, [(tmp_path, 0)], ["layer 1"])


def test_a_scheduler_that_hangs_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask_engine, "ANSWER_S", 2.0)
    with ThreadPoolExecutor(1) as pool, remote(tmp_path) as (engine, scheduler, _):
        running = begun(pool, engine, tmp_path)
        scheduler.send_signal(signal.SIGSTOP)
        with pytest.raises(ClusterError, match="is gone"):
            running.result()
        scheduler.kill()


def test_a_run_that_loses_all_workers_does_not_wait_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask_engine, "WAIT_FOR_WORKERS_S", 1.0)
    message = r"there is no running worker, and none came in 1 s. Start workers by `dask worker tcp://\S+` and run again"
    with ThreadPoolExecutor(1) as pool, remote(tmp_path) as (engine, _, worker):
        running = begun(pool, engine, tmp_path)
        os.killpg(worker.pid, signal.SIGKILL)
        with pytest.raises(ClusterError, match=message):
            running.result()


def test_a_scheduler_without_workers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask_cluster, "WAIT_FOR_WORKERS_S", 0.5)
    with dask_processes.scheduler() as (address, _):
        message = rf"the Dask scheduler at {address} has had no worker for 0 s. Start workers by `dask worker {address}`"
        with pytest.raises(ClusterError, match=message), open_engine(ClusterSection(address=address), Silent()):
            pass


def test_a_worker_that_comes_later_is_used(tmp_path: Path) -> None:
    with contextlib.ExitStack() as later, remote(tmp_path) as (engine, _, worker), ThreadPoolExecutor(1) as pool:
        os.killpg(worker.pid, signal.SIGKILL)
        running = pool.submit(engine.run, "merge", once, [(tmp_path, 0)] * 3, ["layer"] * 3)
        address = str(engine.client.scheduler.address)  # type: ignore[attr-defined]
        later.enter_context(dask_processes.worker(address, folder=tmp_path))
        assert running.result() == [0, 0, 0]


PROGRAM = """
import signal, sys, time
from pathlib import Path
from flows import cli, run
from pipeline.engine import open_engine
from pipeline.recipe import ClusterSection
from tests.pipeline.test_engine_faults import sleep_when_told

def wait(recipe, reporter):
    with open_engine(ClusterSection(kind="local", workers=2), reporter) as engine:
        engine.run("merge", sleep_when_told, [(Path(sys.argv[-1]) / f"block {n}", 300.0) for n in range(2)], ["a", "b"])

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background of a shell it is ignored
    run.run_recipe, folder = wait, sys.argv[-1]
    recipe = "name: x\\nbase: ./base\\nexperts: {a: ./a}\\noutput: ./out\\nmerge: {groups: 1}"
    Path(folder, "recipe.yaml").write_text(recipe)
    cli._recipe = lambda *arguments: run.read_recipe(Path(folder, "recipe.yaml"))
    sys.argv = ["channel-merge", "run", folder]
    cli.main()
"""


@pytest.mark.parametrize(
    ("number", "group", "code", "word"),
    [
        (signal.SIGINT, True, 130, "interrupted"),
        (signal.SIGTERM, True, 143, "terminated"),
        (signal.SIGTERM, False, 143, "terminated"),
    ],
)
def test_a_signal_ends_the_run_and_its_workers(tmp_path: Path, number: int, group: bool, code: int, word: str) -> None:
    """A terminal and most supervisors send it to the workers too: they leave the closing to the client, and print nothing."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = os.environ | {"PYTHONPATH": str(Path.cwd())}
    process = subprocess.Popen(
        [sys.executable, str(program), str(tmp_path)],
        stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True,
    )  # fmt: skip
    markers = [tmp_path / "block 0", tmp_path / "block 1"]
    until(lambda: all(marker.exists() and marker.read_text() for marker in markers) or process.poll() is not None)
    (os.killpg if group else os.kill)(process.pid, number)
    _, told = process.communicate()
    assert told.splitlines()[-1].startswith(f"{word}: finished work is kept in ")
    assert "Traceback" not in told
    assert process.returncode == code
    assert [marker.name for marker in markers if is_alive(int(marker.read_text()))] == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_cluster_starts_ends_it_too(tmp_path: Path, number: int) -> None:
    """To the whole group, at the moment when the first worker process is there, and has not been told to ignore it."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    process = subprocess.Popen(
        [sys.executable, str(program), str(tmp_path)],
        stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(Path.cwd())}, start_new_session=True,
    )  # fmt: skip
    until(lambda: workers_of(process.pid) or process.poll() is not None)
    workers = workers_of(process.pid)
    os.killpg(process.pid, number)
    _, told = process.communicate()
    assert told.splitlines()[-1].startswith(("interrupted: ", "terminated: "))
    assert "Traceback" not in told
    assert process.returncode == 128 + number
    until(lambda: not any(is_alive(worker) for worker in workers))


def workers_of(process: int) -> list[int]:
    """Processes started as workers by this one."""
    children = Path(f"/proc/{process}/task").glob("*/children")
    with contextlib.suppress(OSError):  # processes end at any time
        numbers = [int(number) for path in children for number in path.read_text().split()]
        return [number for number in numbers if "spawn_main" in Path(f"/proc/{number}/cmdline").read_text()]
    return []
