"""Workers that die or hang, and a scheduler that dies: a scheduler and workers in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest

from tests.fault.runs import CONSTANTS, Undisturbed, World, until
from tests.support import dask_processes
from tests.support.faulty import Event, Fault, Faults, Moment, Work, begun, kept


@contextmanager
def cluster(folder: Path, faults: Faults, **environment: str) -> Iterator[tuple[str, list[subprocess.Popen[str]]]]:
    """Address and processes of a scheduler and two workers, which fail as they are told."""
    told = os.environ | faults.environment(CONSTANTS) | environment
    with ExitStack() as stack:
        with patch.dict(os.environ, told):
            address, scheduler = stack.enter_context(dask_processes.scheduler())
            processes = [scheduler]
            for name in ("one", "two"):
                (folder / name).mkdir(parents=True)
                options = ("--nthreads", "1", "--memory-limit", "0")
                processes.append(stack.enter_context(dask_processes.worker(address, *options, folder=folder / name)))
        yield address, processes
    faults.end()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Faults]]:
    """A cluster of which no test kills more than a worker, which its nanny starts anew."""
    folder = tmp_path_factory.mktemp("cluster")
    faults = Faults(folder / "faults")
    with cluster(folder, faults) as (address, _):
        yield address, faults


def redone(events: list[Event]) -> set[Work]:
    """Work that was begun although it had a receipt."""
    found: set[Work] = set()
    done: set[Work] = set()
    for event in events:
        found |= done & set(event.work) if event.what == "begun" else set()
        done |= set(event.work) if event.what == "kept" else set()
    return found


@pytest.mark.parametrize(
    ("stage", "moment"),
    [("ingest", "write"), ("similarity", "begun"), ("merge", "write"), ("merge", "kept"), ("pack", "begun")],
)
def test_work_of_a_worker_that_dies_is_done_by_others(
    world: World, shared: tuple[str, Faults], undisturbed: Undisturbed, stage: str, moment: Moment
) -> None:
    address, world.faults = shared
    world.faults.script(Fault(stage, "kill", after=1 if stage == "pack" else 3, moment=moment))
    answer = world.run(cluster=address).answer()
    assert (answer["version"], answer["new"]) == (undisturbed.version, True)
    assert world.faults.happened()
    events = world.faults.events()
    assert kept(events) == undisturbed.work
    assert redone(events) == set()
    (interrupted,) = {event.process for event in events if not Path(f"/proc/{event.process}").exists()}
    last = [event for event in events if event.process == interrupted][-1]
    again = {work for work, count in begun(events).items() if count > 1}
    assert again == (set() if last.what == "kept" else set(last.work))
    world.check_whole(undisturbed)


def test_a_worker_that_hangs_holds_nothing_up(world: World, undisturbed: Undisturbed, tmp_path: Path) -> None:
    with cluster(tmp_path, world.faults, DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL="3s") as (address, _):
        world.faults.script(Fault("merge", "stop", after=2))
        answer = world.run(cluster=address).answer()
        assert (answer["version"], answer["new"]) == (undisturbed.version, True)
        assert world.faults.happened()
        assert redone(world.faults.events()) == set()
        world.check_whole(undisturbed)


def test_a_run_goes_on_after_the_scheduler_died(world: World, undisturbed: Undisturbed, tmp_path: Path) -> None:
    with cluster(tmp_path / "first", world.faults) as (address, (scheduler, *_)):
        client = world.held("merge", cluster=address)
        scheduler.kill()
        assert client.wait() == 3
        assert f"the Dask scheduler at {address} is gone or was restarted; start it and run again" in client.said
        assert "Traceback" not in client.said
    with cluster(tmp_path / "second", world.faults) as (address, _):
        world.resume(undisturbed, cluster=address)


def test_a_killed_client_may_run_again_on_the_same_cluster(
    world: World, shared: tuple[str, Faults], undisturbed: Undisturbed
) -> None:
    address, world.faults = shared
    client = world.held("merge", cluster=address)
    client.process.kill()
    client.wait()
    world.faults.release()
    before = world.faults.events()
    answer = world.run(cluster=address).answer()
    assert (answer["version"], answer["new"]) == (undisturbed.version, True)
    assert not kept(before) & begun(world.faults.events()[len(before) :]).keys()
    world.check_whole(undisturbed)


def test_all_processes_are_told_to_end(world: World, undisturbed: Undisturbed, tmp_path: Path) -> None:
    with cluster(tmp_path, world.faults) as (address, (scheduler, *workers)):
        client = world.held("merge", cluster=address)
        client.signal(signal.SIGTERM)
        for process in (*workers, scheduler):
            process.terminate()
        world.faults.release()
        assert client.wait() == 128 + signal.SIGTERM
        assert client.said.splitlines()[-1].startswith("terminated: ")
        until(lambda: not world.faults.survivors(), "all processes to end")
    world.resume(undisturbed)
