"""The flow ``clean``: what no artifact and no recent run needs, found or removed."""

from __future__ import annotations

from typing import Any

from prefect import flow, get_run_logger

from flows import clean as cleaning
from flows.deployed import places
from flows.deployed.artifacts import show_table
from flows.deployed.reporting import reporting
from flows.deployed.tasks import TaskConductor, last_word


@flow(
    name="clean",
    description="Find what no artifact and no recent run needs in a recipe's delta store and output; remove it if asked.",
    flow_run_name="clean {recipe}",
    persist_result=False,
)
def clean(
    recipe: str,
    days: float = 7,
    delete: bool = False,
    settings: dict[str, Any] | None = None,
    output: str | None = None,
    deltas: str | None = None,
) -> dict[str, Any]:
    """Return the leftovers, their bytes, and whether they were removed; a table artifact lists them.

    ``days``: what runs have used that began since stays.
    """
    try:
        read = places.read(recipe, settings or {}, output, deltas)
        with reporting(read.name) as reporter:
            found = TaskConductor(read.name, reporter).step(
                "clean",
                lambda: cleaning.clean_up(
                    places.find_recipe(recipe),
                    settings or {},
                    read.output,
                    read.deltas,
                    days,
                    delete=delete,
                    tell=reporter.note,
                ),
            )
    except BaseException as error:
        last_word(error)
        raise
    lines = cleaning.totals(found)
    for line in lines:
        get_run_logger().info("%s", line)
    description = "\n".join([f"**{read.name}**", *(f"- {line}" for line in lines)])
    show_table(f"{read.name} leftovers", cleaning.HEADINGS, cleaning.table(found), description)
    return cleaning.document(found)
