"""Similarity: one pass over the deltas for all that depends on whole rows or tensors of them.

That is the tables of pairs from which every clustering is computed, the last bits of TIES' thresholds and the L1 norms by
which DARE may rescale. Tables and thresholds are kept beside the deltas, so another K, metric or granularity needs no pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from pipeline import memory
from pipeline.engine import Engine, Waiting
from pipeline.job import Job
from pipeline.kernels import sizes
from pipeline.kernels.clustering import Clustering
from pipeline.kernels.forms import with_keys
from pipeline.kernels.fused import sizes as fused_sizes
from pipeline.kernels.fused import tables as fused_tables
from pipeline.kernels.fused.floats import tagged
from pipeline.kernels.masks import keep_mask, limit_of, mask_key
from pipeline.ledger import Item, Ledger, Work, block_key
from pipeline.plan import Block, TensorPlan
from pipeline.recipe import AUTO
from pipeline.stages import trimming
from pipeline.stages.slices import FUSED, Slice, bytes_of, chunks, device_of
from storage.arrays import ArrayGroup, ChunkDigests
from storage.deltas import expert_group, table_array, table_group, table_spec
from storage.layout import DELTA_FORMAT
from storage.stores import Store, open_store

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

    table: ArrayGroup
    block: Block
    tensors: Mapping[str, TensorPlan]
    wanted: Mapping[str, Wanted]
    experts: tuple[str, ...]
    groups: tuple[ArrayGroup, ...]
    """Delta groups in order of the experts' names."""
    order: tuple[int, ...]
    """The experts' positions in the order of the tables."""
    counts: Store
    seed: int
    density: float
    memory: int
    kernel: str
    threads: int


@dataclass(frozen=True)
class SimilarityReceipt:
    """What a similarity task wrote and saw."""

    chunks: ChunkDigests
    masses: list[tuple[str, list[list[tuple[float, float]]]]]
    """Per tensor and chunk (experts, 2, 2): sums of |delta| and |masked delta|, each in two parts that are exact together."""
    bytes_read: int


@dataclass(frozen=True)
class Measured:
    """What the merge needs to know of whole tensors, per tensor by expert in order of name."""

    thresholds: Mapping[str, tuple[float, ...]]
    """TIES: entries of this size and above are kept."""
    scales: Mapping[str, tuple[float, ...]]
    """DARE: what kept entries are multiplied by."""


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
    work = _Pass(task)
    digests: ChunkDigests = {}
    masses: list[tuple[str, list[list[tuple[float, float]]]]] = []
    read, count = 0, len(task.experts)
    for piece in task.block.pieces:
        tensor, wanted = task.tensors[piece.tensor], task.wanted[piece.tensor]
        if tensor.base is None:
            raise AssertionError(f"{tensor.name}: a merged tensor has a base")
        fused = task.kernel == FUSED
        for chunk in chunks(piece, tensor.base.chunk_rows, tensor, task.experts, task.groups):
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
            specs = {kind: table_spec(tensor.base, count, kind) for kind in found}
            rows = {table_array(kind, tensor.name): (specs[kind], chunk.first, out) for kind, out in found.items()}
            digests.update(task.table.write(rows))
            if counts:
                trimming.write_counts(task.counts, tensor.name, chunk.first, counts)
            if wanted.masses:
                masses.append((tensor.name, [[_exact_sum(rows[:, side]) for side in (0, 1)] for rows in weighed]))
    return SimilarityReceipt(digests, masses, read)


WORK: Work[SimilarityTask, SimilarityReceipt] = Work("similarity", similarity_block, priority=1)
_Item = Item[SimilarityTask, SimilarityReceipt]


def _exact_sum(values: NDArray[np.float64]) -> tuple[float, float]:
    """The sum and what rounding it left: added up with others by fsum they do not depend on how rows were cut."""
    total = math.fsum(values)
    return total, math.fsum([*values.tolist(), -total])


def _missing_tables(job: Job, known: set[str], tensors: Sequence[TensorPlan]) -> dict[str, tuple[str, ...]]:
    """Per tensor the tables that are not there whole."""
    wanted = {}
    for tensor in tensors:
        tables = tuple(kind for kind in _tables_for(job, tensor) if table_array(kind, tensor.name) not in known)
        if tables:
            wanted[tensor.name] = tables
    return wanted


def _scales(job: Job, receipts: Sequence[SimilarityReceipt]) -> dict[str, tuple[float, ...]]:
    """What DARE multiplies kept entries by, so that every tensor keeps its L1 norm; 1 where nothing is kept."""
    sums: dict[str, list[NDArray[np.float64]]] = {}
    for receipt in receipts:
        for tensor, found in receipt.masses:
            sums.setdefault(tensor, []).append(np.array(found))
    scales = {}
    for tensor, parts in sums.items():
        whole, kept = (
            [math.fsum(value for part in parts for value in part[n, side].tolist()) for n in range(len(job.plan.experts))]
            for side in (0, 1)
        )
        scales[tensor] = tuple(a / b if b else 1.0 for a, b in zip(whole, kept, strict=True))
    return scales


class Similarity:
    """The pass over the deltas, wave by wave. A context: on a local disk no other run writes these tables meanwhile."""

    def __init__(self, job: Job, engine: Engine) -> None:
        self.job = job
        self.engine = engine
        self.ids = [job.experts[name].id for name in table_order(job)]
        self.store = table_group(job.deltas, job.base.id, self.ids)
        self.chunks: ChunkDigests = {}
        self.known: set[str] = set()
        """Tables that are there whole, by array."""
        self.scales: dict[str, tuple[float, ...]] = {}
        self.fresh: list[SimilarityReceipt] = []
        trims = {name: trimming.known_trims(job, name) for name in job.plan.experts} if trimming.is_trimmed(job) else {}
        self.trims = {name: [found] for name, found in trims.items() if found is not None}
        self.unknown = [name for name, found in trims.items() if found is None]
        self._locks = ExitStack()
        self._wanted: set[str] = set()

    def __enter__(self) -> Self:
        folder, _, name = self.store.place.rpartition("/")
        try:
            if self.store.store.is_local:
                text = "waiting for another run that compares the same experts"
                waiting = Waiting(self.engine.reporter, text, self.engine.check)
                self._locks.enter_context(open_store(folder).lock(name, waiting))
            record = self.store.record()
            if record is not None and record.get("format") != DELTA_FORMAT:
                self.store.store.clear("")
            elif record is not None:
                self.chunks = record["chunks"]
                damaged = {key.rpartition("/")[0] for key in self.store.missing(self.chunks)}
                self.known = set(record["arrays"]) - damaged
        except BaseException:
            self._locks.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._locks.close()

    def _items(self, tensors: Sequence[TensorPlan], bins: Mapping[str, tuple[int, ...]]) -> list[_Item]:
        job, merge = self.job, self.job.recipe.merge
        missing = _missing_tables(job, self.known, tensors)
        weigh = merge.method in ("dare", "dare_ties") and merge.rescale == "l1" and merge.density < 1
        wanted = {
            tensor.name: Wanted(missing.get(tensor.name, ()), bins.get(tensor.name, ()), weigh and tensor.is_combined)
            for tensor in tensors
            if tensor.policy == "merge"
        }
        wanted = {name: found for name, found in wanted.items() if found.tables or found.bins or found.masses}
        self._wanted |= {table_array(kind, name) for name, found in wanted.items() for kind in found.tables}
        bases = [base for name in wanted if (base := job.plan.tensors[name].base) is not None]
        groups = tuple(expert_group(job.deltas, job.base.id, source.id) for source in job.experts.values())
        positions = tuple(job.plan.experts.index(name) for name in table_order(job))
        ledger = Ledger(job.receipts.under("similarity"), SimilarityReceipt)
        items = []
        for block in job.plan.blocks(bases) if bases else ():
            names = {piece.tensor for piece in block.pieces}
            asked = {name: wanted[name] for name in sorted(names)}
            task = SimilarityTask(
                self.store, block, {name: job.plan.tensors[name] for name in names}, asked, job.plan.experts, groups, positions,
                job.work.under("counts"), merge.seed, merge.density, job.plan.memory, job.recipe.cluster.kernel,
                self.engine.threads,
            )  # fmt: skip
            covered = [
                [[p.tensor, p.start, p.stop] for p in block.pieces],
                {name: [_tables_for(job, job.plan.tensors[name]), one.bins, one.masses] for name, one in asked.items()},
            ]
            items.append(Item(task, block.label, block_key(covered), ledger))
        return items

    def wave(self, tensors: Sequence[TensorPlan]) -> None:
        """Measure these tensors; what earlier runs have measured is not measured again."""
        searches = {name: trimming.searches(self.job, name, tensors) for name in self.unknown}
        items = self._items(tensors, trimming.bins(self.job, searches, tensors))
        sizes = self.store.store.sizes() if items else {}

        def holds(item: _Item, receipt: SimilarityReceipt) -> bool:
            wanted = {table_array(kind, name) for name, one in item.task.wanted.items() for kind in one.tables}
            if not wanted <= {key.rpartition("/")[0] for key in receipt.chunks}:
                return False  # it found tables there that are lost by now
            return all(sizes.get(key) == size for key, (size, _) in receipt.chunks.items())

        receipts, fresh = WORK.resume(self.engine, items, holds)
        self.fresh += fresh
        for receipt in receipts:
            self.chunks.update(receipt.chunks)
        self.scales |= _scales(self.job, receipts)
        for name, trims in trimming.settled(self.job, searches, tensors, self.job.work.under("counts")).items():
            self.trims.setdefault(name, []).append(trims)

    def measured(self, tensors: Sequence[TensorPlan]) -> Measured:
        """What is known of these tensors; of experts, over all that have come so far."""
        scales = {tensor.name: self.scales[tensor.name] for tensor in tensors if tensor.name in self.scales}
        if not trimming.is_trimmed(self.job):
            return Measured({}, scales)
        several = [self.trims[name] for name in self.job.plan.experts]
        thresholds = {
            tensor.name: tuple(trimming.threshold_of(trims, tensor.name) for trims in several)
            for tensor in tensors
            if tensor.is_combined
        }
        return Measured(thresholds, scales)

    def kept(self) -> dict[str, float]:
        """Expert -> share of its entries that TIES keeps, equal values included."""
        whole = {name: trimming.together(found) for name, found in self.trims.items()}
        return {name: found.kept / found.entries for name, found in whole.items() if found.entries}

    def finish(self) -> tuple[int, int]:
        """Declare the tables complete, and keep the thresholds. Returns the bytes read and written.

        Other jobs will trust them, so no file may have changed.
        """
        if self._wanted or self.unknown:
            self.job.check_sources()
        if self._wanted:
            arrays = sorted(self.known | self._wanted)
            record = {"format": DELTA_FORMAT, "experts": self.ids, "arrays": arrays}
            self.store.finish(self.chunks, arrays, {"experts": self.ids}, record)
        for name in self.unknown:
            trimming.keep(self.job, name, trimming.together(self.trims[name]))
        written = sum(size for receipt in self.fresh for size, _ in receipt.chunks.values())
        return sum(receipt.bytes_read for receipt in self.fresh), written
