"""Pack: digests of the pool's files and spans, the row indices of every expert, and the files beside them."""

from __future__ import annotations

import copy
import hashlib
import json
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from pipeline.job import Job
from pipeline.kernels.forms import members
from pipeline.ledger import Item, Ledger, Work, block_key
from pipeline.roles import is_vocabulary
from pipeline.rows import RowTable
from pipeline.stages.pool import Sheet, Target
from storage.atomic import canonical_json
from storage.checkpoint import CONFIG
from storage.layout import POOL_INDEX, ROWS_FILE
from storage.manifest import FileRecord, Span, TensorRecord
from storage.parts import fetched, part_key, part_ranges
from storage.safetensors_file import header, weight_index
from storage.stores import Store

READ_BYTES = 1 << 24
DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
"""As configurations name them."""


@dataclass(frozen=True)
class PackTask:
    """One file under way."""

    staged: Store
    sheet: Sheet
    tables: Store | None
    """Where the row tables of its tensors lie; None where a tensor's rows are the channels themselves, in one span."""
    memory: int


@dataclass(frozen=True)
class PackReceipt:
    """A finished file."""

    name: str
    bytes: int
    sha256: str
    spans: list[tuple[str, str]]
    """(tensor, sha256 of the span) in the order of the file."""


class _Digests:
    """sha256 of a stream and of its segments."""

    def __init__(self, segments: Iterable[tuple[str, int]]) -> None:
        self.whole = hashlib.sha256()
        self.found: list[tuple[str, str]] = []
        self._segments = iter(segments)
        self._next()

    def _next(self) -> None:
        self._name, self._left = next(self._segments, ("", -1))
        self._segment = hashlib.sha256()

    def update(self, data: bytes | memoryview) -> None:
        self.whole.update(data)
        view = memoryview(data)
        while view and self._left >= 0:
            self._segment.update(view[: self._left])
            taken = min(self._left, len(view))
            view, self._left = view[taken:], self._left - taken
            if not self._left:
                self.found.append((self._name, self._segment.hexdigest()))
                self._next()


def _channels(task: PackTask, target: Target) -> NDArray[np.int32]:
    """The channel of every row of a tensor."""
    if task.tables is None:
        return np.arange(target.slot.shape[0], dtype=np.int32)
    return RowTable.load(task.tables, target.slot.name).channel


def _pieces(task: PackTask) -> Iterator[bytes | memoryview]:
    """The bytes of the file: as it lies on the disk, or from its parts."""
    path = next((target.path for target in task.sheet.targets.values()), None)
    if path is not None:
        with path.open("rb", buffering=0) as file:
            yield from iter(lambda: file.read(READ_BYTES), b"")
        return
    yield header(task.sheet.slots)[0]
    for target in task.sheet.targets.values():
        starts, size = target.part_starts, target.row_bytes
        keys = [part_key(target.file, target.slot.name, int(start)) for start in starts]
        ranges = part_ranges(_channels(task, target), starts)
        wanted = [(keys[part], first * size, (first + rows) * size) for part, first, rows in ranges]
        yield from fetched(target.parts, wanted, task.memory // 4)


def _segments(task: PackTask) -> Iterator[tuple[str, int]]:
    """(tensor, bytes) of every span in the order of the file, after its header."""
    yield "", len(header(task.sheet.slots)[0])
    for name, target in task.sheet.targets.items():
        spans = [(0, 0, target.slot.shape[0])] if task.tables is None else RowTable.load(task.tables, name).spans()
        for _, start, stop in spans:
            yield name, (stop - start) * target.row_bytes


def pack_file(task: PackTask) -> PackReceipt:
    """Digest a file and its spans and, where it does not lie there yet, put it into the staged folder."""
    digests = _Digests(_segments(task))

    def digested() -> Iterator[bytes | memoryview]:
        for piece in _pieces(task):
            digests.update(piece)
            yield piece

    if task.staged.is_local:
        deque(digested(), maxlen=0)
    else:
        task.staged.upload(task.sheet.name, digested(), size=task.sheet.size)
    spans = [(name, digest) for name, digest in digests.found if name]
    return PackReceipt(task.sheet.name, task.sheet.size, digests.whole.hexdigest(), spans)


WORK: Work[PackTask, PackReceipt] = Work("pack", pack_file, priority=4)


def pack_item(job: Job, sheet: Sheet, tables: Store | None) -> Item[PackTask, PackReceipt]:
    """The task of packing a file."""
    ledger = Ledger(job.receipts.under("pack"), PackReceipt)
    return Item(PackTask(job.staged, sheet, tables, job.plan.memory), sheet.name, block_key(sheet.name, sheet.size), ledger)


def _tensor_record(job: Job, name: str, table: RowTable, digests: list[str]) -> TensorRecord:
    tensor = job.plan.tensors[name]
    spans = tuple(
        Span(experts=tuple(job.plan.experts[n] for n in members(users)), start=start, rows=stop - start, sha256=digest)
        for (users, start, stop), digest in zip(table.spans(), digests, strict=True)
    )
    return TensorRecord(
        policy=tensor.policy,
        shape=tensor.shape,
        dtype=tensor.dtype,
        channel_axis=tensor.channel_axis,
        groups=tensor.groups,
        rows=len(table),
        spans=spans,
    )


def _write_experts(job: Job, tables: Mapping[str, RowTable]) -> None:
    """Per expert its row indices, its configuration and its tokenizer."""
    for position, (name, source) in enumerate(job.experts.items()):
        folder = job.staged.under(f"experts/{name}")
        held = {t.name: t.experts[name] for t in job.plan.tensors.values() if name in t.experts}
        folder.put(ROWS_FILE, save({t: tables[t].indices(position, info.rows) for t, info in held.items()}))
        for side, path in source.side.items():
            folder.put(side, _fitted(path, job, name) if side == CONFIG else path.read_bytes())


def _fitted(path: Path, job: Job, expert: str) -> bytes:
    """A configuration that says what the export is: type, tokens, not quantised. What says so already stays as it is."""
    content = path.read_bytes()
    fields = json.loads(content)
    before = copy.deepcopy(fields)
    held = [tensor for tensor in job.plan.tensors.values() if expert in tensor.experts]
    main = _main_dtype({t.name: (t.dtype, t.experts[expert].rows * t.width) for t in held})
    was = _main_dtype({t.name: (t.experts[expert].dtype, t.experts[expert].rows * t.width) for t in held})
    for section in (fields, *(part for part in fields.values() if isinstance(part, dict))):
        for key in ("quantization_config", "compression_config"):  # of a base it was trained on: the weights are not
            section.pop(key, None)
        for key in ("dtype", "torch_dtype"):
            if main != was and section.get(key) == was:
                section[key] = main
    if job.experts[expert].is_adapter:  # its configuration is its base's
        grown = {t.experts[expert].rows for t in held if is_vocabulary(t.name) and t.experts[expert].rows != t.base_rows}
        section = fields["text_config"] if "vocab_size" in (fields.get("text_config") or {}) else fields
        if len(grown) == 1:
            section["vocab_size"] = grown.pop()
    return content if fields == before else canonical_json(fields)


def _main_dtype(tensors: Mapping[str, tuple[str, int]]) -> str | None:
    """The type of most entries of floating-point tensors, as configurations name it."""
    entries: Counter[str] = Counter()
    for dtype, count in tensors.values():
        if dtype in DTYPE_NAMES:
            entries[DTYPE_NAMES[dtype]] += count
    return max(sorted(entries), key=lambda name: entries[name], default=None)


@dataclass(frozen=True)
class Packed:
    """What the manifest needs to know of the packed files."""

    tensors: dict[str, TensorRecord]
    files: dict[str, FileRecord]
    """Those that were packed: pool and residues."""


def finish(job: Job, pool: Sequence[tuple[Sheet, PackReceipt]], residues: Sequence[PackReceipt], tables: Store) -> Packed:
    """Complete the staged folder, but for router, card and manifest, when all files of the pool are packed."""
    found = {name: RowTable.load(tables, name) for name in job.plan.tensors}
    digests: dict[str, list[str]] = {}
    for _, receipt in pool:
        for tensor, digest in receipt.spans:
            digests.setdefault(tensor, []).append(digest)
    _write_experts(job, found)
    index = weight_index({sheet.name: sheet.slots for sheet, _ in pool})
    job.staged.put(POOL_INDEX, canonical_json(index))
    receipts = [*(receipt for _, receipt in pool), *residues]
    return Packed(
        {name: _tensor_record(job, name, found[name], digests[name]) for name in job.plan.tensors},
        {receipt.name: FileRecord(bytes=receipt.bytes, sha256=receipt.sha256) for receipt in receipts},
    )
