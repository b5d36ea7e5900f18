"""Health: how far every expert is from its base, before anything is merged; of a few rows before anything is fetched."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.job import Job
from pipeline.kernels.bits import as_numbers
from pipeline.plan import TensorPlan
from pipeline.roles import layer_of
from storage.deltas import StoredRows, expert_group
from storage.errors import PlanError
from storage.manifest import Health
from storage.tensors import FileRows, TensorInfo

UNRELATED = 1.0
"""||delta|| / ||base|| from which an expert is taken to be no fine-tune of its base: a model of zeros would be nearer to it.

Two unrelated models have sqrt(1 + q^2), q being the ratio of their norms: the square root of 2 for equal ones.
"""
LARGE = 0.3
"""From here on a user is told: continued pre-training on much data reaches it."""
PROBED_TENSORS, PROBED_BYTES = 8, 1 << 16
"""How much of an expert is looked at before it is fetched."""
STRANGERS = "experts are no fine-tunes of the base; --allow-unrelated goes on"


def _stranger(job: Job, name: str, ratio: float) -> str:
    where, base = job.experts[name].folder.place, job.base.folder.place
    found = f"|expert - base| is {ratio:.2f} of |base|; expected below {UNRELATED} for a fine-tune"
    return f"expert {name}: {where}: {found}. Is {base} the base it was trained from?"


def _ratio(parts: Iterable[Mapping[str, float | None]]) -> float | None:
    """||delta|| / ||base|| over some tensors; None when it is not known, as in float32 a difference was infinite."""
    known = [(part["delta_norm"], part["base_norm"]) for part in parts]
    if any(delta is None or base is None for delta, base in known):
        return None
    base = math.sqrt(math.fsum(norm**2 for _, norm in known if norm is not None))
    return math.sqrt(math.fsum(norm**2 for norm, _ in known if norm is not None)) / base if base else None


def _probed(job: Job, name: str) -> list[tuple[TensorInfo, TensorInfo]]:
    """Some matrices of an expert and of its base, where they come from; none of one that is in the store already."""
    if expert_group(job.deltas, job.base.id, job.experts[name].id).record() is not None:
        return []

    def pair(tensor: TensorPlan) -> tuple[TensorInfo, TensorInfo] | None:
        base, expert = tensor.base, tensor.experts[name]
        if base is not None and isinstance(base.data, StoredRows):
            base = job.stored_base[base.data.tensor]
        cheap = isinstance(expert.data, FileRows) and not tensor.slab_bytes
        return (expert, base) if base is not None and cheap else None

    found = [two for tensor in job.plan.merged if (two := pair(tensor)) is not None]
    # by chance, or at a regular step all would be of one name
    chosen = np.random.default_rng(0).permutation(len(found))[:PROBED_TENSORS]
    return [found[place] for place in sorted(chosen)]


Rows = tuple[TensorInfo, int, int]
"""Some rows of a matrix, first and last."""


def _middle(expert: TensorInfo, base: TensorInfo) -> tuple[Rows, Rows]:
    """The same rows of both, from the middle: the first may be special."""
    rows = min(max(1, PROBED_BYTES // (4 * base.width)), base.rows)
    start = (base.rows - rows) // 2
    return (expert, start, start + rows), (base, start, start + rows)


def _read(rows: Rows) -> NDArray[Any]:
    info, start, stop = rows
    return as_numbers(info.read(start, stop), info.dtype).astype(np.float64)


def probe(job: Job) -> None:
    """Look at a few rows of every expert that is not in the store yet, before it is fetched.

    PlanError, unless allowed, for those of which no sample is nearer to the base's than zero: one that is shows a fine-tune,
    whose other matrices may still be far from a base that has zeros there.
    """
    if job.recipe.allow_unrelated:
        return
    pairs = {name: [_middle(*two) for two in _probed(job, name)] for name in job.experts}
    wanted = list({rows: None for found in pairs.values() for two in found for rows in two})
    with ThreadPoolExecutor(8) as pool:  # each may be a request
        read = dict(zip(wanted, pool.map(_read, wanted), strict=True))
    problems = []
    for name, found in pairs.items():
        parts = [_distance(read[expert], read[base]) for expert, base in found]
        ratios = [_ratio([part]) for part in parts]
        whole = _ratio(parts)
        if whole is not None and math.isfinite(whole) and all(ratio is not None and ratio >= UNRELATED for ratio in ratios):
            problems.append(f"{_stranger(job, name, whole)} (In samples of {len(parts)} matrices.)")
    if problems:
        raise PlanError.listing(STRANGERS, problems)


def _distance(expert: NDArray[Any], base: NDArray[Any]) -> dict[str, float | None]:
    with np.errstate(invalid="ignore"):  # infinities are ingest's to report
        return {"delta_norm": float(np.linalg.norm(expert - base)), "base_norm": float(np.linalg.norm(base))}


def _of_expert(job: Job, name: str) -> Health:
    record = expert_group(job.deltas, job.base.id, job.experts[name].id).record()
    statistics = record["statistics"] if record else {}
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


def health(job: Job, name: str) -> tuple[Health, tuple[str, ...]]:
    """An ingested expert's health, and what a user should know of it. PlanError for one of another base, unless allowed."""
    found = _of_expert(job, name)
    notes, ratio = [], found.delta_ratio
    if ratio is not None and ratio >= UNRELATED:
        problem = _stranger(job, name, ratio)
        if not job.recipe.allow_unrelated:
            raise PlanError.listing(STRANGERS, [problem])
        notes.append(f"{problem} Merged all the same.")
    elif ratio is not None and ratio >= LARGE:
        notes.append(f"expert {name}: |expert - base| is {ratio:.2f} of |base|: it will weigh on those it is merged with")
    if found.unchanged == 1 and job.plan.merged:
        notes.append(f"expert {name}: every merged weight is the base's")
    return found, tuple(notes)
