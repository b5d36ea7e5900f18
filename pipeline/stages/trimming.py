"""Exact thresholds for TIES: from the counts that ingest keeps to the k-th largest |delta| of a tensor or of the model.

Ingest has counted every |delta| by its high 16 bits, which finds the range that holds the threshold. The pass of the
similarity stage counts the low 16 bits inside that range, which gives the number. Thresholds are kept beside the deltas.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.job import Job
from pipeline.kernels.sizes import LOW, bin_of, threshold
from pipeline.plan import TensorPlan
from storage.arrays import AT_ONCE, ArrayGroup, each
from storage.atomic import canonical_json
from storage.deltas import THRESHOLDS, expert_group, magnitudes_array, magnitudes_spec
from storage.digests import digest_of
from storage.errors import IncompleteStoreError
from storage.parts import arrays_to_bytes, read_arrays
from storage.stores import Store

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
    inside: int
    """How many of those there are."""


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


def _key(job: Job, expert: str) -> str:
    merge = job.recipe.merge
    tensors = sorted((tensor.name, tensor.base_rows) for tensor in job.plan.combined)
    key = digest_of([merge.trim_scope, merge.density, tensors])[:40]
    return f"{job.base.id}/{THRESHOLDS}/{job.experts[expert].id}/{key}.json"


def known_trims(job: Job, expert: str) -> Trims | None:
    """The thresholds of an earlier run, if there are any."""
    try:
        found = json.loads(job.deltas.get(_key(job, expert)))
        if found["digest"] != digest_of({name: value for name, value in found.items() if name != "digest"}):
            return None
        thresholds = {name: NONE if value is None else float(value) for name, value in found["thresholds"].items()}
        trims = Trims(thresholds, int(found["kept"]), int(found["entries"]))
        return trims if thresholds.keys() == _scopes(job, job.plan.combined).keys() else None
    except (FileNotFoundError, ValueError, KeyError, AttributeError, TypeError):  # none, or damaged: it is made anew
        return None


def _scopes(job: Job, tensors: Sequence[TensorPlan]) -> dict[str, list[TensorPlan]]:
    """The tensors over which entries are ranked together, by the name a threshold goes by."""
    combined = [tensor for tensor in tensors if tensor.is_combined]
    if job.recipe.merge.trim_scope == "model":
        return {MODEL: combined}
    return {tensor.name: [tensor] for tensor in combined}


def _magnitudes(group: ArrayGroup, tensors: Sequence[TensorPlan], expert: str) -> NDArray[np.int64]:
    counts = np.zeros(1, np.int64)
    for tensor in tensors:
        spec = magnitudes_spec(tensor.experts[expert])
        counts = counts + group.read(magnitudes_array(tensor.name), spec, 0, spec.shape[0]).sum(axis=0, dtype=np.int64)
    return counts


def searches(job: Job, expert: str, among: Sequence[TensorPlan]) -> dict[str, Search | float]:
    """Per scope among some tensors where its threshold lies, or the threshold where none is to be looked for."""
    group = expert_group(job.deltas, job.base.id, job.experts[expert].id)
    found: dict[str, Search | float] = {}
    for scope, tensors in _scopes(job, among).items():
        entries = sum(tensor.base_rows * tensor.width for tensor in tensors)
        k = round(job.recipe.merge.density * entries)
        if k in (0, entries):
            found[scope] = ALL if k else NONE
            continue
        magnitudes = _magnitudes(group, tensors, expert)
        high, left = bin_of(magnitudes, k)
        found[scope] = Search(high, left, k - left, int(magnitudes[high]))
    return found


def bins(
    job: Job, found: Mapping[str, Mapping[str, Search | float]], tensors: Sequence[TensorPlan]
) -> dict[str, tuple[int, ...]]:
    """Per tensor the high 16 bits looked for, by expert in order of name; -1 where there is nothing to look for."""
    wanted = {}
    for tensor in tensors:
        if not tensor.is_combined:
            continue
        scope = MODEL if job.recipe.merge.trim_scope == "model" else tensor.name
        places = [found[name].get(scope) if name in found else None for name in job.plan.experts]
        wanted[tensor.name] = tuple(place.high if isinstance(place, Search) else -1 for place in places)
    return {name: highs for name, highs in wanted.items() if max(highs) >= 0}


def write_counts(folder: Store, tensor: str, start: int, counts: Mapping[int, NDArray[np.int64]]) -> None:
    """Keep the low counts of one chunk, by position of the expert, where ``read_counts`` finds them."""
    arrays: dict[str, NDArray[Any]] = {}
    for n, found in counts.items():
        places = np.flatnonzero(found)
        arrays |= {f"places{n}": places.astype(np.uint16), f"counts{n}": found[places]}
    folder.put(f"{tensor}/{start}.npz", arrays_to_bytes(arrays))


def read_counts(folder: Store, tensors: Sequence[TensorPlan], experts: Sequence[int]) -> NDArray[np.int64]:
    """(len(experts), LOW) the low counts of these experts, by position, over these tensors."""
    total = np.zeros((len(experts), LOW), np.int64)
    keys = [f"{tensor.name}/{name}" for tensor in tensors for name in folder.children(tensor.name)]
    for start in range(0, len(keys), AT_ONCE):
        for stored in each(partial(read_arrays, folder), keys[start : start + AT_ONCE], at_once=not folder.is_local):
            for row, n in enumerate(experts):
                if f"places{n}" in stored:
                    total[row, stored[f"places{n}"]] += stored[f"counts{n}"]
    return total


def settled(
    job: Job, found: Mapping[str, Mapping[str, Search | float]], among: Sequence[TensorPlan], folder: Store
) -> dict[str, Trims]:
    """Turn experts' searches among some tensors and the counted low bits into thresholds."""
    parts: dict[str, list[Trims]] = {expert: [] for expert in found}
    positions = [job.plan.experts.index(expert) for expert in found]
    for scope, tensors in _scopes(job, among).items() if found else ():
        entries = sum(tensor.base_rows * tensor.width for tensor in tensors)
        counts = read_counts(folder, tensors, positions)
        for row, expert in enumerate(found):
            place = found[expert][scope]
            if not isinstance(place, Search):
                parts[expert].append(Trims({scope: place}, entries if place == ALL else 0, entries))
                continue
            if int(counts[row].sum()) != place.inside:
                raise _lost(job, folder, scope)
            low, left = bin_of(counts[row], place.left)
            kept = place.above + place.left - left + int(counts[row][low])
            parts[expert].append(Trims({scope: float(threshold(place.high, low))}, kept, entries))
    return {expert: together(several) for expert, several in parts.items()}


def _lost(job: Job, folder: Store, scope: str) -> IncompleteStoreError:
    """Counts that are not all there: whoever wrote them has to do it again."""
    job.receipts.under("similarity").clear("")
    error = IncompleteStoreError(f"{folder.place}: counts of {scope or 'the model'} are lost. Run again: they are made anew.")
    error.damaged = (folder.place, "counts")
    return error


def together(parts: Sequence[Trims]) -> Trims:
    """The thresholds of several scopes."""
    thresholds = {name: value for part in parts for name, value in part.thresholds.items()}
    return Trims(thresholds, sum(part.kept for part in parts), sum(part.entries for part in parts))


def keep(job: Job, expert: str, trims: Trims) -> None:
    """Keep an expert's thresholds for later runs."""
    written = {name: None if value == NONE else value for name, value in trims.thresholds.items()}  # JSON has no infinity
    record = {"thresholds": written, "kept": trims.kept, "entries": trims.entries}
    job.deltas.put(_key(job, expert), canonical_json({**record, "digest": digest_of(record)}))


def threshold_of(parts: Sequence[Trims], tensor: str) -> float:
    """An expert's threshold for a tensor, whatever the scope; the last part is looked at first."""
    for part in reversed(parts):
        for name in (tensor, MODEL):
            if name in part.thresholds:
                return part.thresholds[name]
    raise AssertionError(f"{tensor} has no threshold")
