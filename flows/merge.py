"""The Prefect flow ``merge``: the stages of a run, each a task run with its own state, time and log."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE

from flows.run import read_recipe, run_recipe


class FlowReporter:
    """Logs progress to the flow run: a line per stage and per tenth of its blocks."""

    def __init__(self) -> None:
        self._logger = get_run_logger()
        self._counts: dict[str, list[int]] = {}

    def start(self, stage: str, total: int) -> None:
        self._counts[stage] = [0, total]
        self._logger.info("%s: %d blocks", stage, total)

    def advance(self, stage: str, label: str) -> None:
        counts = self._counts[stage]
        counts[0] += 1
        done, total = counts
        if done == total or done % max(1, total // 10) == 0:
            self._logger.info("%s: %d of %d blocks, last %s", stage, done, total, label)

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
    return {"version": result.version, "path": str(result.path), "new": result.new}
