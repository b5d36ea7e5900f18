"""The answer of ``channel-merge plan``: what a recipe would do, as a document and as text."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.drafting import Draft, draft_plan
from pipeline.forecast import Forecast, forecast
from pipeline.opening import Opened, open_sources
from pipeline.plan import TensorPlan
from pipeline.recipe import Recipe
from pipeline.vocabulary import compare_vocabularies
from storage.checkpoint import Checkpoint
from storage.errors import PlanError

NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Judgement:
    """A recipe judged from configs and headers."""

    recipe: Recipe
    opened: Opened
    draft: Draft
    forecast: Forecast
    problems: tuple[str, ...]
    notes: tuple[str, ...]


def judge(recipe: Recipe) -> Judgement:
    """Open the sources and draft the plan. CheckpointError when a source cannot be read at all."""
    opened = open_sources(recipe)
    draft = draft_plan(recipe, opened)
    problems, notes = [*draft.problems], [*draft.plan.notes]
    if all(
        checkpoint.folder.is_local for checkpoint in opened.checkpoints
    ):  # else the run compares them, once they are fetched
        try:
            notes += _vocabulary_notes(opened, draft)
        except PlanError as error:
            problems += error.problems
    elif draft.plan.tensors:
        notes.append("token strings are compared when the run has fetched the tokenizers")
    return Judgement(recipe, opened, draft, forecast(recipe, opened, draft.plan), tuple(problems), tuple(notes))


def _vocabulary_notes(opened: Opened, draft: Draft) -> list[str]:
    def files(checkpoint: Checkpoint) -> Any:
        own = checkpoint.folder.local(checkpoint.side_files)
        return {**files(opened.base), **own} if checkpoint.is_adapter else own

    return compare_vocabularies(draft.plan, files(opened.base), {name: files(found) for name, found in opened.experts.items()})


def _tensor_record(tensor: TensorPlan) -> dict[str, Any]:
    own = {
        name: {"dtype": info.dtype, "shape": list(info.shape)}
        for name, info in tensor.experts.items()
        if (info.dtype, info.shape) != (tensor.dtype, tensor.shape)
    }
    return {
        "tensor": tensor.name, "policy": tensor.policy, "why": tensor.reason, "kind": tensor.kind, "groups": tensor.groups,
        "dtype": tensor.dtype, "shape": list(tensor.shape), "channel_axis": tensor.channel_axis,
        "experts": list(tensor.experts), "different": own,
    }  # fmt: skip


def document(found: Judgement) -> dict[str, Any]:
    """All of it, for a script."""
    numbers = {**asdict(found.forecast), "ratio": found.forecast.ratio}
    sources = numbers.pop("sources")
    refused = [{"tensor": name, "policy": "refused", "why": list(why)} for name, why in found.draft.refused.items()]
    return {
        "name": found.recipe.name,
        "possible": not found.problems,
        "problems": list(found.problems),
        "sources": list(sources),
        "experts": list(found.draft.plan.experts),
        "tensors": [*map(_tensor_record, found.draft.plan.tensors.values()), *refused],
        "totals": numbers,
        "notes": list(found.notes),
    }


TENSOR_HEADINGS = ["tensor", "", "policy", "why", "groups", "dtype", "shape", "channels"]


def _cells(tensor: TensorPlan) -> list[str]:
    axis = "-" if len(tensor.shape) < 2 else f"axis {tensor.channel_axis}"
    rows = (
        {info.rows for info in tensor.experts.values()} - {tensor.base_rows} if tensor.base and len(tensor.shape) > 1 else set()
    )
    shape = "x".join(map(str, tensor.shape)) + "".join(f", {count} rows" for count in sorted(rows))
    dtypes = "/".join(dict.fromkeys([tensor.dtype, *(info.dtype for info in tensor.experts.values())]))
    return [tensor.policy, tensor.reason, str(tensor.groups or "-"), dtypes, shape, axis]


def tensor_rows(found: Judgement, *, every: bool) -> list[list[str]]:
    """A line per tensor, or per kind of tensor that all layers have; refused ones each for themselves, first."""
    lines = [[name, "", "refused", "; ".join(why), "-", "-", "-", "-"] for name, why in found.draft.refused.items()]
    alike: dict[tuple[str, ...], int] = {}
    for tensor in found.draft.plan.tensors.values():
        key = (tensor.name if every else NUMBER.sub("*", tensor.name), *_cells(tensor))
        alike[key] = alike.get(key, 0) + 1
    return lines + [[name, f"x{count}" if count > 1 else "", *cells] for (name, *cells), count in alike.items()]


SOURCE_HEADINGS = ["", "source", "what", "dtypes", "parameters", "vocabulary", "to fetch"]


def source_rows(found: Judgement) -> list[list[str]]:
    """A line per checkpoint."""
    return [
        [
            source.label,
            source.place,
            source.kind + (", tied" if source.tied else ""),
            ", ".join(f"{dtype} x{count}" for dtype, count in source.dtypes.items()),
            f"{source.parameters:,}",
            "-" if source.vocabulary is None else f"{source.vocabulary:,}",
            _size(source.fetch) if source.fetch else "-",
        ]
        for source in found.forecast.sources
    ]


def _size(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count:,} bytes"


def totals(found: Judgement) -> list[str]:
    """What it would cost, a line each."""
    numbers = found.forecast
    share = f"{numbers.pool:,} of {numbers.experts:,} parameters ({100 * numbers.ratio:.1f} %)"
    held = f"{numbers.peak / 2**20:,.0f} MiB of {numbers.budget / 2**20:,.0f} MiB"
    return [
        f"to fetch: {_size(numbers.fetch)}",
        f"delta store: at most {_size(numbers.deltas)} (before compression)",
        f"artifact: at most {_size(numbers.artifact)}, {share}",
        f"work: {numbers.blocks} blocks; a task holds at most {held}"
        + (f" ({numbers.peak_tensor})" if numbers.peak_tensor else ""),
    ]
