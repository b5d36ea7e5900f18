"""What a plan will cost, before a byte of weight is fetched: transfers, store, artifact, blocks and memory. Pure sums.

Bounds from above: deltas are compressed and rows with equal bits are stored once, which headers do not show. Left out are
what the plan reads itself, and of the artifact its manifest, card and router.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pipeline import memory
from pipeline.drafting import is_tied
from pipeline.job import stored_base, stored_copies
from pipeline.kernels.methods.byom import kept_per_row
from pipeline.opening import Opened
from pipeline.plan import MergePlan, plan_blocks, pool_rows
from pipeline.recipe import AUTO, Recipe
from pipeline.roles import is_vocabulary
from storage.checkpoint import ADAPTER, Checkpoint
from storage.deltas import BINS, DIGEST_BYTES, base_group, expert_group, is_whole
from storage.layout import DTYPES
from storage.stores import open_store
from storage.tensors import BaseRows, FileRows, LowRank, TensorInfo, is_low_rank

INDEX_BYTES = 4
"""Of one channel's entry in an expert's row index, and of one column of a residue."""
NAMED_BYTES = 160
"""Beside its name, what a tensor takes in a header or an index, at most."""


@dataclass(frozen=True)
class SourceForecast:
    """One checkpoint."""

    label: str
    place: str
    kind: str
    """'checkpoint' or 'LoRA adapter'."""
    dtypes: Mapping[str, int]
    """Data type -> how many tensors of the checkpoint have it."""
    parameters: int
    """Entries of the model."""
    vocabulary: int | None
    """Rows of its embedding or LM head; None when it has neither."""
    tied: bool
    fetch: int
    """Bytes that will come over the network."""


@dataclass(frozen=True)
class Forecast:
    """A whole run."""

    sources: tuple[SourceForecast, ...]
    fetch: int
    """Bytes that will come over the network."""
    deltas: int
    """Bytes of the delta store before compression, tables included."""
    artifact: int
    """Bytes of pool, residues and row indices."""
    pool: int
    """Entries of pool and residues."""
    experts: int
    """Entries of all experts' checkpoints."""
    blocks: int
    """Tasks of a first run over all stages that read weights."""
    peak: int
    """Bytes the largest task will hold."""
    peak_tensor: str
    budget: int

    @property
    def ratio(self) -> float:
        return self.pool / self.experts if self.experts else 0.0


def fetched_bytes(infos: Sequence[TensorInfo], budget: int) -> int:
    """Bytes of one source's tensors that ingest reads from it, what is read twice counted twice."""
    total = 0
    named = {info.name: info for info in infos}
    for piece in (piece for block in plan_blocks(infos, memory.block_elements(budget, 1)) for piece in block.pieces):
        info = named[piece.tensor]
        row_bytes = info.width * DTYPES[info.dtype].size
        if isinstance(info.data, LowRank):
            whole = (info.data.a, info.data.b) if info.data.transposed else (info.data.a,)
            total += sum(factor.nbytes for factor in whole)
            total += (
                0 if info.data.transposed else (piece.stop - piece.start) * info.data.b.width * DTYPES[info.data.b.dtype].size
            )
        elif info.matrix_rows:
            total += (-(-piece.stop // info.matrix_rows) - piece.start // info.matrix_rows) * info.slab_bytes
        elif isinstance(info.data, FileRows):
            total += (piece.stop - piece.start) * row_bytes
    return total


def _fetch(
    checkpoint: Checkpoint, infos: Sequence[TensorInfo], budget: int, *, stored: bool, ties: Mapping[str, str] | None = None
) -> int:
    """Bytes of one source that come over the network: weights that are not in the store, and the files beside them."""
    if checkpoint.folder.is_local:
        return 0
    beside = sum(checkpoint.folder.file(name).size for name in checkpoint.side_files)
    if stored:
        return beside
    factors = {part for info in infos if isinstance(info.data, LowRank) for part in (info.data.a, info.data.b)}
    copies = sum(info.nbytes for pair in stored_copies(checkpoint, ties or {}) for info in pair)  # compared
    if checkpoint.is_adapter:  # it may hold copies of the base's tensors, which are compared with them
        held = sum(part.nbytes for part in factors) + sum(i.nbytes for i in infos if isinstance(i.data, FileRows))
        copies = max(checkpoint.folder.file(ADAPTER).size - held, 0)
    return beside + copies + fetched_bytes(infos, budget)


def _source(checkpoint: Checkpoint, fetch: int) -> SourceForecast:
    tensors = checkpoint.tensors.values()
    own = [info for info in tensors if not isinstance(info.data, BaseRows)] if checkpoint.is_adapter else list(tensors)
    dtypes: dict[str, int] = {}
    for info in own:
        kind = info.data.a.dtype if isinstance(info.data, LowRank) else info.dtype
        dtypes[kind] = dtypes.get(kind, 0) + 1
    rows = [info.rows for name, info in checkpoint.tensors.items() if is_vocabulary(name) and len(info.shape) > 1]
    return SourceForecast(
        checkpoint.label,
        checkpoint.folder.place,
        "LoRA adapter" if checkpoint.is_adapter else "checkpoint",
        dtypes,
        sum(info.rows * info.width for info in tensors),
        max(rows, default=None),
        is_tied(checkpoint),
        fetch,
    )


def _store_bytes(info: TensorInfo) -> int:
    """Bytes of one source's tensor in the delta store, before compression."""
    size = 4 if is_low_rank(info) else DTYPES[info.dtype].size
    chunks = -(-info.rows // info.chunk_rows)
    return info.rows * (info.width * size + DIGEST_BYTES + 8) + chunks * BINS * 4


def _pool_entries(recipe: Recipe, plan: MergePlan) -> dict[str, int]:
    """Tensor -> entries of its pool, at most; a budget bounds those whose K is chosen together."""
    count = len(plan.experts)
    rows = {tensor.name: pool_rows(tensor, count) for tensor in plan.tensors.values()}
    shared = {tensor.name: rows[tensor.name][0] * tensor.width for tensor in plan.tensors.values()}
    merged = [tensor for tensor in plan.merged if tensor.groups == AUTO]
    if recipe.merge.budget is not None and merged:
        everything = sum(tensor.base_rows * tensor.width for tensor in plan.merged) * count
        fixed = sum(shared[tensor.name] for tensor in plan.merged if tensor.groups != AUTO)
        allowed = max(int(recipe.merge.budget * everything) - fixed, 0)
        asked = sum(shared[tensor.name] for tensor in merged)
        for tensor in merged:
            shared[tensor.name] = min(shared[tensor.name], int(shared[tensor.name] * allowed / asked) + 1)
    return {tensor.name: shared[tensor.name] + rows[tensor.name][1] * tensor.width for tensor in plan.tensors.values()}


def _tables(recipe: Recipe) -> int:
    """Tables of pairs of a tensor's experts, at most: Gram matrices, or another beside them."""
    return 2 if recipe.merge.metric == "manhattan" or recipe.merge.clustering == "sign" else 1


def _artifact_bytes(plan: MergePlan, opened: Opened, entries: Mapping[str, int]) -> int:
    """Pool, row indices, headers and the files beside the weights, adapters' from their base where they have none."""
    tensors = plan.tensors.values()
    pool = sum(entries[tensor.name] * DTYPES[tensor.dtype].size for tensor in tensors)
    indices = sum(info.rows for tensor in tensors for info in tensor.experts.values()) * INDEX_BYTES
    named = sum(len(tensor.name.encode()) + NAMED_BYTES for tensor in tensors)
    beside = 0
    for expert in opened.experts.values():
        owners = (opened.base, expert) if expert.is_adapter else (expert,)
        sizes = {name: owner.folder.file(name).size for owner in owners for name in owner.side_files}
        beside += sum(sizes.values())
    return pool + indices + named * (2 + len(opened.experts)) + beside


def stage_blocks(plan: MergePlan, base: Iterable[TensorInfo]) -> dict[str, int]:
    """Tasks of every stage that reads weights, in a first run. ``base``: its tensors that are copied into the store."""
    one = memory.block_elements(plan.memory, 1)
    count = len(plan_blocks(base, one))
    for name in plan.experts:
        count += len(plan_blocks([t.experts[name] for t in plan.tensors.values() if name in t.experts], one))
    clustered = [tensor.base for tensor in plan.clustered if tensor.base is not None]
    return {"ingest": count, "similarity": len(plan.blocks(clustered)), "merge": len(plan.blocks(plan.tensors.values()))}


def forecast(recipe: Recipe, opened: Opened, plan: MergePlan) -> Forecast:
    """What carrying out the plan will move and hold."""
    deltas, count = open_store(recipe.deltas), len(plan.experts)
    base, base_id = opened.base, opened.base.folder.id
    copied = stored_base(base)
    whole = base_id is not None and is_whole(base_group(deltas, base_id), copied)
    sources = [_source(base, _fetch(base, list(copied.values()), plan.memory, stored=whole))]
    for name, expert in opened.experts.items():
        used = {tensor.name: tensor.experts[name] for tensor in plan.tensors.values() if name in tensor.experts}
        ids = (base_id, expert.folder.id)
        whole = None not in ids and is_whole(expert_group(deltas, str(ids[0]), str(ids[1])), used)
        sources.append(_source(expert, _fetch(expert, list(used.values()), plan.memory, stored=whole, ties=plan.ties[name])))
    store = sum(map(_store_bytes, copied.values()))
    store += sum(_store_bytes(info) for tensor in plan.tensors.values() for info in tensor.experts.values())
    store += sum(tensor.base_rows * count * count * 8 for tensor in plan.clustered) * _tables(recipe)
    entries = _pool_entries(recipe, plan)
    residue = residue_bytes = 0
    for tensor in plan.combined if recipe.merge.method == "byom" else ():
        kept = kept_per_row(recipe.merge.keep, tensor.width) * tensor.base_rows * count
        residue += kept
        residue_bytes += kept * (INDEX_BYTES + DTYPES[tensor.dtype].size) + 2 * count * (len(tensor.name) + NAMED_BYTES)
    peaks = {tensor.name: memory.peak(plan.memory, tensor, count) for tensor in plan.tensors.values()}
    worst = max(peaks, key=lambda name: peaks[name], default="")
    return Forecast(
        tuple(sources),
        sum(source.fetch for source in sources),
        store,
        _artifact_bytes(plan, opened, entries) + residue_bytes,
        sum(entries.values()) + residue,
        sum(source.parameters for source in sources[1:]),
        sum(stage_blocks(plan, copied.values()).values()),
        peaks.get(worst, 0),
        worst,
        plan.memory,
    )
