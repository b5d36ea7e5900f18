"""The demo: the main job on a small, really trained family, and what it keeps of each expert, measured in the run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from flows.progress import open_reporter
from flows.quality import Quality, measure
from flows.run import Outcome, read_recipe, run_recipe
from serving.lookup import export
from storage.artifact import Artifact
from storage.checkpoint import open_checkpoint
from storage.errors import ArtifactError, ChannelMergingError
from storage.files import open_local

FAMILY = Path(__file__).resolve().parent.parent / "examples" / "tiny-mistral"
GROUPS = (1, 2)


def merge_family(dest: Path, groups: int) -> Outcome:
    """Run the family's recipe with K groups per channel."""
    recipe = read_recipe(
        FAMILY / "recipe.yaml", {"merge.groups": groups}, str(dest / f"artifacts-k{groups}"), str(dest / "deltas")
    )
    with open_reporter() as reporter:
        return run_recipe(recipe, reporter)


def exported(artifact: Artifact, expert: str, folder: Path) -> Path:
    """The expert of this version as a checkpoint; exported once."""
    target = folder / artifact.manifest.version / expert
    if not target.exists():
        export(artifact, expert, target)
    return target


def kept(own: Quality, base: Quality, rebuilt: Quality) -> float:
    """Share of the fine-tuning gain in loss that a rebuilt expert keeps."""
    return (base.loss - rebuilt.loss) / (base.loss - own.loss)


def quality_table(rows: Mapping[str, Mapping[str, Quality]], outcomes: Mapping[int, Outcome], base: int) -> Table:
    """Per expert, loss and accuracy of every model; last, the parameters each needs for all experts."""
    table = Table(title="bits per byte (accuracy) on each expert's own held-out text", title_justify="left")
    names = ["base", "expert", *(f"{'one model, ' if k == 1 else 'channel-merged, '}K={k}" for k in outcomes)]
    table.add_column("expert")
    for name in names:
        table.add_column(name, justify="right")
    columns = ["base", "expert", *(f"k{k}" for k in outcomes)]
    for expert, found in rows.items():
        table.add_row(expert, *(f"{found[c].loss:.3f} ({100 * found[c].accuracy:.1f} %)" for c in columns))
    table.add_section()
    shares = []
    for column in columns:
        mean = sum(kept(found["expert"], found["base"], found[column]) for found in rows.values()) / len(rows)
        shares.append(f"{100 * mean:.1f} %")
    table.add_row("fine-tuning gain kept, mean", *shares)
    numbers = next(iter(outcomes.values())).manifest.parameters
    pools = [outcome.manifest.parameters.pool for outcome in outcomes.values()]
    table.add_row("parameters for all", *(f"{n:,}" for n in (base, numbers.experts, *pools)))
    return table


def run_demo(dest: Path) -> None:
    """Merge the family with K=1 and K=2, verify, export every expert, route, and print what was measured."""
    if not (FAMILY / "recipe.yaml").is_file():
        raise ArtifactError(f"the demo's family is not at {FAMILY}. Run it from a checkout: make demo.")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers.utils import logging

    logging.disable_progress_bar()
    console = Console() if Console().is_terminal else Console(width=140)
    outcomes: dict[int, Outcome] = {}
    for groups in GROUPS:
        console.print(f"channel-merge run examples/tiny-mistral/recipe.yaml --set merge.groups={groups}", style="bold")
        outcomes[groups] = merge_family(dest, groups)
        problems = Artifact(outcomes[groups].path).verify()
        if problems:
            raise ChannelMergingError.listing(f"{outcomes[groups].path} fails verification", problems)
        console.print(f"version {outcomes[groups].version} verified at {outcomes[groups].path}")
    manifest = outcomes[GROUPS[-1]].manifest
    rows: dict[str, dict[str, Quality]] = {}
    for expert in manifest.experts:
        text = (FAMILY / "texts" / f"{expert}.txt").read_text("utf-8")
        found = {"base": measure(FAMILY / "base", text), "expert": measure(FAMILY / "experts" / expert, text)}
        for groups, outcome in outcomes.items():
            found[f"k{groups}"] = measure(exported(Artifact(outcome.path), expert, dest / "exports"), text)
        rows[expert] = found
    base = open_checkpoint("base", open_local("base", FAMILY / "base"))
    console.print(quality_table(rows, outcomes, sum(info.rows * info.width for info in base.tensors.values())))
    if manifest.router:
        accuracy, queries = manifest.router["accuracy"], manifest.router["queries"]
        console.print(f"router: {100 * accuracy:.2f} % of {queries} held-out queries sent to their expert")
