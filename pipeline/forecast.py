"""What a plan will cost, before a byte of weight is fetched: transfers, store, artifact, blocks and memory. Pure sums.

Bounds from above: deltas are compressed and rows with equal bits are stored once, which headers do not show.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline import memory
from pipeline.kernels.methods.byom import kept_per_row
from pipeline.opening import Opened
from pipeline.plan import MergePlan, TensorPlan, plan_blocks
from pipeline.recipe import AUTO, Recipe
from pipeline.roles import is_vocabulary
from storage.checkpoint import Checkpoint
from storage.deltas import BINS, DIGEST_BYTES, base_group, expert_group
from storage.layout import DTYPES, is_transposed
from storage.tensors import BaseRows, FileRows, LowRank, TensorInfo, is_low_rank

INDEX_BYTES = 4
"""Of one channel's entry in an expert's row index, and of one column of a residue."""


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


def fetched_bytes(info: TensorInfo) -> int:
    """Bytes of a tensor that are read from its own source."""
    if isinstance(info.data, FileRows):
        return info.nbytes
    if isinstance(info.data, LowRank):
        return info.data.a.nbytes + info.data.b.nbytes
    return 0


def _source(checkpoint: Checkpoint, used: Iterable[TensorInfo], stored: bool) -> SourceForecast:
    tensors = checkpoint.tensors.values()
    own = [info for info in tensors if not isinstance(info.data, BaseRows)] if checkpoint.is_adapter else list(tensors)
    dtypes: dict[str, int] = {}
    for info in own:
        kind = info.data.a.dtype if isinstance(info.data, LowRank) else info.dtype
        dtypes[kind] = dtypes.get(kind, 0) + 1
    rows = [info.rows for name, info in checkpoint.tensors.items() if is_vocabulary(name) and len(info.shape) > 1]
    fetch = 0 if checkpoint.folder.is_local or stored else sum(map(fetched_bytes, used))
    return SourceForecast(
        checkpoint.label,
        checkpoint.folder.place,
        "LoRA adapter" if checkpoint.is_adapter else "checkpoint",
        dtypes,
        sum(info.rows * info.width for info in tensors),
        max(rows, default=None),
        checkpoint.tied,
        fetch,
    )


def pool_rows(tensor: TensorPlan, experts: int) -> int:
    """Rows of a tensor's pool, at most."""
    held = sum(info.rows for info in tensor.experts.values())
    if tensor.policy == "base":
        return tensor.base_rows
    if tensor.policy == "merge" and tensor.groups != AUTO:
        extra = sum(max(info.rows - tensor.base_rows, 0) for info in tensor.experts.values())
        return min(tensor.groups, experts) * tensor.base_rows + extra
    return held


def _store_bytes(info: TensorInfo) -> int:
    """Bytes of one source's tensor in the delta store, before compression."""
    size = 4 if is_low_rank(info) else DTYPES[info.dtype].size
    chunks = -(-info.rows // info.chunk_rows)
    return info.rows * (info.width * size + DIGEST_BYTES + 8) + chunks * BINS * 4


def _pool_entries(recipe: Recipe, plan: MergePlan) -> dict[str, int]:
    """Tensor -> entries of its pool, at most; a budget bounds those whose K is chosen together."""
    count = len(plan.experts)
    found = {tensor.name: pool_rows(tensor, count) * tensor.width for tensor in plan.tensors.values()}
    merged = [tensor for tensor in plan.merged if tensor.groups == AUTO]
    if recipe.merge.budget is not None and merged:
        everything = sum(tensor.base_rows * tensor.width for tensor in plan.merged) * count
        fixed = sum(found[tensor.name] for tensor in plan.merged if tensor.groups != AUTO)
        allowed = max(int(recipe.merge.budget * everything) - fixed, 0)
        asked = sum(found[tensor.name] for tensor in merged)
        for tensor in merged:
            found[tensor.name] = min(found[tensor.name], int(found[tensor.name] * allowed / asked) + 1)
    return found


def _blocks(plan: MergePlan, base: Iterable[TensorInfo]) -> int:
    """Tasks of ingest, similarity and merge in a first run."""
    one = memory.block_elements(plan.memory, 1)
    count = len(plan_blocks(base, one))
    for name in plan.experts:
        count += len(plan_blocks([t.experts[name] for t in plan.tensors.values() if name in t.experts], one))
    clustered = [tensor.base for tensor in plan.clustered if tensor.base is not None]
    return count + len(plan.blocks(clustered)) + len(plan.blocks(plan.tensors.values()))


def forecast(recipe: Recipe, opened: Opened, plan: MergePlan) -> Forecast:
    """What carrying out the plan will move and hold."""
    deltas, count = Path(recipe.deltas), len(plan.experts)
    base_id = opened.base.folder.id
    needed = {tensor.base.data: tensor.base for tensor in plan.tensors.values() if tensor.base is not None}
    copied = [
        info for info in needed.values() if not opened.base.folder.is_local or is_transposed(info.shape, info.channel_axis)
    ]
    stored = base_id is not None and base_group(deltas, base_id).complete
    sources = [_source(opened.base, needed.values(), stored)]
    for name, expert in opened.experts.items():
        used = [tensor.experts[name] for tensor in plan.tensors.values() if name in tensor.experts]
        known = base_id is not None and expert.folder.id is not None
        sources.append(_source(expert, used, known and expert_group(deltas, str(base_id), str(expert.folder.id)).complete))
    store = sum(map(_store_bytes, copied))
    store += sum(_store_bytes(info) for tensor in plan.tensors.values() for info in tensor.experts.values())
    store += sum(tensor.base_rows * count * count * 8 for tensor in plan.clustered)
    entries = _pool_entries(recipe, plan)
    pool_bytes = sum(entries[tensor.name] * DTYPES[tensor.dtype].size for tensor in plan.tensors.values())
    indices = sum(info.rows for tensor in plan.tensors.values() for info in tensor.experts.values()) * INDEX_BYTES
    residue = residue_bytes = 0
    for tensor in plan.combined if recipe.merge.method == "byom" else ():
        kept = kept_per_row(recipe.merge.keep, tensor.width) * tensor.base_rows * count
        residue += kept
        residue_bytes += kept * (INDEX_BYTES + DTYPES[tensor.dtype].size)
    peaks = {tensor.name: memory.peak(plan.memory, tensor, count) for tensor in plan.tensors.values()}
    worst = max(peaks, key=lambda name: peaks[name], default="")
    return Forecast(
        tuple(sources),
        sum(source.fetch for source in sources),
        store,
        pool_bytes + indices + residue_bytes,
        sum(entries.values()) + residue,
        sum(source.parameters for source in sources[1:]),
        _blocks(plan, copied),
        peaks.get(worst, 0),
        worst,
        plan.memory,
    )
