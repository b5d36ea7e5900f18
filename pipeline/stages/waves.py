"""All stages between the sources and a staged artifact, wave by wave: one is merged while later ones still come in.

Each is for a thread of its own: ``ingest`` of every expert, ``group``, ``merge`` and ``pack``. What one has done of a wave the
next one waits for, until the engine is cancelled: who runs them does that when one of them fails. Where a recipe looks at the
whole model before anything is grouped (``groups: auto``, granularity ``model``, TIES' thresholds over all tensors), grouping
waits for all waves.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

from pipeline.engine import Engine
from pipeline.job import Job
from pipeline.ledger import Item, Ledger, block_key
from pipeline.plan import TensorPlan
from pipeline.stages import health, merge, pack, similarity
from pipeline.stages.cluster import Grouping, looks_at_all
from pipeline.stages.intake import Intake
from pipeline.stages.merge import MergeReceipt, MergeTask
from pipeline.stages.pack import Packed, PackReceipt
from pipeline.stages.pool import Sheet, pool_sheet, residue_sheets, residue_targets
from pipeline.stages.similarity import Measured
from storage.deltas import expert_group
from storage.manifest import Health

POLL_S = 0.2
"""How often who waits for another stage looks whether the run is given up."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class _Merged:
    """A wave whose rows are written."""

    sheet: Sheet
    packed: PackReceipt | None
    """From an earlier run."""


class Waves:
    """A job on its way through the stages. A context: meanwhile, until all experts are in, no other run brings them."""

    def __init__(self, job: Job, engine: Engine) -> None:
        self.job = job
        self.engine = engine
        self.waves = job.plan.waves
        self.grouping = Grouping(job, engine)
        self.health: dict[str, Health] = {}
        self.health_notes: dict[str, tuple[str, ...]] = {}
        self.trimmed_to: dict[str, float] = {}
        """Expert -> share of its entries that TIES keeps."""
        self.merged: list[MergeReceipt] = []
        self.packed: Packed | None = None
        self.seconds: dict[str, float] = {}
        self.moved: dict[str, int] = {}
        self._times = threading.Lock()
        self._at_work: dict[str, tuple[int, float]] = {}
        """Stage -> threads in it, and since when there is one."""
        self._intake = Intake(job, engine)
        self._arrivals = threading.Lock()
        self._arrived: list[set[str]] = [set() for _ in self.waves]
        self._finished: set[str] = set()
        self._ingested: list[Future[None]] = [Future() for _ in self.waves]
        self._grouped: list[Future[Measured]] = [Future() for _ in self.waves]
        self._merged: list[Future[_Merged]] = [Future() for _ in self.waves]

    def __enter__(self) -> Self:
        self._intake.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._intake.__exit__(kind, error, trace)

    @property
    def incoming(self) -> tuple[str, ...]:
        """The experts to ingest."""
        return self._intake.experts

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        """Add to a stage's time, once for all threads in it; stages overlap, and waiting for another is not counted."""
        with self._times:
            threads, since = self._at_work.get(stage, (0, time.monotonic()))
            self._at_work[stage] = threads + 1, since
        try:
            yield
        finally:
            with self._times:
                threads, since = self._at_work.pop(stage)
                if threads > 1:
                    self._at_work[stage] = threads - 1, since
                else:
                    self.seconds[stage] = round(self.seconds.get(stage, 0.0) + time.monotonic() - since, 3)

    def _result(self, promised: Future[Result]) -> Result:
        """What another stage promises; Cancelled when the run is given up. In turns, as a lock lets no exception in."""
        while True:
            try:
                return promised.result(timeout=POLL_S)
            except TimeoutError:
                self.engine.check()

    def ingest(self, expert: str) -> None:
        """Bring an expert's deltas into the store, and see how far it is from its base. Once more, it goes on where it was."""
        with self._timed("ingest"):
            self._intake.check(expert)
            sound = True
            for n, tensors in enumerate(self.waves):
                sound = self._intake.wave(expert, tensors) and sound
                if sound:
                    self._arrive(n, expert)
            self._intake.finish(expert)
        with self._timed("health"):
            identity = self.job.experts[expert].id
            for name in (name for name, source in self.job.experts.items() if source.id == identity):
                self.health[name], self.health_notes[name] = health.health(self.job, name)
                for note in self.health_notes[name]:
                    self.engine.reporter.note(note)
        self._finish_ingest(expert)

    def _arrive(self, n: int, expert: str) -> None:
        """An expert has brought a wave; the last one lets it go on."""
        with self._arrivals:
            self._arrived[n].add(expert)
            if len(self._arrived[n]) == len(self.incoming) and not self._ingested[n].done():
                self._ingested[n].set_result(None)

    def _finish_ingest(self, expert: str) -> None:
        """An expert is in; the last one lets other runs bring theirs."""
        with self._arrivals:
            self._finished.add(expert)
            if len(self._finished) < len(self.incoming):
                return
        self._intake.__exit__(None, None, None)
        self.engine.reporter.done("ingest")
        read, written = self._intake.moved()
        self.moved |= {"ingest read": read, "ingest written": written}

    def group(self) -> None:
        """Measure what whole rows and tensors decide, and group the experts of every channel."""
        with similarity.Similarity(self.job, self.engine) as measuring:
            if looks_at_all(self.job) or self.job.recipe.merge.trim_scope == "model":
                self._group_at_once(measuring)
            else:
                for n, tensors in enumerate(self.waves):
                    self._result(self._ingested[n])
                    self._measure(measuring, tensors)
                    self._group(n, measuring.measured(tensors))
                self._finish(measuring)
        self.engine.reporter.done("similarity")
        self.engine.reporter.done("cluster")

    def _group_at_once(self, measuring: similarity.Similarity) -> None:
        for future in self._ingested:
            self._result(future)
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
            read, written = measuring.finish()
            self.trimmed_to = measuring.kept()
        self.moved |= {"similarity read": read, "similarity written": written}

    def _group(self, n: int, measured: Measured) -> None:
        with self._timed("cluster"):
            self.grouping.wave(self.waves[n])
        self._grouped[n].set_result(measured)

    def merge(self) -> None:
        """Fill the pool."""
        job = self.job
        read = written = 0
        residues = residue_sheets(job)
        made = [sheet.allocate() for sheet in residues.values()]
        for n, tensors in enumerate(self.waves):
            measured = self._result(self._grouped[n])
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
            found = self._result(future)
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
