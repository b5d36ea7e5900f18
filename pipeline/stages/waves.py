"""All stages between the sources and a staged artifact, wave by wave: one is merged while later ones still come in.

Four methods, each for a thread of its own: ``ingest``, ``group``, ``merge`` and ``pack``. What one has done of a wave the next
one waits for. Where a recipe looks at the whole model before anything is grouped (``groups: auto``, granularity ``model``,
TIES' thresholds over all tensors), grouping waits for all waves.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pipeline.engine import Cancelled, Engine
from pipeline.job import Job
from pipeline.ledger import Item, Ledger, block_key
from pipeline.plan import TensorPlan
from pipeline.stages import health, intake, merge, pack, similarity
from pipeline.stages.cluster import Grouping, looks_at_all
from pipeline.stages.merge import MergeReceipt, MergeTask
from pipeline.stages.pack import Packed, PackReceipt
from pipeline.stages.pool import Sheet, pool_sheet, residue_sheets, residue_targets
from pipeline.stages.similarity import Measured
from storage.deltas import expert_group
from storage.manifest import Health


class Stopped(Cancelled):
    """What a stage meets that waits for one that has failed."""


@dataclass(frozen=True)
class _Merged:
    """A wave whose rows are written."""

    sheet: Sheet
    packed: PackReceipt | None
    """From an earlier run."""


@contextmanager
def _ending(promised: Sequence[Future[Any]]) -> Iterator[None]:
    """Let nobody wait for what will not come."""
    try:
        yield
    finally:
        for future in promised:
            if not future.done():
                future.set_exception(Stopped())


class Waves:
    """A job on its way through the stages."""

    def __init__(self, job: Job, engine: Engine) -> None:
        self.job = job
        self.engine = engine
        self.waves = job.plan.waves
        self.grouping = Grouping(job, engine)
        self.health: Mapping[str, Health] = {}
        self.health_notes: tuple[str, ...] = ()
        self.trimmed_to: dict[str, float] = {}
        """Expert -> share of its entries that TIES keeps."""
        self.merged: list[MergeReceipt] = []
        self.packed: Packed | None = None
        self.seconds: dict[str, float] = {}
        self.moved: dict[str, int] = {}
        self._ingested: list[Future[None]] = [Future() for _ in self.waves]
        self._grouped: list[Future[Measured]] = [Future() for _ in self.waves]
        self._merged: list[Future[_Merged]] = [Future() for _ in self.waves]

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        """Add to a stage's time; stages overlap, and waiting for another is not counted."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[stage] = round(self.seconds.get(stage, 0.0) + time.monotonic() - started, 3)

    def ingest(self) -> None:
        """Bring every expert's deltas into the store, and see how far they are from their base."""
        with _ending(self._ingested):
            with self._timed("health"):
                health.probe(self.job)
            self._ingest()
        self.engine.reporter.done("ingest")
        with self._timed("health"):
            self.health, self.health_notes = health.health(self.job)
        for note in self.health_notes:
            self.engine.reporter.note(note)

    def _ingest(self) -> None:
        with intake.Intake(self.job, self.engine) as sources:
            sound = True
            for tensors, future in zip(self.waves, self._ingested, strict=True):
                with self._timed("ingest"):
                    sound = sources.wave(tensors) and sound
                if sound:
                    future.set_result(None)
            with self._timed("ingest"):
                result = sources.finish()
        self.moved |= {"ingest read": result.bytes_read, "ingest written": result.bytes_written}

    def group(self) -> None:
        """Measure what whole rows and tensors decide, and group the experts of every channel."""
        with _ending(self._grouped), similarity.Similarity(self.job, self.engine) as measuring:
            if looks_at_all(self.job) or self.job.recipe.merge.trim_scope == "model":
                self._group_at_once(measuring)
            else:
                for n, tensors in enumerate(self.waves):
                    self._ingested[n].result()
                    self._measure(measuring, tensors)
                    self._group(n, measuring.measured(tensors))
                self._finish(measuring)
        self.engine.reporter.done("similarity")
        self.engine.reporter.done("cluster")

    def _group_at_once(self, measuring: similarity.Similarity) -> None:
        for future in self._ingested:
            future.result()
        self._measure(measuring, list(self.job.plan.tensors.values()))
        self._finish(measuring)
        with self._timed("cluster"):
            self.grouping.look_at_all()
        for note in self.grouping.notes:
            self.engine.reporter.note(note)
        for n, tensors in enumerate(self.waves):
            self._group(n, measuring.measured(tensors))

    def _measure(self, measuring: similarity.Similarity, tensors: Sequence[TensorPlan]) -> None:
        with self._timed("similarity"):
            measuring.wave(tensors)

    def _finish(self, measuring: similarity.Similarity) -> None:
        with self._timed("similarity"):
            result = measuring.finish()
            self.trimmed_to = measuring.kept()
        self.moved |= {"similarity read": result.bytes_read, "similarity written": result.bytes_written}

    def _group(self, n: int, measured: Measured) -> None:
        with self._timed("cluster"):
            self.grouping.wave(self.waves[n])
        self._grouped[n].set_result(measured)

    def merge(self) -> None:
        """Fill the pool."""
        job = self.job
        read = written = 0
        with _ending(self._merged):
            residues = residue_sheets(job)
            made = [sheet.allocate() for sheet in residues.values()]
            for n, tensors in enumerate(self.waves):
                measured = self._grouped[n].result()
                with self._timed("merge"):
                    sheet = pool_sheet(job, (n + 1, len(self.waves)), tensors, self.grouping.rows)
                    items = self._merge_items(tensors, sheet, residues, measured)
                    is_new = any([sheet.allocate(), *made])
                    done = None if is_new else self._packed(sheet)
                    receipts, now = merge.WORK.resume(self.engine, items, self._merged_before(done, is_new=is_new))
                self.merged += receipts
                read, written = read + sum(r.bytes_read for r in now), written + sum(r.bytes_written for r in now)
                self._merged[n].set_result(_Merged(sheet, done))
        merge.check_finite(job, self.merged)
        self.moved |= {"merge read": read, "merge written": written}
        self.engine.reporter.done("merge")

    def _merged_before(self, done: PackReceipt | None, *, is_new: bool) -> Callable[[Any, MergeReceipt], bool]:
        """Whether what a receipt says of a wave is still there: in its packed file, its local file, or its parts."""
        if is_new or done is not None or self.job.output.is_local:
            return lambda _, __: not is_new
        held = self.job.work.under("parts").sizes()
        return lambda _, receipt: all(part in held for part in receipt.parts)

    def _packed(self, sheet: Sheet) -> PackReceipt | None:
        """The receipt of a file that an earlier run has packed, if it is still there."""
        item = pack.pack_item(self.job, sheet, self.grouping.tables)
        found = item.ledger.read([item.key]).get(item.key)
        there = found is not None and self.job.staged.sizes().get(sheet.name) == sheet.size
        return found if there else None

    def _merge_items(
        self, tensors: Sequence[TensorPlan], sheet: Sheet, residues: Mapping[str, Sheet], measured: Measured
    ) -> list[Item[MergeTask, MergeReceipt]]:
        job = self.job
        ledger = Ledger(job.receipts.under("merge"), MergeReceipt)
        groups = tuple(expert_group(job.deltas, job.base.id, source.id) for source in job.experts.values())
        weights = tuple(job.recipe.experts[name].weight for name in job.plan.experts)
        items = []
        for block in job.plan.blocks(tensors):
            names = list(dict.fromkeys(piece.tensor for piece in block.pieces))
            task = MergeTask(
                block, {name: job.plan.tensors[name] for name in names}, {name: sheet.targets[name] for name in names},
                {name: residue_targets(residues, name) for name in names}, self.grouping.tables, job.plan.experts, groups,
                weights, job.recipe.merge, {name: measured.thresholds[name] for name in names if name in measured.thresholds},
                {name: measured.scales[name] for name in names if name in measured.scales}, job.plan.memory,
                job.recipe.cluster.kernel, self.engine.threads,
            )  # fmt: skip
            key = block_key([[piece.tensor, piece.start, piece.stop] for piece in block.pieces])
            items.append(Item(task, block.label, key, ledger))
        return items

    def pack(self) -> None:
        """Digest and place the files of the pool, as soon as each is filled; then what stands beside them."""
        job, tables = self.job, self.grouping.tables
        pool: list[tuple[Sheet, PackReceipt]] = []
        read = 0
        for future in self._merged:
            found = future.result()
            receipt = found.packed
            with self._timed("pack"):
                if receipt is None:
                    (receipt,) = pack.WORK.run(self.engine, [pack.pack_item(job, found.sheet, tables)])
                    read += receipt.bytes
                if not job.output.is_local:
                    job.work.under("parts").clear(found.sheet.name)
            pool.append((found.sheet, receipt))
        with self._timed("pack"):
            residues = [pack.pack_item(job, sheet, None) for sheet in residue_sheets(job).values()]
            packed = pack.WORK.run(self.engine, residues)
            self.packed = pack.finish(job, pool, packed, tables)
        self.moved |= {"pack read": read + sum(receipt.bytes for receipt in packed)}
        self.engine.reporter.done("pack")
