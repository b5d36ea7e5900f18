"""What a flow run tells others: an event when a version is published, and in its log what to do when it ends badly."""

from __future__ import annotations

from typing import Any

from prefect.client.schemas.objects import FlowRun, State
from prefect.events import emit_event
from prefect.flows import Flow
from prefect.logging.loggers import flow_run_logger

from flows.run import Outcome, is_wrong_input

PUBLISHED = "channel-merging.version.published"
"""The event that automations listen to. Its payload: name, version, artifact (``<output>@<version>``), place, ratio."""
RESOURCE = "channel-merging.artifact"


def tell_published(outcome: Outcome) -> None:
    """Emit the event that there is a new version."""
    name, version = outcome.manifest.name, outcome.version
    output = outcome.place.removesuffix(f"/{version}")
    emit_event(  # Prefect adds which flow run, deployment and work pool it is of
        PUBLISHED,
        resource={"prefect.resource.id": f"{RESOURCE}.{name}", "prefect.resource.name": name, f"{RESOURCE}.version": version},
        payload={
            "name": name, "version": version, "artifact": f"{output}@{version}", "place": outcome.place,
            "ratio": outcome.manifest.parameters.ratio, "experts": sorted(outcome.manifest.experts),
        },
    )  # fmt: skip


def say_how_to_go_on(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """State hook of runs that failed, crashed or were cancelled: what is kept, and what continues it."""
    logger = flow_run_logger(flow_run, flow)
    if state.is_failed() and is_wrong_input(state.result(raise_on_failure=False)):
        logger.warning("the input is wrong, and no retry makes it right: correct it, then run the deployment again")
        return
    logger.warning(
        "%s: finished blocks are kept beside the output and in the delta store. A run of the same recipe goes on from there: "
        "the next scheduled one, or `prefect deployment run`",
        state.name,
    )
