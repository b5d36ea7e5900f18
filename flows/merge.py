"""The Prefect flow ``merge``: the stages of a run, each a task run with its own state, time and log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE

from flows.run import STAGES, Outcome, Run, execute, outcome, prepare, read_recipe, unchanged, workplace
from pipeline.engine import open_engine
from pipeline.job import Job
from pipeline.recipe import Recipe


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


# Nothing is cached by Prefect, whose default key holds the run id: what is finished is decided by the stores.
@task(name="resolve", cache_policy=NO_CACHE)
def resolve(recipe: Recipe) -> Job:
    """Plan the recipe and identify its sources."""
    return prepare(recipe)


def _summary(result: Outcome) -> dict[str, Any]:
    return {"version": result.version, "path": str(result.path), "new": result.new}


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
    read = read_recipe(Path(recipe), settings, output, deltas, cluster)
    job = resolve(read)
    reporter = FlowReporter()
    for note in job.plan.notes:
        reporter.note(note)
    if found := unchanged(job):
        return _summary(found)
    run = Run(job)
    with workplace(job), open_engine(read.cluster, reporter) as engine:
        for stage in STAGES:
            # a closure, not arguments: Prefect would walk through them and hash them
            @task(name=stage.__name__, cache_policy=NO_CACHE, tags=["channel-merging"])
            def run_stage() -> float:
                execute(stage, run, engine)  # noqa: B023 - called in this very iteration
                return run.seconds[stage.__name__]  # noqa: B023

            run_stage()
    return _summary(outcome(run))
