"""What a step and a run do about failures that may pass, and about steps that hang. Delays are patched, nothing else is."""

from __future__ import annotations

from collections.abc import Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import dask
import pytest
from prefect.client.schemas.objects import State
from prefect.tasks import exponential_backoff

from flows.deployed import tasks
from flows.deployed.merge import RETRIES, merge
from flows.training import RouterTraining
from storage.artifact import Artifact
from storage.errors import StoreError
from tests.flows.deployed.test_merge_flow import run_of
from tests.support.faulty import Fault, Faults, begun, kept
from tests.support.prefect_server import Prefect
from tests.support.tiny_experts import Family

pytestmark = pytest.mark.server


@pytest.fixture
def faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    """Workers of a local cluster fail as they are told."""
    resource_tracker.ensure_running()  # of this process: it must not be ended with the workers
    found = Faults(tmp_path / "faults")
    for name, value in found.environment({}).items():
        monkeypatch.setenv(name, value)
    with dask.config.set({"distributed.worker.preload": ["tests.support.faulty"]}):
        yield found
    found.end()


def test_a_failure_that_passes_is_tried_again(family: Family, here: Prefect, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that does not answer, longer than its client waits."""
    own, failures = RouterTraining.train, iter(range(2))

    def train(training: RouterTraining) -> Any:
        if next(failures, None) is not None:
            raise StoreError("the store answers 503")
        return own(training)

    monkeypatch.setattr(RouterTraining, "train", train)
    monkeypatch.setattr(tasks, "BACK_OFF_S", 0.05)
    state: State[dict[str, Any]] = merge(str(family.recipe()), return_state=True)
    assert Artifact(state.result()["path"]).verify() == []
    assert here.flow_run(run_of(state))["run_count"] == 1
    assert here.task_runs(run_of(state))["router"]["run_count"] == 3
    assert exponential_backoff(tasks.BACK_OFF_S)(3) == [0.05, 0.1, 0.2]


def test_a_failure_that_stays_ends_the_run(family: Family, here: Prefect, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(_: RouterTraining) -> Any:
        raise StoreError("the store answers 503")

    monkeypatch.setattr(RouterTraining, "train", train)
    monkeypatch.setattr(tasks, "BACK_OFF_S", 0.01)
    monkeypatch.setattr(tasks, "RETRIES", 1)
    quick = merge.with_options(retry_delay_seconds=0.1)
    state: State[dict[str, Any]] = quick(str(family.recipe()), return_state=True)
    with pytest.raises(StoreError, match="503"):
        state.result()
    found = here.flow_run(run_of(state))
    assert (found["state_name"], found["run_count"]) == ("Failed", 1 + RETRIES)
    assert not list((family.folder.parent / "output").glob("*/manifest.json"))
    here.logged(run_of(state), "Failed: finished blocks are kept beside the output and in the delta store.")


def test_a_run_that_lost_its_cluster_is_tried_again_and_goes_on(family: Family, here: Prefect, faults: Faults) -> None:
    """All workers that try a certain block die, until the engine gives up."""
    deaths = dask.config.get("distributed.scheduler.allowed-failures") + 1
    faults.script(*[Fault("merge", "kill", label="layers.1")] * deaths)
    settings = {"cluster": {"kind": "local", "workers": 1}}
    quick = merge.with_options(retry_delay_seconds=0.1)
    state: State[dict[str, Any]] = quick(str(family.recipe()), settings=settings, return_state=True)
    assert Artifact(state.result()["path"]).verify() == []
    assert faults.happened(deaths - 1)
    assert here.flow_run(run_of(state))["run_count"] == 2
    events = faults.events()
    done = kept(events)
    assert {work for work, count in begun(events).items() if count > 1} < done
    last: dict[Any, str] = {}
    for event in events:
        for work in event.work:
            assert last.get(work) != "kept" or event.what == "kept", "what is finished is not done again"
            last[work] = event.what


def test_a_step_that_hangs_is_ended(family: Family, here: Prefect, faults: Faults, monkeypatch: pytest.MonkeyPatch) -> None:
    faults.script(Fault("merge", "hold", after=1))
    monkeypatch.setitem(tasks.TIMEOUTS, "merge", 25.0)  # which counts from before the experts come in
    once = merge.with_options(retries=0)
    settings = {"cluster": {"kind": "local", "workers": 1}}
    state: State[dict[str, Any]] = once(str(family.recipe()), settings=settings, return_state=True)
    assert state.is_failed()
    assert faults.happened()
    found = here.task_runs(run_of(state))
    assert found["merge"]["state_name"] == "TimedOut"
    assert found["pack"]["state_name"] == "Cancelled"
    assert {task["state_name"] for name, task in found.items() if name not in ("merge", "pack")} == {"Completed"}
    assert faults.survivors() == []
