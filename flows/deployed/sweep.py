"""The flow ``sweep``: several K, methods or densities from one delta store, with a table of what each comes to."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, TypeVar

from prefect import flow, get_run_logger

from flows import sweeping
from flows.deployed import places
from flows.deployed.artifacts import show_table
from flows.deployed.events import say_how_to_go_on
from flows.deployed.reporting import FlowReporter, reporting
from flows.deployed.tasks import LONGEST, TaskConductor, last_word
from flows.run import Conductor, Outcome, run_recipe
from pipeline.recipe import Recipe

SWEEP = "sweep"

Result = TypeVar("Result")


class _OneTask(Conductor):
    """All steps of a candidate belong to one task run, which holds the cluster, and slots while it fetches."""

    def __init__(self, whole: TaskConductor) -> None:
        self._whole = whole

    def step(self, name: str, body: Callable[[], Result], check: Callable[[], None] = lambda: None) -> Result:
        with self._whole.turn(name, check):
            return body()

    def cluster(self) -> AbstractContextManager[None]:
        return self._whole.cluster()


@flow(
    name=SWEEP,
    description="Merge one family in several ways from one delta store, and compare.",
    flow_run_name="sweep {recipe}",
    retries=1,
    retry_delay_seconds=60,
    timeout_seconds=LONGEST,
    persist_result=False,
    on_failure=[say_how_to_go_on],
    on_crashed=[say_how_to_go_on],
    on_cancellation=[say_how_to_go_on],
)
def sweep(
    recipe: str,
    groups: list[int | str] | None = None,
    methods: list[str] | None = None,
    densities: list[float] | None = None,
    settings: dict[str, Any] | None = None,
    output: str | None = None,
    deltas: str | None = None,
    cluster: str | None = None,
    router: bool = False,
) -> list[dict[str, Any]]:
    """Run every combination; return a row of each: size, errors, version.

    Each is an artifact of its own at ``<output>-sweep/<candidate>``, so the recipe's latest version stays what it is. Routers
    are trained only where ``router`` says so. What has been merged before is found and not merged again. All recipes are
    read before any is run, and one error lists what is wrong with them.
    """
    try:
        own = places.read(recipe, settings or {}, output, deltas, cluster)
        common = {**(settings or {}), **({} if router else {"router.kind": "none", "router.queries": {}})}
        several = sweeping.readable(
            (one.label, partial(_read, recipe, one, common, own, cluster))
            for one in sweeping.candidates(own, groups, methods, densities)
        )
        with reporting(own.name, [SWEEP]) as reporter:
            rows = _run(own.name, several, reporter)
    except BaseException as error:
        last_word(error)
        raise
    return [dict(zip(sweeping.HEADINGS, row, strict=True)) for row in rows]


def _read(recipe: str, one: sweeping.Candidate, common: dict[str, Any], own: Recipe, cluster: str | None) -> Recipe:
    settings = {**common, **one.settings, "name": f"{own.name}-{one.label}"}
    return places.read(recipe, settings, f"{own.output}-sweep/{one.label}", own.deltas, cluster)


def _run(name: str, several: dict[str, Recipe], reporter: FlowReporter) -> list[list[Any]]:
    conductor = TaskConductor(name, reporter)
    reporter.expected = {SWEEP: len(several)}
    reporter.start(SWEEP, len(several))
    rows: list[list[Any]] = []
    for label, read in several.items():
        outcome: Outcome = conductor.step(label, partial(run_recipe, read, reporter, _OneTask(conductor)))
        rows.append(sweeping.row(label, outcome))
        reporter.advance(SWEEP, label)
        get_run_logger().info("%s: version %s at %s", label, outcome.version, outcome.place)
    reporter.done(SWEEP)
    show_table(f"{name} candidates", sweeping.HEADINGS, rows, f"**{name}**: {len(rows)} ways to merge, one delta store")
    return rows
