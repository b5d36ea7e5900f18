"""The flow ``merge`` is the command line's run: the same steps, the same version."""

from __future__ import annotations

from typing import Any

import pytest
from prefect.client.schemas.objects import State

from flows.deployed.merge import merge
from storage.artifact import Artifact
from storage.errors import QueryDataError, RecipeError
from tests.pipeline.test_invariants import router_of
from tests.support.prefect_server import Prefect
from tests.support.running import merged
from tests.support.tiny_experts import Family

pytestmark = pytest.mark.server


def run_of(state: State[Any]) -> str:
    assert state.state_details.flow_run_id is not None
    return str(state.state_details.flow_run_id)


def test_the_flow_runs_the_steps_of_the_command_line(family: Family, here: Prefect) -> None:
    """States, task runs, the same version, and nothing to do the second time."""
    recipe = str(family.recipe(router=router_of(family)))
    output = str(family.folder / "by-flow")
    first: State[dict[str, Any]] = merge(recipe, groups=3, output=output, return_state=True)
    assert first.is_completed()
    result = first.result()
    assert merge(recipe, groups=3, output=output) == {**result, "new": False}
    tasks = here.task_runs(run_of(first))
    ingests = {f"ingest {name}" for name in family.experts}
    assert tasks.keys() == {
        "resolve",
        "plan",
        *ingests,
        "queries",
        "similarity",
        "merge",
        "pack",
        "router",
        "report",
        "publish",
    }
    assert {task["state_name"] for task in tasks.values()} == {"Completed"}
    assert (result["new"], Artifact(result["path"]).verify()) == (True, [])
    by_command = merged(family.recipe(**{"router": router_of(family), "merge.groups": 3}))
    assert by_command.version == result["version"]


def test_a_key_that_no_recipe_has_is_told_at_once(family: Family, here: Prefect) -> None:
    state: State[dict[str, Any]] = merge(str(family.recipe()), settings={"merge.goups": 3}, return_state=True)
    assert state.is_failed()
    with pytest.raises(RecipeError, match="did you mean 'groups'"):
        state.result()
    assert here.flow_run(run_of(state))["run_count"] == 1


def test_what_is_wrong_with_files_is_not_tried_twice(family: Family, here: Prefect) -> None:
    recipe = family.recipe(router=router_of(family))
    (family.folder / f"{next(iter(family.experts))}.jsonl").write_text("no JSON\n")
    state: State[dict[str, Any]] = merge(str(recipe), return_state=True)
    with pytest.raises(QueryDataError):
        state.result()
    run = run_of(state)
    assert here.flow_run(run)["run_count"] == 1
    tasks = here.task_runs(run)
    assert {name: (task["state_name"], task["run_count"]) for name, task in tasks.items()} == {"resolve": ("Failed", 1)}
    assert not (family.folder.parent / "output").exists()
