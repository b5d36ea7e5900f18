"""The Prefect flow ``merge``: the stages of a run, each a task run with its own state, time and log."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE

from flows.progress import StageCounts
from flows.run import read_recipe, run_recipe


class FlowReporter:
    """Logs progress to the flow run: a line when a stage begins and when it is over, and now and then in between."""

    def __init__(self, every_seconds: float = 30.0) -> None:
        self._logger = get_run_logger()
        self._counts = StageCounts()
        self._every = every_seconds
        self._told: dict[str, float] = {}

    def start(self, stage: str, total: int) -> None:
        _, new = self._counts.add(stage, total=total)
        if new:
            self._told[stage] = time.monotonic()
            self._logger.info("%s: begins", stage)

    def skip(self, stage: str, count: int) -> None:
        self._counts.add(stage, skipped=count)

    def advance(self, stage: str, label: str) -> None:
        count, _ = self._counts.add(stage, computed=1)
        now = time.monotonic()
        if now - self._told.get(stage, now) >= self._every:
            self._told[stage] = now
            self._logger.info("%s: %d of %d blocks, last %s", stage, count.computed, count.total, label)

    def done(self, stage: str) -> None:
        self._logger.info("%s: %s", stage, self._counts.take(stage).summary())

    def note(self, text: str) -> None:
        self._logger.info("%s", text)


def as_task(name: str, body: Callable[[], Any]) -> Any:
    """Run a step as a Prefect task run of its name.

    A body without arguments: Prefect would walk through them and hash them. Nothing is cached by Prefect, whose default
    key holds the run id: what is finished is decided by the stores.
    """

    @task(name=name, cache_policy=NO_CACHE, tags=["channel-merging"])
    def run_step() -> Any:
        return body()

    return run_step()


@flow(name="merge", description="Merge experts of one base into an artifact: channel-merge run, orchestrated.")
def merge(
    recipe: str,
    settings: dict[str, Any] | None = None,
    output: str | None = None,
    deltas: str | None = None,
    cluster: str | None = None,
) -> dict[str, Any]:
    """Run a recipe's stages as tasks and return version, path and whether the version is new.

    ``recipe`` is the path of a YAML file; ``settings`` overrides its keys, for example {"merge.groups": 3}; the others
    are as on the command line.
    """
    result = run_recipe(read_recipe(Path(recipe), settings, output, deltas, cluster), FlowReporter(), as_task)
    return {"version": result.version, "path": result.place, "new": result.new}
