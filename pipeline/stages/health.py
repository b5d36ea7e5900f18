"""Health: how far every expert is from its base, from what ingest measured, before anything is merged."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from pipeline.job import Job
from pipeline.roles import layer_of
from storage.deltas import expert_group
from storage.errors import PlanError
from storage.manifest import Health

UNRELATED = 1.0
"""||delta|| / ||base|| from which an expert is taken to be no fine-tune of its base: a model of zeros would be nearer to it.

Two unrelated models have sqrt(1 + q^2), q being the ratio of their norms: the square root of 2 for equal ones.
"""
LARGE = 0.3
"""From here on a user is told: continued pre-training on much data reaches it."""


def _ratio(parts: Iterable[Mapping[str, float | None]]) -> float | None:
    """||delta|| / ||base|| over some tensors; None when it is not known, as in float32 a difference was infinite."""
    known = [(part["delta_norm"], part["base_norm"]) for part in parts]
    if any(delta is None or base is None for delta, base in known):
        return None
    base = math.sqrt(math.fsum(norm**2 for _, norm in known if norm is not None))
    return math.sqrt(math.fsum(norm**2 for norm, _ in known if norm is not None)) / base if base else None


def _of_expert(job: Job, name: str) -> Health:
    statistics = expert_group(job.deltas, job.base.id, job.experts[name].id).record["statistics"]
    layers: dict[str, list[Mapping[str, float | None]]] = {}
    for tensor in job.plan.merged:
        layers.setdefault(layer_of(tensor.name), []).append(statistics[tensor.name])
    entries = {tensor.name: tensor.base_rows * tensor.width for tensor in job.plan.merged}
    unchanged = math.fsum(statistics[name]["unchanged_share"] * count for name, count in entries.items())
    return Health(
        delta_ratio=_ratio(part for parts in layers.values() for part in parts),
        unchanged=unchanged / max(sum(entries.values()), 1),
        layers={layer: _ratio(parts) for layer, parts in layers.items()},
    )


def health(job: Job) -> tuple[dict[str, Health], tuple[str, ...]]:
    """Every expert's health, and what a user should know of it. PlanError for experts of another base, unless allowed."""
    found = {name: _of_expert(job, name) for name in job.experts}
    notes, problems = [], []
    for name, one in found.items():
        ratio = one.delta_ratio
        if ratio is not None and ratio >= UNRELATED:
            where = job.experts[name].folder.place
            text = (
                f"expert {name}: {where}: |expert - base| is {ratio:.2f} of |base|; expected below {UNRELATED} for a fine-tune"
            )
            problems.append(f"{text}. Is {job.base.folder.place} the base it was trained from?")
        elif ratio is not None and ratio >= LARGE:
            notes.append(f"expert {name}: |expert - base| is {ratio:.2f} of |base|: it will weigh on those it is merged with")
        if one.unchanged == 1 and job.plan.merged:
            notes.append(f"expert {name}: every merged weight is the base's")
    if problems and not job.recipe.allow_unrelated:
        raise PlanError.listing("experts are no fine-tunes of the base; --allow-unrelated goes on", problems)
    return found, (*notes, *(f"{problem} Merged all the same." for problem in problems))
