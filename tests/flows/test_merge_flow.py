from __future__ import annotations

from typing import Any

import pytest
from prefect import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName
from prefect.client.schemas.objects import State
from prefect.testing.utilities import prefect_test_harness

from flows.merge import merge
from storage.artifact import Artifact
from storage.errors import RecipeError
from tests.pipeline.test_invariants import router_of
from tests.support.running import merged
from tests.support.tiny_experts import Family

STAGES = {"resolve", "ingest", "similarity", "merge", "pack", "router", "publish"}


@pytest.mark.server
def test_the_flow_runs_the_stages_of_the_command_line(family: Family) -> None:
    """Against a real Prefect server: states, task runs, the same version, and nothing to do the second time."""
    recipe = family.recipe(router=router_of(family), cluster={"kind": "local", "workers": 2})
    with prefect_test_harness(server_startup_timeout=180):
        first = merge(str(recipe), {"merge.groups": 3}, output=str(family.folder / "by-flow"))
        again = merge(str(recipe), {"merge.groups": 3}, output=str(family.folder / "by-flow"))
        state: State[dict[str, Any]] = merge(str(recipe), {"merge.goups": 3}, return_state=True)
        with get_client(sync_client=True) as client:
            runs = sorted(client.read_flow_runs(), key=lambda run: str(run.expected_start_time))
            tasks = client.read_task_runs(flow_run_filter=FlowRunFilter(name=FlowRunFilterName(any_=[runs[0].name])))
    assert [run.state.type.value for run in runs if run.state] == ["COMPLETED", "COMPLETED", "FAILED"]
    assert {task.name.rsplit("-", 1)[0] for task in tasks} == STAGES
    assert {task.state.type.value for task in tasks if task.state} == {"COMPLETED"}
    assert first["new"] is True
    assert again == {**first, "new": False}
    assert Artifact(first["path"]).verify() == []
    by_command = merged(family.recipe(**{"router": router_of(family), "merge.groups": 3, "cluster": {"kind": "none"}}))
    assert by_command.version == first["version"]
    assert state.is_failed()
    with pytest.raises(RecipeError, match="did you mean 'groups'"):
        state.result()
