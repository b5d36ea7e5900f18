"""The flow ``train-router``: a new router for an artifact that is there."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.deployed import places
from flows.deployed.artifacts import conclude
from flows.deployed.events import say_how_to_go_on
from flows.deployed.reporting import reporting
from flows.deployed.tasks import LONGEST, TaskConductor, last_word
from flows.retrain import retrain


@flow(
    name="train-router",
    description="Train the recipe's router for a version that is published, and publish that as a version of its own.",
    flow_run_name="router {recipe}",
    retries=1,
    retry_delay_seconds=60,
    timeout_seconds=LONGEST,
    persist_result=False,
    on_failure=[say_how_to_go_on],
    on_crashed=[say_how_to_go_on],
    on_cancellation=[say_how_to_go_on],
)
def train_router(
    recipe: str,
    version: str | None = None,
    settings: dict[str, Any] | None = None,
    output: str | None = None,
) -> dict[str, Any]:
    """Train a router for a version in the recipe's output, the latest by default; return what ``merge`` returns.

    Weights are neither read nor written again. ``settings`` overrides keys: {"router.kind": "linear", "router.queries": {…}}.
    """
    try:
        read = places.read(recipe, settings or {}, output)
        with reporting(read.name) as reporter:
            outcome = retrain(read, version, reporter, TaskConductor(read.name, reporter))
    except BaseException as error:
        last_word(error)
        raise
    return dict(conclude(outcome))
