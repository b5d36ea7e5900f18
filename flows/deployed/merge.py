"""The flow ``merge``: the stages of a run, each a task run with its own state, time and log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefect import flow

from flows.deployed import places
from flows.deployed.artifacts import conclude
from flows.deployed.events import say_how_to_go_on
from flows.deployed.reporting import reporting
from flows.deployed.tasks import LONGEST, TaskConductor, last_word
from flows.run import run_recipe

RETRIES = 2
RETRY_DELAY_S = 60


def settings_of(named: Mapping[str, Any], settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """Overrides of the recipe's keys: those of ``merge`` that have a parameter of their own, where given, and the rest."""
    return {f"merge.{key}": value for key, value in named.items() if value is not None} | dict(settings or {})


@flow(
    name="merge",
    description="Merge experts of one base into an artifact, and publish it when anything changed.",
    flow_run_name="{recipe}",
    retries=RETRIES,
    retry_delay_seconds=RETRY_DELAY_S,
    timeout_seconds=LONGEST,
    persist_result=False,
    on_failure=[say_how_to_go_on],
    on_crashed=[say_how_to_go_on],
    on_cancellation=[say_how_to_go_on],
)
def merge(
    recipe: str,
    groups: int | str | None = None,
    method: str | None = None,
    density: float | None = None,
    scaling: float | str | None = None,
    seed: int | None = None,
    settings: dict[str, Any] | None = None,
    output: str | None = None,
    deltas: str | None = None,
    cluster: str | None = None,
) -> dict[str, Any]:
    """Run a recipe; return version, path, whether the version is new, and its share of the experts' parameters.

    ``recipe``: the name of one that comes with the package, or a path. ``groups`` to ``seed`` override keys of its section
    ``merge``, ``settings`` any key by its dotted path: {"router.kind": "none"}. ``output``, ``deltas`` and ``cluster`` are as
    on the command line; where they are not given, CHANNEL_MERGING_STORE and CHANNEL_MERGING_CLUSTER say, then the recipe.

    A run goes on where an earlier one of the same inputs ended, however that ended. Nothing is published when nothing changed.
    """
    try:
        named = {"groups": groups, "method": method, "density": density, "scaling": scaling, "seed": seed}
        read = places.read(recipe, settings_of(named, settings), output, deltas, cluster)
        with reporting(read.name) as reporter:
            outcome = run_recipe(read, reporter, TaskConductor(read.name, reporter))
    except BaseException as error:
        last_word(error)
        raise
    return dict(conclude(outcome))
