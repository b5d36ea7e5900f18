"""Exact thresholds for TIES: from the counts that ingest keeps to the k-th largest |delta| of a tensor or of the model.

Ingest has counted every |delta| by its high 16 bits, which finds the range that holds the threshold. The pass of the
similarity stage counts the low 16 bits inside that range, which gives the number. Thresholds are kept beside the deltas.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.job import Job
from pipeline.kernels.sizes import LOW, bin_of, threshold
from pipeline.plan import TensorPlan
from storage.arrays import ArrayGroup
from storage.atomic import canonical_json, write_atomically
from storage.deltas import THRESHOLDS, expert_group, magnitudes_array
from storage.digests import digest_of

MODEL = ""
"""Under this name goes a threshold for all tensors: no tensor has it."""
ALL, NONE = 0.0, float("inf")


@dataclass(frozen=True)
class Search:
    """Where one threshold is looked for."""

    high: int
    """The high 16 bits it has."""
    left: int
    """It is the ``left``-th largest of those."""
    above: int
    """Entries larger than all of those."""


@dataclass(frozen=True)
class Trims:
    """An expert's thresholds over some scope, by tensor."""

    thresholds: Mapping[str, float]
    kept: int
    """Entries that stay, equal values included."""
    entries: int


def is_trimmed(job: Job) -> bool:
    """Whether thresholds over more than a row are needed."""
    merge = job.recipe.merge
    return merge.method == "ties" and merge.trim_scope != "row" and merge.density < 1 and bool(job.plan.combined)


def _path(job: Job, expert: str) -> Path:
    merge = job.recipe.merge
    tensors = sorted((tensor.name, tensor.base_rows) for tensor in job.plan.combined)
    key = digest_of([merge.trim_scope, merge.density, tensors])[:40]
    return job.deltas / job.base.id / THRESHOLDS / job.experts[expert].id / f"{key}.json"


def known_trims(job: Job, expert: str) -> Trims | None:
    """The thresholds of an earlier run, if there are any."""
    try:
        found = json.loads(_path(job, expert).read_bytes())
        thresholds = {name: NONE if value is None else float(value) for name, value in found["thresholds"].items()}
        trims = Trims(thresholds, int(found["kept"]), int(found["entries"]))
        return trims if thresholds.keys() == _scopes(job).keys() else None
    except (OSError, ValueError, KeyError, AttributeError, TypeError):  # none, or damaged: it is made anew
        return None


def _scopes(job: Job) -> dict[str, list[TensorPlan]]:
    """The tensors over which entries are ranked together, by the name a threshold goes by."""
    if job.recipe.merge.trim_scope == "model":
        return {MODEL: job.plan.combined}
    return {tensor.name: [tensor] for tensor in job.plan.combined}


def _magnitudes(group: ArrayGroup, tensors: Sequence[TensorPlan], expert: str) -> NDArray[np.int64]:
    counts = np.zeros(1, np.int64)
    for tensor in tensors:
        chunks = -(-tensor.experts[expert].rows // tensor.experts[expert].chunk_rows)
        counts = counts + group.read(magnitudes_array(tensor.name), 0, chunks).sum(axis=0, dtype=np.int64)
    return counts


def searches(job: Job, expert: str) -> dict[str, Search | float]:
    """Per scope where its threshold lies, or the threshold where none is to be looked for."""
    group = expert_group(job.deltas, job.base.id, job.experts[expert].id)
    found: dict[str, Search | float] = {}
    for scope, tensors in _scopes(job).items():
        entries = sum(tensor.base_rows * tensor.width for tensor in tensors)
        k = round(job.recipe.merge.density * entries)
        if k in (0, entries):
            found[scope] = ALL if k else NONE
            continue
        high, left = bin_of(_magnitudes(group, tensors, expert), k)
        found[scope] = Search(high, left, k - left)
    return found


def bins(job: Job, found: Mapping[str, Mapping[str, Search | float]]) -> dict[str, tuple[int, ...]]:
    """Per tensor the high 16 bits looked for, by expert in order of name; -1 where there is nothing to look for."""
    wanted = {}
    for tensor in job.plan.combined:
        scope = MODEL if job.recipe.merge.trim_scope == "model" else tensor.name
        places = [found[name].get(scope) if name in found else None for name in job.plan.experts]
        wanted[tensor.name] = tuple(place.high if isinstance(place, Search) else -1 for place in places)
    return {name: highs for name, highs in wanted.items() if max(highs) >= 0}


def write_counts(folder: Path, tensor: str, start: int, counts: Mapping[int, NDArray[np.int64]]) -> None:
    """Keep the low counts of one chunk, by position of the expert, where ``read_counts`` finds them."""
    (folder / tensor).mkdir(parents=True, exist_ok=True)
    arrays: dict[str, NDArray[Any]] = {}
    for n, found in counts.items():
        places = np.flatnonzero(found)
        arrays |= {f"places{n}": places.astype(np.uint16), f"counts{n}": found[places]}
    with (folder / tensor / f"{start}.npz").open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # numpy's stubs take the arrays for its flag


def read_counts(folder: Path, tensors: Sequence[TensorPlan], n: int) -> NDArray[np.int64]:
    """(LOW,) the low counts of an expert over these tensors."""
    total = np.zeros(LOW, np.int64)
    for tensor in tensors:
        for path in sorted((folder / tensor.name).glob("*.npz")):
            with np.load(path, allow_pickle=False) as stored:
                if f"places{n}" in stored:
                    total[stored[f"places{n}"]] += stored[f"counts{n}"]
    return total


def settle(job: Job, found: Mapping[str, Mapping[str, Search | float]], folder: Path) -> None:
    """Turn searches and counted low bits into thresholds, and keep them."""
    for expert, places in found.items():
        n = job.plan.experts.index(expert)
        thresholds: dict[str, float] = {}
        kept = total = 0
        for scope, tensors in _scopes(job).items():
            entries = sum(tensor.base_rows * tensor.width for tensor in tensors)
            place = places[scope]
            total += entries
            if isinstance(place, Search):
                counts = read_counts(folder, tensors, n)
                low, left = bin_of(counts, place.left)
                thresholds[scope] = float(threshold(place.high, low))
                kept += place.above + place.left - left + int(counts[low])
            else:
                thresholds[scope] = place
                kept += entries if place == ALL else 0
        path = _path(job, expert)
        path.parent.mkdir(parents=True, exist_ok=True)
        written = {name: None if value == NONE else value for name, value in thresholds.items()}  # JSON has no infinity
        write_atomically(path, canonical_json({"thresholds": written, "kept": kept, "entries": total}))


def threshold_of(trims: Trims, tensor: str) -> float:
    """An expert's threshold for a tensor, whatever the scope."""
    return trims.thresholds[tensor if tensor in trims.thresholds else MODEL]
