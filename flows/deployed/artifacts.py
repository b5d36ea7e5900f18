"""What a flow run leaves to look at in Prefect: the plan as a table, what came of it as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prefect import get_run_logger
from prefect.artifacts import create_markdown_artifact, create_table_artifact

from flows.deployed.events import tell_published
from flows.deployed.places import link
from flows.deployed.reporting import key_of
from flows.output import size
from flows.planning import judge, source_lines, tensor_table, totals
from flows.run import Outcome
from pipeline.forecast import stage_blocks
from pipeline.job import Job
from storage.layout import CARD, REPORT
from storage.manifest import Manifest


def _shown(key: str, show: Callable[[], object]) -> None:
    """What is shown is no reason to fail: less so when a version has just been published."""
    try:
        show()
    except Exception as error:
        get_run_logger().warning("no artifact is shown for %s: %s", key, error)


def show_table(key: str, headings: Sequence[str], rows: Sequence[Sequence[Any]], description: str) -> None:
    """A table artifact; the description is Markdown."""
    table = [dict(zip(headings, row, strict=True)) for row in rows]
    _shown(key, lambda: create_table_artifact(table=table, key=key_of(key), description=description))


def show_markdown(key: str, text: str, description: str) -> None:
    """A Markdown artifact."""
    _shown(key, lambda: create_markdown_artifact(markdown=text, key=key_of(key), description=description))


def cell(text: object) -> str:
    """Text as a cell of a Markdown table."""
    return str(text).replace("|", "\\|").replace("\n", " ")


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [headings, ["---"] * len(headings), *([cell(one) for one in row] for row in rows)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def show_plan(job: Job) -> dict[str, int]:
    """The table that ``channel-merge plan`` prints, as an artifact. Returns the blocks of every stage in a first run."""
    found = judge(job.recipe)
    headings, found_rows = tensor_table(found, every=False)
    rows = [[name, count or "x1", *cells] for name, count, *cells in found_rows]
    headings = [heading or "count" for heading in headings]
    lines = [f"- {name}: {what}" for name, what in source_lines(found)]
    description = "\n".join(
        [f"**{job.recipe.name}**: what every tensor becomes.", "", *lines, *(f"- {t}" for t in totals(found))]
    )
    show_table(f"{job.recipe.name} plan", headings, rows, description)
    return {**stage_blocks(job.plan, job.stored_base.values()), "pack": len(job.plan.waves)}


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def expert_table(manifest: Manifest) -> str:
    """A row per expert: how far from the base it was, and how far from itself it is now."""
    rows = [
        [name, _number(e.health.delta_ratio), _number(e.reconstruction_error), f"`{e.id[:12]}`", e.source]
        for name, e in manifest.experts.items()
    ]
    return markdown_table(["expert", "distance to the base", "reconstruction error", "id", "source"], rows)


def outcome_text(outcome: Outcome) -> str:
    """What a run came to, for people."""
    manifest = outcome.manifest
    merge = manifest.recipe["merge"]
    numbers = manifest.parameters
    weight = sum(record.bytes for record in manifest.files.values())
    said = "published" if outcome.new else "nothing changed: these inputs have been published before, and nothing was published"
    parts = [
        f"# {manifest.name} `{outcome.version}`",
        f"**{said}**",
        f"- version: {link(outcome.place, outcome.version, CARD)}",
        f"- report: {link(outcome.place, 'report.html', REPORT)}",
        f"- {100 * numbers.ratio:.1f} % of the experts' {numbers.experts:,} parameters, {size(weight)}",
        f"- created {manifest.created}",
        f"- groups {merge['groups']}, method {merge['method']}, density {merge['density']}, scaling {merge['scaling']}",
    ]
    if router := manifest.router:
        parts.append(
            f"- router: {router['kind']}, {100 * router['accuracy']:.2f} % right on {router['queries']} held-out queries"
        )
    if outcome.new:
        parts.append("- seconds: " + ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in manifest.seconds.items()))
    parts += ["", expert_table(manifest)]
    if manifest.notes:
        parts += ["", *(f"- {note}" for note in manifest.notes)]
    return "\n".join(parts)


def show_outcome(outcome: Outcome) -> None:
    """The Markdown artifact of a run."""
    what = "published" if outcome.new else "unchanged"
    show_markdown(
        f"{outcome.manifest.name} outcome", outcome_text(outcome), f"{outcome.manifest.name} {outcome.version}: {what}"
    )


def conclude(outcome: Outcome) -> Mapping[str, Any]:
    """Tell of a version, by log, event and artifact; what the flow returns."""
    logger, version = get_run_logger(), outcome.version
    if outcome.new:
        logger.info("published version %s at %s", version, outcome.place)
        tell_published(outcome)
    else:
        logger.info("nothing changed: version %s is already at %s", version, outcome.place)
    show_outcome(outcome)
    ratio = round(outcome.manifest.parameters.ratio, 6)
    return {"version": version, "path": outcome.place, "new": outcome.new, "ratio": ratio}
