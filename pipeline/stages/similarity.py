"""Similarity: one pass over the deltas for the Gram table, from which every clustering is computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray

from pipeline import memory
from pipeline.engine import Engine
from pipeline.job import Job
from pipeline.kernels.bits import cast, to_float
from pipeline.kernels.gram import gram
from pipeline.plan import Block, TensorPlan
from pipeline.stages.ingest import StageResult
from storage.arrays import ArrayGroup, ArraySpec, ChunkDigests
from storage.checkpoint import TensorInfo
from storage.deltas import expert_group, gram_group, restored


@dataclass(frozen=True)
class SimilarityTask:
    """Pieces of merged tensors."""

    table: Path
    groups: tuple[Path, ...]
    """Delta groups in the table's order of experts."""
    block: Block
    tensors: Mapping[str, tuple[TensorInfo, tuple[TensorInfo, ...]]]
    """Tensor -> the base's rows and the experts', in the table's order."""
    memory: int


def expert_bits(base: NDArray[Any], base_dtype: str, stored: NDArray[Any], dtype: str) -> NDArray[Any]:
    """An expert's rows in its own data type, from the base's and the stored differences."""
    return restored(cast(base, base_dtype, dtype), stored)


def table_order(job: Job) -> tuple[str, ...]:
    """Experts by id: a Gram table is the same whatever the experts are called."""
    return tuple(sorted(job.experts, key=lambda name: (job.experts[name].id, name)))


def similarity_block(task: SimilarityTask) -> tuple[ChunkDigests, int]:
    """Write the Gram matrices of a block's rows; chunk digests and bytes read."""
    table, groups = ArrayGroup(task.table), [ArrayGroup(path) for path in task.groups]
    chunks: ChunkDigests = {}
    read = 0
    for piece in task.block.pieces:
        base, infos = task.tensors[piece.tensor]
        for start in range(piece.start, piece.stop, base.chunk_rows):
            stop = min(start + base.chunk_rows, piece.stop)
            rows = base.read(start, stop)
            stored = [group.read(piece.tensor, start, stop) for group in groups]
            read += rows.nbytes + sum(part.nbytes for part in stored)
            out = np.empty((stop - start, len(groups), len(groups)))
            step = memory.slice_rows(task.memory, base.chunk_rows, base.width, len(groups))
            for first in range(0, stop - start, step):
                part = slice(first, first + step)
                reference = to_float(rows[part], base.dtype)
                deltas = [
                    to_float(expert_bits(rows[part], base.dtype, own[part], info.dtype), info.dtype) - reference
                    for own, info in zip(stored, infos, strict=True)
                ]
                out[part] = gram(torch.stack(deltas)).cpu().numpy()
            chunks.update(table.write(piece.tensor, start, out))
    return chunks, read


def _based(tensors: list[TensorPlan]) -> dict[str, TensorInfo]:
    return {tensor.name: tensor.base for tensor in tensors if tensor.base is not None}


def similarity(job: Job, engine: Engine) -> StageResult:
    """Bring the Gram table of these experts into the store, unless it is there."""
    order = table_order(job)
    table = gram_group(job.deltas, job.base.id, [job.experts[name].id for name in order])
    bases = _based(job.plan.merged)
    table.path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(table.path.with_name(f".{table.path.name}.lock")):
        ids = [job.experts[name].id for name in order]
        known: dict[str, Any] = table.record if table.complete else {"chunks": {}, "tensors": []}
        damaged = {key.split("/c/")[0] for key in table.missing_chunks()} if table.complete else set()
        wanted = {name: info for name, info in bases.items() if name not in known["tensors"] or name in damaged}
        if not wanted:
            return StageResult(0, 0, len(bases))
        count = len(order)
        specs = {n: ArraySpec((i.rows, count, count), "float64", i.chunk_rows, {}) for n, i in wanted.items()}
        if table.complete:  # another run may be reading it: its tensors stay as they are
            table.add(specs)
        else:
            table.create(specs, {"experts": ids})
        blocks = job.plan.blocks(wanted.values())
        groups = tuple(expert_group(job.deltas, job.base.id, identity).path for identity in ids)
        tasks = []
        for block in blocks:
            used = {}
            for piece in block.pieces:
                tensor = job.plan.tensors[piece.tensor]
                used[piece.tensor] = (wanted[piece.tensor], tuple(tensor.experts[name] for name in order))
            tasks.append(SimilarityTask(table.path, groups, block, used, job.plan.memory))
        receipts = engine.run("similarity", similarity_block, tasks, [block.label for block in blocks])
        chunks = {key: value for found, _ in receipts for key, value in found.items()}
        tensors = sorted({*known["tensors"], *wanted})
        table.finish({**known["chunks"], **chunks}, {"experts": ids, "tensors": tensors})
    return StageResult(sum(read for _, read in receipts), sum(size for size, _ in chunks.values()))
