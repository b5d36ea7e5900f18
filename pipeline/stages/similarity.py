"""Similarity: one pass over the deltas for all that depends on whole rows or tensors of them.

That is the tables of pairs from which every clustering is computed, the last bits of TIES' thresholds and the L1 norms by
which DARE may rescale. Tables and thresholds are kept beside the deltas, so another K, metric or granularity needs no pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from pipeline import memory
from pipeline.engine import Engine
from pipeline.job import Job
from pipeline.kernels import sizes
from pipeline.kernels.clustering import Clustering
from pipeline.kernels.forms import with_keys
from pipeline.kernels.fused import sizes as fused_sizes
from pipeline.kernels.fused import tables as fused_tables
from pipeline.kernels.fused.floats import tagged
from pipeline.kernels.masks import keep_mask, limit_of, mask_key
from pipeline.plan import Block, TensorPlan
from pipeline.recipe import AUTO
from pipeline.stages import trimming
from pipeline.stages.ingest import StageResult
from pipeline.stages.slices import FUSED, Slice, bytes_of, chunks, device_of
from storage.arrays import ArrayGroup, ArraySpec, ChunkDigests
from storage.deltas import expert_group, table_array, table_group
from storage.layout import DELTA_FORMAT

if TYPE_CHECKING:  # the fused path does without, and importing it takes a second
    import torch


@dataclass(frozen=True)
class Wanted:
    """What is to be found out about a tensor."""

    tables: tuple[str, ...]
    bins: tuple[int, ...]
    """Per expert in order of name the high 16 bits whose low ones are counted; -1 or nothing: none."""
    masses: bool
    """Whether DARE's masks are to be weighed."""


@dataclass(frozen=True)
class SimilarityTask:
    """Pieces of merged tensors."""

    table: Path
    block: Block
    tensors: Mapping[str, TensorPlan]
    wanted: Mapping[str, Wanted]
    experts: tuple[str, ...]
    groups: tuple[Path, ...]
    """Delta groups in order of the experts' names."""
    order: tuple[int, ...]
    """The experts' positions in the order of the tables."""
    counts: Path
    seed: int
    density: float
    memory: int
    kernel: str
    threads: int


@dataclass(frozen=True)
class SimilarityReceipt:
    """What a similarity task wrote and saw."""

    chunks: ChunkDigests
    masses: list[tuple[str, NDArray[np.float64]]]
    """Per tensor and chunk (experts, 2, 2): sums of |delta| and |masked delta|, each in two parts that are exact together."""
    bytes_read: int


@dataclass(frozen=True)
class Measured:
    """What the merge needs to know of whole tensors, per tensor by expert in order of name."""

    thresholds: Mapping[str, tuple[float, ...]]
    """TIES: entries of this size and above are kept."""
    scales: Mapping[str, tuple[float, ...]]
    """DARE: what kept entries are multiplied by."""
    kept: Mapping[str, float]
    """Expert -> share of its entries that TIES keeps, equal values included."""


def table_order(job: Job) -> tuple[str, ...]:
    """Experts by id: tables are the same whatever the experts are called."""
    return tuple(sorted(job.experts, key=lambda name: (job.experts[name].id, name)))


def clustering_of(job: Job) -> Clustering:
    """The recipe's clustering."""
    merge = job.recipe.merge
    return Clustering(merge.clustering, merge.metric, merge.sign)


def _tables_for(job: Job, tensor: TensorPlan) -> tuple[str, ...]:
    """The tables that grouping this tensor's experts reads."""
    if not tensor.is_clustered:
        return ()
    clustering = clustering_of(job)
    read = {clustering.table} if clustering.kind != "random" else set()
    return tuple(sorted(read | {"gram"} if tensor.groups == AUTO else read))


class _Pass:
    """One task's work, slice by slice."""

    def __init__(self, task: SimilarityTask) -> None:
        self.task = task
        self.device = device_of(task.kernel)
        self.limit = limit_of(task.density)

    def tables(self, part: Slice, deltas: Sequence[torch.Tensor], kind: str) -> NDArray[np.float64]:
        """A table of a slice, experts in the order of the tables."""
        if part.stack is not None and self.task.kernel == FUSED:
            found = fused_tables.table(tagged(part.base, part.tensor.dtype), part.stack, part.at, kind, self.task.threads)
        else:
            import torch

            from pipeline.kernels import tables

            found = tables.table(torch.stack(list(deltas)), kind).cpu().numpy()
        order = list(self.task.order)
        return found[:, order] if kind == "sums" else found[:, order][:, :, order]

    def low_counts(self, part: Slice, deltas: Sequence[torch.Tensor], n: int, high: int) -> NDArray[np.int64]:
        if part.stack is None or self.task.kernel != FUSED:
            return sizes.low_counts(deltas[n], high)
        counts = np.zeros(sizes.LOW, np.int64)
        fused_sizes.count_low(tagged(part.base, part.tensor.dtype), part.stack, part.at, n, high, counts)
        return counts

    def masses(self, part: Slice, deltas: Sequence[torch.Tensor], n: int) -> NDArray[np.float64]:
        """Of every row the sums of |delta| and |masked delta| (rows, 2)."""
        tensor = part.tensor
        key = mask_key(self.task.seed, self.task.experts[n], tensor.name)
        first = part.first * tensor.width
        if part.stack is None or self.task.kernel != FUSED:
            mask = keep_mask(key, first, (len(part), tensor.width), self.limit, self.device)
            return sizes.row_masses(deltas[n], mask)
        out = np.empty((len(part), 2))
        base = tagged(part.base, tensor.dtype)
        fused_sizes.row_masses(base, part.stack, part.at, n, with_keys([key])[0], self.limit, first, out)
        return out


def similarity_block(task: SimilarityTask) -> SimilarityReceipt:
    """Find out what is wanted of a block's rows."""
    store, groups = ArrayGroup(task.table), [ArrayGroup(path) for path in task.groups]
    work = _Pass(task)
    digests: ChunkDigests = {}
    masses: list[tuple[str, NDArray[np.float64]]] = []
    read, count = 0, len(task.experts)
    for piece in task.block.pieces:
        tensor, wanted = task.tensors[piece.tensor], task.wanted[piece.tensor]
        if tensor.base is None:
            raise AssertionError(f"{tensor.name}: a merged tensor has a base")
        fused = task.kernel == FUSED
        for chunk in chunks(piece, tensor.base.chunk_rows, tensor, task.experts, groups):
            read += bytes_of(chunk)
            found = {kind: np.empty((len(chunk), count, 1 if kind == "sums" else count)) for kind in wanted.tables}
            counts = {n: np.zeros(sizes.LOW, np.int64) for n, high in enumerate(wanted.bins) if high >= 0}
            weighed = np.empty((count if wanted.masses else 0, len(chunk), 2))
            step = memory.slice_rows(task.memory, len(chunk), tensor.width, count)
            for start in range(0, len(chunk), step):
                part = chunk.cut(start, start + step)
                deltas = [] if fused and part.stack is not None else part.deltas(task.experts, work.device)
                for kind, out in found.items():
                    out[start : start + step] = work.tables(part, deltas, kind)
                for n in counts:
                    counts[n] += work.low_counts(part, deltas, n, wanted.bins[n])
                for n in range(len(weighed)):
                    weighed[n, start : start + step] = work.masses(part, deltas, n)
            for kind, out in found.items():
                digests.update(store.write(table_array(kind, tensor.name), chunk.first, out))
            if counts:
                trimming.write_counts(task.counts, tensor.name, chunk.first, counts)
            if wanted.masses:
                masses.append((tensor.name, np.array([[_exact_sum(rows[:, side]) for side in (0, 1)] for rows in weighed])))
    return SimilarityReceipt(digests, masses, read)


def _exact_sum(values: NDArray[np.float64]) -> tuple[float, float]:
    """The sum and what rounding it left: added up with others by fsum they do not depend on how rows were cut."""
    total = math.fsum(values)
    return total, math.fsum([*values.tolist(), -total])


def _is_current(store: ArrayGroup) -> bool:
    return store.complete and store.record.get("format") == DELTA_FORMAT


def _missing_tables(job: Job, store: ArrayGroup) -> dict[str, tuple[str, ...]]:
    """Per tensor the tables that are not there whole."""
    known = set(store.record["arrays"]) if _is_current(store) else set()
    damaged = {key.rpartition("/")[0] for key in store.missing_chunks()} if _is_current(store) else set()
    wanted = {}
    for tensor in job.plan.clustered:
        tables = [kind for kind in _tables_for(job, tensor) if table_array(kind, tensor.name) not in known - damaged]
        if tables:
            wanted[tensor.name] = tuple(tables)
    return wanted


def _create_tables(job: Job, store: ArrayGroup, missing: Mapping[str, Sequence[str]], ids: list[str]) -> None:
    specs = {}
    for name, kinds in missing.items():
        base = job.plan.tensors[name].base
        if base is not None:
            for kind in kinds:
                shape = (base.rows, len(ids), 1 if kind == "sums" else len(ids))
                specs[table_array(kind, name)] = ArraySpec(shape, "float64", base.chunk_rows, {})
    if _is_current(store):  # another run may be reading it: its tensors stay as they are
        store.add(specs)
    else:
        store.create(specs, {"experts": ids})


def _scales(job: Job, receipts: Sequence[SimilarityReceipt]) -> dict[str, tuple[float, ...]]:
    """What DARE multiplies kept entries by, so that every tensor keeps its L1 norm; 1 where nothing is kept."""
    sums: dict[str, list[NDArray[np.float64]]] = {}
    for receipt in receipts:
        for tensor, found in receipt.masses:
            sums.setdefault(tensor, []).append(found)
    scales = {}
    for tensor, parts in sums.items():
        whole, kept = (
            [math.fsum(value for part in parts for value in part[n, side].tolist()) for n in range(len(job.plan.experts))]
            for side in (0, 1)
        )
        scales[tensor] = tuple(a / b if b else 1.0 for a, b in zip(whole, kept, strict=True))
    return scales


def _tasks(
    job: Job, engine: Engine, store: ArrayGroup, missing: Mapping[str, tuple[str, ...]], bins: Mapping[str, tuple[int, ...]]
) -> list[SimilarityTask]:
    merge, order = job.recipe.merge, table_order(job)
    weigh = merge.method in ("dare", "dare_ties") and merge.rescale == "l1" and merge.density < 1
    wanted = {
        tensor.name: Wanted(missing.get(tensor.name, ()), bins.get(tensor.name, ()), weigh and tensor.is_combined)
        for tensor in job.plan.merged
    }
    wanted = {name: found for name, found in wanted.items() if found.tables or found.bins or found.masses}
    bases = [base for name in wanted if (base := job.plan.tensors[name].base) is not None]
    groups = tuple(expert_group(job.deltas, job.base.id, source.id).path for source in job.experts.values())
    positions = tuple(job.plan.experts.index(name) for name in order)
    tasks = []
    for block in job.plan.blocks(bases):
        names = {piece.tensor for piece in block.pieces}
        tasks.append(
            SimilarityTask(
                store.path, block, {name: job.plan.tensors[name] for name in names}, {name: wanted[name] for name in names},
                job.plan.experts, groups, positions, job.work / "counts", merge.seed, merge.density, job.plan.memory,
                job.recipe.cluster.kernel, engine.threads,
            )
        )  # fmt: skip
    return tasks


def similarity(job: Job, engine: Engine) -> tuple[StageResult, Measured]:
    """Bring the tables of these experts into the store, unless they are there, and measure what the method asks for."""
    ids = [job.experts[name].id for name in table_order(job)]
    store = table_group(job.deltas, job.base.id, ids)
    store.path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(store.path.with_name(f".{store.path.name}.lock")):
        missing = _missing_tables(job, store)
        trimmed = trimming.is_trimmed(job)
        unknown = [name for name in job.plan.experts if trimmed and trimming.known_trims(job, name) is None]
        searches = {name: trimming.searches(job, name) for name in unknown}
        tasks = _tasks(job, engine, store, missing, trimming.bins(job, searches))
        known: dict[str, Any] = store.record if _is_current(store) else {"chunks": {}, "arrays": []}
        if missing:
            _create_tables(job, store, missing, ids)
        receipts = engine.run("similarity", similarity_block, tasks, [task.block.label for task in tasks]) if tasks else []
        found = {key: value for receipt in receipts for key, value in receipt.chunks.items()}
        if missing:
            arrays = sorted({*known["arrays"], *(table_array(kind, name) for name in missing for kind in missing[name])})
            record = {"format": DELTA_FORMAT, "experts": ids, "arrays": arrays}
            store.finish({**known["chunks"], **found}, record)
        trimming.settle(job, searches, job.work / "counts")
    result = StageResult(sum(r.bytes_read for r in receipts), sum(size for size, _ in found.values()))
    return result, _measured(job, _scales(job, receipts))


def _measured(job: Job, scales: Mapping[str, tuple[float, ...]]) -> Measured:
    if not trimming.is_trimmed(job):
        return Measured({}, scales, {})
    trims = [trimming.known_trims(job, name) for name in job.plan.experts]
    present = [found for found in trims if found is not None]
    thresholds = {
        tensor.name: tuple(trimming.threshold_of(found, tensor.name) for found in present) for tensor in job.plan.combined
    }
    kept = {name: found.kept / found.entries for name, found in zip(job.plan.experts, present, strict=True)}
    return Measured(thresholds, scales, kept)
