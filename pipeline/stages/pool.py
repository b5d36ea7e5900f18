"""Where the rows of an artifact go while it is made: files of the pool, one per wave, and what experts keep for themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.job import Job
from pipeline.kernels.methods.byom import kept_per_row
from pipeline.plan import TensorPlan
from storage.layout import DTYPES, RESIDUE_FILE
from storage.local_store import LocalStore
from storage.parts import LocalRows, PartRows, part_key, part_starts
from storage.safetensors_file import Slot, allocate, header, shard_name
from storage.stores import Store


@dataclass(frozen=True)
class Target:
    """One tensor of a file under way."""

    file: str
    """Name of the file in the staged folder."""
    slot: Slot
    offset: int
    """First byte of the tensor in the file."""
    path: Path | None
    """The file, on a local disk."""
    parts: Store
    """Where parts go, elsewhere."""
    channels: int
    chunk_rows: int
    channel_bytes: int
    """Of a channel's rows in the pool, if every expert has one of its own."""

    @property
    def row_bytes(self) -> int:
        return self.slot.shape[1] * DTYPES[self.slot.dtype].size

    @cached_property
    def part_starts(self) -> NDArray[np.int64]:
        """First channels of the tensor's parts, known from the plan alone; none where rows go into the file itself."""
        if self.path is not None:
            return np.zeros(0, np.int64)
        return part_starts(self.channels, self.chunk_rows, self.channel_bytes)

    def open(self, start: int) -> LocalRows | PartRows:
        """Takes rows of the channels from ``start`` on, a part's first."""
        if self.path is not None:
            return LocalRows(self.path, self.offset, self.row_bytes)
        return PartRows(self.parts, part_key(self.file, self.slot.name, start))


@dataclass(frozen=True)
class ResidueTarget:
    """Where the entries go that one expert keeps of one tensor."""

    columns: Target
    values: Target

    @property
    def count(self) -> int:
        """Entries per row."""
        return self.columns.slot.shape[1]

    def open(self, start: int) -> tuple[LocalRows | PartRows, LocalRows | PartRows]:
        """Take columns and values of the channels from ``start`` on."""
        return self.columns.open(start), self.values.open(start)


@dataclass(frozen=True)
class Sheet:
    """A file under way: its tensors in the order of the file."""

    name: str
    targets: Mapping[str, Target]

    @property
    def slots(self) -> tuple[Slot, ...]:
        return tuple(target.slot for target in self.targets.values())

    @property
    def size(self) -> int:
        """Bytes of the finished file."""
        prefix, _ = header(self.slots)
        return len(prefix) + sum(slot.nbytes for slot in self.slots)

    def allocate(self) -> bool:
        """Give a local file its full size; False when it has it already, from an earlier run of the same work."""
        paths = {target.path for target in self.targets.values()} - {None}
        for path in paths:
            if path is not None and not (path.is_file() and path.stat().st_size == self.size):
                path.parent.mkdir(parents=True, exist_ok=True)
                allocate(path, self.slots)
                return True
        return False


def _sheet(job: Job, name: str, slots: Mapping[Slot, TensorPlan]) -> Sheet:
    _, offsets = header(tuple(slots))
    staged, parts = job.staged, job.work.under("parts")
    path = staged.path / name if isinstance(staged, LocalStore) else None
    targets = {}
    for slot in sorted(slots, key=lambda slot: offsets[slot.name]):
        tensor = slots[slot]
        channel_bytes = tensor.width * DTYPES[tensor.dtype].size * len(job.plan.experts)
        offset = offsets[slot.name]
        targets[slot.name] = Target(name, slot, offset, path, parts, tensor.rows, tensor.chunk_rows, channel_bytes)
    return Sheet(name, targets)


def pool_sheet(job: Job, wave: tuple[int, int], tensors: Sequence[TensorPlan], rows: Mapping[str, int]) -> Sheet:
    """The file of a wave's pool rows, once their numbers are known. ``wave``: its number, from 1, of how many."""
    slots = {Slot(tensor.name, tensor.dtype, (rows[tensor.name], tensor.width)): tensor for tensor in tensors}
    return _sheet(job, shard_name("pool", *wave), slots)


def residue_sheets(job: Job) -> dict[str, Sheet]:
    """Per expert the file of the entries that it keeps for itself; none where the method keeps none."""
    section = job.recipe.merge
    slots: dict[Slot, TensorPlan] = {}
    for tensor in job.plan.combined if section.method == "byom" else ():
        shape = (tensor.base_rows, kept_per_row(section.keep, tensor.width))
        slots[Slot(f"{tensor.name}.columns", "I32", shape)] = tensor
        slots[Slot(f"{tensor.name}.values", tensor.dtype, shape)] = tensor
    names = job.plan.experts if slots else ()
    return {name: _sheet(job, f"experts/{name}/{RESIDUE_FILE}", slots) for name in names}


def residue_targets(sheets: Mapping[str, Sheet], tensor: str) -> dict[str, ResidueTarget]:
    """Expert -> where the entries go that it keeps of a tensor."""
    held = {name: sheet.targets for name, sheet in sheets.items() if f"{tensor}.columns" in sheet.targets}
    return {name: ResidueTarget(t[f"{tensor}.columns"], t[f"{tensor}.values"]) for name, t in held.items()}
