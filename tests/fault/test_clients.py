"""The process that leads a run is killed, or told to end, with all it has started."""

from __future__ import annotations

import signal

import pytest

from tests.fault.runs import Undisturbed, World, until
from tests.support.faulty import Fault, Moment


@pytest.mark.parametrize(
    ("stage", "moment"),
    [
        ("ingest", "write"),
        ("ingest", "kept"),
        ("similarity", "write"),
        ("merge", "write"),
        ("merge", "kept"),
        ("pack", "begun"),
        ("pack", "write"),
    ],
)
def test_a_run_that_is_killed_goes_on_where_it_was(world: World, undisturbed: Undisturbed, stage: str, moment: Moment) -> None:
    world.faults.script(Fault(stage, "kill", after=1 if stage == "pack" else 2, moment=moment))
    assert world.run().wait() == -signal.SIGKILL
    world.resume(undisturbed)


def test_workers_end_with_their_client(world: World, undisturbed: Undisturbed) -> None:
    client = world.held("merge", cluster="local")
    assert len(world.faults.survivors()) > 1
    client.process.kill()
    assert client.wait() == -signal.SIGKILL
    until(lambda: not world.faults.survivors(), "the workers of a killed client to end")
    world.resume(undisturbed, cluster="local")


@pytest.mark.parametrize(("stage", "cluster"), [("merge", "local"), ("pack", "none")])
def test_a_run_that_is_terminated_ends_cleanly(world: World, undisturbed: Undisturbed, stage: str, cluster: str) -> None:
    client = world.held(stage, cluster=cluster)
    client.signal(signal.SIGTERM)
    world.faults.release()
    assert client.wait() == 128 + signal.SIGTERM
    assert client.said.splitlines()[-1].startswith("terminated: ")
    assert "Traceback" not in client.said
    until(lambda: not world.faults.survivors(), "all processes to end")
    world.resume(undisturbed)
