"""The answer of ``channel-merge plan``: what a recipe would do, as a document and as text."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

from flows.output import counted, listed, size
from flows.run import check_queries
from pipeline.drafting import Draft, draft_plan, open_sources
from pipeline.forecast import Forecast, forecast
from pipeline.job import check_places
from pipeline.opening import Opened
from pipeline.plan import TensorPlan
from pipeline.recipe import Recipe
from pipeline.vocabulary import compare_vocabularies
from storage.checkpoint import Checkpoint
from storage.errors import ChannelMergingError, PlanError, together

NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
Found = TypeVar("Found")


@dataclass(frozen=True)
class Judgement:
    """A recipe judged from configs and headers."""

    recipe: Recipe
    opened: Opened
    draft: Draft
    forecast: Forecast
    errors: tuple[ChannelMergingError, ...]
    notes: tuple[str, ...]

    @property
    def problems(self) -> tuple[str, ...]:
        return tuple(problem for error in self.errors for problem in listed(error))


def _attempted(step: Callable[[], Found], errors: list[ChannelMergingError]) -> Found | None:
    """What the step returns; None when it raises, and the error is kept."""
    try:
        return step()
    except ChannelMergingError as error:
        errors.append(error)
        return None


def judge(recipe: Recipe) -> Judgement:
    """Open the sources and draft the plan; all that a run would refuse at once is in ``problems``.

    Without every source there is no plan: then the error is raised, together with what else is wrong.
    """
    errors: list[ChannelMergingError] = []
    for check in (check_places, check_queries):
        _attempted(partial(check, recipe), errors)
    opened = _attempted(lambda: open_sources(recipe), errors)
    if opened is None:
        raise together(errors)
    draft = draft_plan(recipe, opened)
    notes = list(draft.plan.notes)
    if draft.problems:
        errors.append(PlanError.listing("base and experts cannot be merged", draft.problems))
    if all(
        checkpoint.folder.is_local for checkpoint in opened.checkpoints
    ):  # else the run compares them, once they are fetched
        notes += _attempted(lambda: _vocabulary_notes(opened, draft), errors) or []
    elif draft.plan.tensors:
        notes.append("token strings are compared when the run has fetched the tokenizers")
    return Judgement(recipe, opened, draft, forecast(recipe, opened, draft.plan), tuple(errors), tuple(notes))


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


def refusal(recipe: Recipe | None, error: ChannelMergingError) -> dict[str, Any]:
    """The same document where no plan could be made: the recipe is wrong (None), or a source cannot be opened."""
    return {
        "name": recipe.name if recipe else None,
        "possible": False,
        "problems": list(listed(error)),
        "sources": [],
        "experts": list(recipe.expert_names) if recipe else [],
        "tensors": [],
        "totals": None,
        "notes": [],
    }


SPARE = ("why", "dtype")
"""Columns of the tensors that a narrow terminal goes without."""


def _cells(tensor: TensorPlan) -> list[str]:
    policy = f"merge, K={tensor.groups}" if tensor.policy == "merge" else tensor.policy
    axis = "-" if len(tensor.shape) < 2 else f"axis {tensor.channel_axis}"
    shapes = {tensor.shape, *(info.shape for info in tensor.experts.values())}
    first, *others = map(str, tensor.shape or (1,))
    if len(shapes) > 1 and len({shape[1:] for shape in shapes}) == 1:  # rows for tokens that not all have
        first = f"{min(shapes)[0]}-{max(shapes)[0]}"
    dtypes = "/".join(dict.fromkeys([tensor.dtype, *(info.dtype for info in tensor.experts.values())]))
    return [policy, tensor.reason, dtypes, "x".join((first, *others)), axis]


def tensor_table(found: Judgement, *, every: bool) -> tuple[list[str], list[list[str]]]:
    """Headings, and a line per tensor or per kind of tensor that layers have; refused ones first.

    The axis of output channels is a column only where it is not the first of every tensor.
    """
    lines = [(name, ["refused", "-", "-", counted(len(why), "problem"), "-"]) for name, why in found.draft.refused.items()]
    lines += [(tensor.name, _cells(tensor)) for tensor in found.draft.plan.tensors.values()]
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, cells in lines:
        alike.setdefault((name if every else NUMBER.sub("*", name), *cells), []).append(name)
    headings = ["tensor", "", "policy", "why", "dtype", "shape", "channels"]
    rows = [
        [name if len(names) > 1 else names[0], f"x{len(names)}" if len(names) > 1 else "", *cells]
        for (name, *cells), names in alike.items()
    ]
    if all(row[-1] in ("-", "axis 0") for row in rows):
        return headings[:-1], [row[:-1] for row in rows]
    return headings, rows


def source_lines(found: Judgement) -> list[tuple[str, str]]:
    """Per checkpoint, where it lies and what it is."""
    lines = []
    for source in found.forecast.sources:
        facts = [
            source.kind + (", tied" if source.tied else ""),
            *(f"{dtype} x{count}" for dtype, count in source.dtypes.items()),
            counted(source.parameters, "parameter"),
        ]
        if source.vocabulary is not None:
            facts.append(f"vocabulary {source.vocabulary:,}")
        if source.fetch:
            facts.append(f"{size(source.fetch)} to fetch")
        lines.append((f"{source.label}: {source.place}", ", ".join(facts)))
    return lines


def totals(found: Judgement) -> list[str]:
    """What it would cost, a line each."""
    numbers = found.forecast
    share = f"{numbers.pool:,} of {counted(numbers.experts, 'parameter')} ({100 * numbers.ratio:.1f} %)"
    return [
        f"to fetch: about {size(numbers.fetch)}" if numbers.fetch else "to fetch: nothing",
        f"delta store: at most {size(numbers.deltas)} (before compression)",
        f"artifact: at most {size(numbers.artifact)} (beside its manifest and card), {share}",
        f"work: {counted(numbers.blocks, 'block')}; a task holds at most {size(numbers.peak)} of {size(numbers.budget)}"
        + (f" ({numbers.peak_tensor})" if numbers.peak_tensor else ""),
    ]
