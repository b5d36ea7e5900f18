"""The flow ``evaluate``: what a version is worth, started by the event that it was published."""

from __future__ import annotations

import os
from typing import Any

from prefect import flow, get_run_logger

from flows import evaluation
from flows.deployed import places
from flows.deployed.artifacts import show_table
from flows.deployed.reporting import reporting
from flows.deployed.tasks import TaskConductor, last_word
from flows.quality import Quality
from storage.artifact import Artifact

HEADINGS = ("expert", "base", "expert alone", "rebuilt", "rebuilt, accuracy", "gain kept")


def _loss(quality: Quality | None) -> str:
    return "-" if quality is None else f"{quality.loss:.4f}"


@flow(
    name="evaluate",
    description="Verify every byte of a version, and measure its experts.",
    flow_run_name="evaluate {artifact}",
    persist_result=False,
)
def evaluate(artifact: str, texts: str | None = None) -> dict[str, Any]:
    """Return the version and, per expert, the bits per byte of its rebuilt weights on ``<texts>/<expert>.txt``.

    ``artifact``: ``<output>@<version>``, as the event of a new version carries it. Without ``texts`` only bytes are verified. A
    relative path of texts counts from the folder that holds the package.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # checkpoints are exported here, and their code is transformers' own
    try:
        found = Artifact(artifact)
        name = found.manifest.name
        with reporting(name) as reporter:
            conductor = TaskConductor(name, reporter)
            files = conductor.step("verify", lambda: evaluation.check_bytes(found))
            get_run_logger().info("%s: %d files verified", found.place, files)
            folder = places.ROOT / texts if texts else None
            rows = conductor.step("measure", lambda: evaluation.measure_experts(found, folder, reporter.note)) if folder else []
    except BaseException as error:
        last_word(error)
        raise
    table = [
        [
            one.expert, _loss(one.base), _loss(one.own), _loss(one.rebuilt), f"{100 * one.rebuilt.accuracy:.1f} %",
            "-" if one.kept is None else f"{100 * one.kept:.1f} %",
        ]
        for one in rows
    ]  # fmt: skip
    text = f"**{name}** `{found.manifest.version}`: {files} files verified; bits per byte on each expert's own held-out text"
    show_table(f"{name} evaluation", HEADINGS, table, text)
    return {"version": found.manifest.version, "files": files, "loss": {one.expert: one.rebuilt.loss for one in rows}}
