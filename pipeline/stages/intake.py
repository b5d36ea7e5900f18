"""Bringing the sources of a job into the delta store, each wave by wave, and going on where an earlier run ended.

A base whose rows are not at hand in a local file is brought there first, as differences to nothing, by whichever expert
comes to a wave first: experts may be brought at the same time, or one after the other. What is there is known
from a source's ``complete.json``, or from the receipts of an unfinished run, and from one listing: chunks that are gone are
made anew.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import cached_property
from types import TracebackType
from typing import Any, Self

import numpy as np
from pydantic import TypeAdapter, ValidationError

from pipeline import memory
from pipeline.engine import Engine, Waiting
from pipeline.job import Job, Source, check_unchanged
from pipeline.ledger import Item, Ledger, Work, block_key
from pipeline.plan import Block, Piece, TensorPlan, plan_blocks
from pipeline.stages.ingest import ChunkStatistics, IngestReceipt, IngestTask, combined, ingest_block
from storage.arrays import ArrayGroup, ChunkDigests
from storage.checkpoint import check_adapter
from storage.deltas import BASE, StoredRows, base_group, expert_arrays, expert_group, group_layout, unit_keys, whole_record
from storage.digests import digest_of
from storage.errors import ChannelMergingError, CheckpointError
from storage.layout import DELTA_FORMAT
from storage.tensors import TensorInfo

RECEIPTS = "receipts"
NOT_NUMBERS = "weights that are not numbers cannot be merged; train or download them again"
WORK: Work[IngestTask, IngestReceipt] = Work("ingest", ingest_block)
Parts = dict[str, dict[int, ChunkStatistics]]
"""Tensor -> first row -> what is known of that chunk."""
_PARTS = TypeAdapter(list[tuple[str, int, ChunkStatistics]])


@dataclass
class _Incoming:
    """One source on its way into the store."""

    label: str
    name: str
    """Of its folder."""
    source: Source
    base: Source
    group: ArrayGroup
    held: Mapping[str, tuple[TensorInfo, TensorInfo | None]]
    """Array -> its rows and the base's."""
    chunks: ChunkDigests = field(default_factory=dict)
    parts: Parts = field(default_factory=dict)
    whole: bool = False
    bytes_read: int = 0
    bytes_written: int = 0

    @cached_property
    def infos(self) -> dict[str, TensorInfo]:
        return {name: info for name, (info, _) in self.held.items()}

    @cached_property
    def layout(self) -> str:
        return group_layout(self.infos)

    @cached_property
    def ledger(self) -> Ledger[IngestReceipt]:
        """Receipts for files as they are now: what was read while one was another says nothing, be it the old one again."""
        files = digest_of([dict(self.source.stamps), dict(self.base.stamps)])[:16]
        return Ledger(self.group.store.under(f"{RECEIPTS}/{self.layout[:16]}-{files}"), IngestReceipt)

    def look(self) -> None:
        """See what earlier runs have brought, and clear away what is of another format or layout."""
        infos = self.infos
        record = whole_record(self.group, infos)
        if record is not None:
            self._take(record["chunks"], _listed(record))
        else:
            ours = self.layout[:16]
            foreign = [name for name in self.group.store.children(RECEIPTS) if not name.startswith(ours)]
            if foreign or self.group.record() is not None:
                self.group.store.clear("")
            for receipt in self.ledger.read(self.ledger.keys()).values():
                self._take(receipt.chunks, receipt.statistics)
        lost = self.group.missing(self.chunks) if self.chunks else set()
        for name, info in infos.items():
            known = self.parts.get(name, {})
            for start in [start for start in known if not self._has(unit_keys(name, info, start), lost)]:
                del known[start]
        self.whole = record is not None and not self.left(infos)
        if self.whole and self.group.store.children(RECEIPTS):  # its run died when it had just declared the source ingested
            self.group.store.clear(RECEIPTS)

    def _has(self, keys: Sequence[str], lost: set[str]) -> bool:
        return all(key in self.chunks and key not in lost for key in keys)

    def _take(self, chunks: ChunkDigests, statistics: Sequence[tuple[str, int, ChunkStatistics]]) -> None:
        self.chunks.update(chunks)
        for tensor, start, part in statistics:
            self.parts.setdefault(tensor, {})[start] = part

    def left(self, infos: Mapping[str, TensorInfo]) -> dict[str, list[int]]:
        """Of these arrays, the first rows of the chunks that are not in the store."""
        found = {}
        for name, info in infos.items():
            known = self.parts.get(name, {})
            starts = [start for start in range(0, info.rows, info.chunk_rows) if start not in known]
            if starts:
                found[name] = starts
        return found

    def items(self, names: Sequence[str], budget: int) -> list[Item[IngestTask, IngestReceipt]]:
        """The work that is left for these arrays."""
        wanted = set(names)
        infos = {name: info for name, info in self.infos.items() if name in wanted}
        left = self.left(infos)
        items = []
        for block in plan_blocks([infos[name] for name in left], memory.block_elements(budget, 1)) if left else ():
            cut = (_unfinished(piece, left[piece.tensor], infos[piece.tensor]) for piece in block.pieces)
            pieces = tuple(part for parts in cut for part in parts)
            if pieces:
                own = Block(block.label, pieces)
                task = IngestTask(self.group, own, {piece.tensor: self.held[piece.tensor] for piece in pieces})
                label = f"{self.label.removeprefix('expert ')} {block.label}"
                items.append(Item(task, label, block_key([[p.tensor, p.start, p.stop] for p in pieces]), self.ledger))
        return items

    def take(self, receipt: IngestReceipt) -> None:
        self._take(receipt.chunks, receipt.statistics)
        self.bytes_read += receipt.bytes_read
        self.bytes_written += receipt.bytes_written

    def problems(self) -> list[str]:
        """Values that are no numbers, per tensor."""
        found = []
        for tensor in self.held:
            parts = self.parts.get(tensor, {}).values()
            entries = sum(part.entries for part in parts)
            counts = sum(part.non_finite for part in parts), sum(part.base_non_finite for part in parts)
            for whose, count in zip((self.label, "base"), counts, strict=True):
                if count:
                    found.append(f"{whose}: tensor {tensor}: {count} of {entries} values are NaN or infinite; expected none")
        return found

    def finish(self) -> None:
        """Declare the source ingested."""
        in_order = {name: [part for _, part in sorted(self.parts[name].items())] for name in self.held}
        keys = {key for name, info in self.infos.items() for start in self.parts[name] for key in unit_keys(name, info, start)}
        parts = [(name, start, part) for name in self.held for start, part in sorted(self.parts[name].items())]
        record = {
            "format": DELTA_FORMAT,
            "layout": self.layout,
            "statistics": {name: combined(found) for name, found in in_order.items()},
            "parts": _PARTS.dump_json(parts).decode(),
        }
        attributes = {"format": DELTA_FORMAT, "source": self.source.id}
        chunks = {key: found for key, found in self.chunks.items() if key in keys}
        self.group.finish(chunks, expert_arrays(self.infos), attributes, record)
        self.group.store.clear(RECEIPTS)


def _listed(record: Mapping[str, Any]) -> list[tuple[str, int, ChunkStatistics]]:
    """The statistics of every chunk in a record; none where they are damaged, so that all is made anew."""
    try:
        return _PARTS.validate_json(record["parts"])
    except (KeyError, ValidationError):
        return []


def _unfinished(piece: Piece, starts: Sequence[int], info: TensorInfo) -> list[Piece]:
    """A piece without the chunks that are there: runs of whole chunks."""
    found: list[Piece] = []
    for start in starts:
        if piece.start <= start < piece.stop:
            stop = min(start + info.chunk_rows, piece.stop)
            if found and found[-1].stop == start:
                found[-1] = Piece(piece.tensor, found[-1].start, stop)
            else:
                found.append(Piece(piece.tensor, start, stop))
    return found


def _sources(job: Job) -> list[_Incoming]:
    """What is to be in the store: the base where it is kept there, then the experts, each once."""
    found = []
    if job.stored_base:
        held: dict[str, tuple[TensorInfo, TensorInfo | None]] = {name: (info, None) for name, info in job.stored_base.items()}
        found.append(_Incoming("base", BASE, job.base, job.base, base_group(job.deltas, job.base.id), held))
    names = {source.id: name for name, source in job.experts.items()}  # an expert may stand under two names
    for identity, name in names.items():
        held = {t.name: (t.experts[name], t.base) for t in job.plan.tensors.values() if name in t.experts}
        group = expert_group(job.deltas, job.base.id, identity)
        found.append(_Incoming(f"expert {name}", identity, job.experts[name], job.base, group, held))
    return found


def _check_copies(label: str, copies: Sequence[tuple[TensorInfo, TensorInfo]]) -> None:
    """CheckpointError when a head that a config ties to the embedding is another one: leaving it out would change the model."""
    for copy, info in copies:
        for start in range(0, copy.rows, copy.chunk_rows):
            stop = min(start + copy.chunk_rows, copy.rows)
            alike = (copy.dtype, copy.shape) == (info.dtype, info.shape)
            if not alike or not np.array_equal(copy.read(start, stop), info.read(start, stop)):
                raise CheckpointError(
                    f"{label}: tensor {copy.name}: its config ties it to {info.name}, but the two differ. Set "
                    "tie_word_embeddings to false in its config.json if both are meant, or remove the one that is not."
                )


class Intake:
    """All sources of a job on their way into the store. A context: on a local disk no other run writes them meanwhile.

    Experts may be brought by several threads at once, a thread per expert.
    """

    def __init__(self, job: Job, engine: Engine) -> None:
        self.job = job
        self.engine = engine
        found = {one.label: one for one in _sources(job)}
        self._base = found.pop("base", None)
        self._experts = {label.removeprefix("expert "): one for label, one in found.items()}
        self._base_at_work = threading.Lock()
        self._locks = ExitStack()

    @property
    def experts(self) -> tuple[str, ...]:
        """The experts that are brought; of two names for the same checkpoint one."""
        return tuple(self._experts)

    def __enter__(self) -> Self:
        folder = self.job.deltas.under(self.job.base.id)
        sources = [*([self._base] if self._base else ()), *self._experts.values()]
        try:
            if folder.is_local:  # on object stores two runs at once write the same bytes twice
                for name in sorted(one.name for one in sources):  # in one order: two runs cannot wait for each other
                    text = f"waiting for another run that ingests {name}"
                    waiting = Waiting(self.engine.reporter, text, self.engine.check)
                    self._locks.enter_context(folder.lock(name, waiting))
            for one in sources:
                one.look()
        except BaseException:
            self._locks.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._locks.close()

    def check(self, expert: str) -> None:
        """CheckpointError when what an expert leaves out, or is added to, is not what it is taken for."""
        for one in (self._base, self._experts[expert]):
            if one is not None and not one.whole:
                self._check(one)

    def _check(self, one: _Incoming) -> None:
        _check_copies(one.label, one.source.copies)
        if one.source.is_adapter:
            bases = {tensor.name: tensor.base for tensor in self.job.plan.tensors.values() if tensor.base is not None}
            check_adapter(one.label, one.source.folder, bases)

    def _bring(self, one: _Incoming, arrays: Sequence[str]) -> bool:
        """Bring in what is left of these arrays; whether all values are numbers."""
        items = one.items(arrays, self.job.plan.memory)
        try:
            receipts = WORK.run(self.engine, items)
        except ChannelMergingError:
            with suppress(ChannelMergingError):  # a second attempt goes on after what is done
                for receipt in one.ledger.read(item.key for item in items).values():
                    one.take(receipt)
            raise
        for receipt in receipts:
            one.take(receipt)
        parts = (part for name in arrays for part in one.parts.get(name, {}).values())  # whoever brought them
        return not any(part.non_finite or part.base_non_finite for part in parts)

    def _bring_base(self, arrays: Sequence[str]) -> bool:
        if self._base is None:
            return True
        with self._base_at_work:  # who comes second finds nothing left
            return self._bring(self._base, arrays)

    def wave(self, expert: str, tensors: Sequence[TensorPlan]) -> bool:
        """Bring in these tensors of an expert; whether all their values are numbers. The base's, read there, go first."""
        needed = [t.base.data.tensor for t in tensors if t.base is not None and isinstance(t.base.data, StoredRows)]
        return self._bring_base(needed) and self._bring(self._experts[expert], [t.name for t in tensors])

    def finish(self, expert: str) -> None:
        """Complete an expert, and the base; CheckpointError when values are not numbers: then it stays incomplete."""
        problems: list[str] = []
        if self._base is not None:
            self._bring_base(list(self._base.held))
            with self._base_at_work:
                problems += self._finish(self._base)
        one = self._experts[expert]
        self._bring(one, list(one.held))
        if found := dict.fromkeys([*problems, *self._finish(one)]):
            raise CheckpointError.listing(NOT_NUMBERS, found)

    def _finish(self, one: _Incoming) -> list[str]:
        """Declare a source ingested unless there are problems, which are returned."""
        problems = one.problems()
        if not one.whole and not problems:
            check_unchanged("base", self.job.base)
            check_unchanged(one.label, one.source)
            one.finish()
            one.whole = True
        return problems

    def moved(self) -> tuple[int, int]:
        """Bytes read and written so far."""
        sources = [*([self._base] if self._base else ()), *self._experts.values()]
        return sum(one.bytes_read for one in sources), sum(one.bytes_written for one in sources)
