"""Pack: digests of the pool's files and spans, the row indices of every expert, and the files beside them."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.numpy import save_file

from pipeline.engine import Engine
from pipeline.job import Job
from pipeline.kernels.forms import members
from pipeline.roles import is_vocabulary
from pipeline.rows import RowTable
from pipeline.stages.cluster import table_path
from pipeline.stages.merge import Pool
from storage.atomic import canonical_json
from storage.checkpoint import CONFIG
from storage.digests import sha256_file
from storage.layout import DTYPES, POOL_INDEX, ROWS_FILE
from storage.manifest import FileRecord, Span, TensorRecord
from storage.safetensors_file import weight_index

READ_BYTES = 1 << 24
DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
"""As configurations name them."""


@dataclass(frozen=True)
class PackTask:
    """One pool file, with the byte ranges of its spans in the order of the file; without any, the file as a whole."""

    path: Path
    spans: tuple[tuple[str, int, int], ...]
    """(tensor, first byte, bytes)"""


def digest_file(task: PackTask) -> list[tuple[str, str]]:
    """sha256 of each span: [(tensor, sha256)]; without spans, of the whole file: [("", sha256)]."""
    if not task.spans:
        return [("", sha256_file(task.path))]
    spans = []
    with task.path.open("rb") as file:
        for tensor, start, size in task.spans:
            file.seek(start)
            span = hashlib.sha256()
            left = size
            while left:
                data = file.read(min(left, READ_BYTES))
                if not data:
                    raise EOFError(f"{task.path} ends inside tensor {tensor}")
                span.update(data)
                left -= len(data)
            spans.append((tensor, span.hexdigest()))
    return spans


def _pack_task(job: Job, pool: Pool, name: str, tables: Mapping[str, RowTable]) -> PackTask:
    spans = []
    for slot in sorted(pool.files[name], key=lambda slot: pool.offsets[slot.name][1]):
        row_bytes = slot.shape[1] * DTYPES[slot.dtype].size
        for _, start, stop in tables[slot.name].spans():
            spans.append((slot.name, pool.offsets[slot.name][1] + start * row_bytes, (stop - start) * row_bytes))
    return PackTask(job.staged / name, tuple(spans))


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
        folder = job.staged / "experts" / name
        folder.mkdir(parents=True, exist_ok=True)
        held = {t.name: t.experts[name] for t in job.plan.tensors.values() if name in t.experts}
        save_file({t: tables[t].indices(position, info.rows) for t, info in held.items()}, folder / ROWS_FILE)
        for side, path in source.side.items():
            shutil.copyfile(path, folder / side)
        if CONFIG in source.side:
            _fit_config(folder / CONFIG, job, name)


def _fit_config(path: Path, job: Job, expert: str) -> None:
    """Make a configuration say what the export is: its type, its tokens, not quantised. What says so already stays as it is."""
    fields = json.loads(path.read_bytes())
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
    if fields != before:
        path.write_bytes(canonical_json(fields))


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
    pool_files: dict[str, FileRecord]
    bytes_read: int


def pack(job: Job, engine: Engine, pool: Pool) -> Packed:
    """Complete the staged folder, but for router, card and manifest."""
    tables = {name: RowTable.load(table_path(job.work / "tables", name)) for name in job.plan.tensors}
    # a file and its spans are two tasks: hashing is what takes the time, and goes on on two cores
    tasks = [PackTask(job.staged / name, ()) for name in pool.files]
    tasks += [_pack_task(job, pool, name, tables) for name in pool.files]
    receipts = engine.run("pack", digest_file, tasks, [*pool.files, *(f"spans of {name}" for name in pool.files)])
    digests: dict[str, list[str]] = {}
    for spans in receipts[len(pool.files) :]:
        for tensor, digest in spans:
            digests.setdefault(tensor, []).append(digest)
    _write_experts(job, tables)
    (job.staged / POOL_INDEX).write_bytes(canonical_json(weight_index(pool.files)))
    sizes = {name: (job.staged / name).stat().st_size for name in pool.files}
    return Packed(
        {name: _tensor_record(job, name, tables[name], digests[name]) for name in job.plan.tensors},
        {name: FileRecord(bytes=sizes[name], sha256=receipts[i][0][1]) for i, name in enumerate(pool.files)},
        2 * sum(sizes.values()),
    )
