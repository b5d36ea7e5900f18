"""safetensors files whose layout is known before their bytes are: parts can be written in any order, by any process."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.layout import DTYPES


@dataclass(frozen=True)
class Slot:
    """The place of one tensor in a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * DTYPES[self.dtype].size


def header(slots: Sequence[Slot]) -> tuple[bytes, dict[str, int]]:
    """The file's first bytes and the offset of every tensor in the file. Pure.

    Wide types come first, so that every tensor is aligned to its entry size as safetensors' own writer does it.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position, places = 0, {}
    for slot in sorted(slots, key=lambda slot: (-DTYPES[slot.dtype].size, slot.name)):
        entries[slot.name] = {
            "dtype": slot.dtype,
            "shape": list(slot.shape),
            "data_offsets": [position, position + slot.nbytes],
        }
        places[slot.name] = position
        position += slot.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    prefix = struct.pack("<Q", len(text)) + text
    return prefix, {name: place + len(prefix) for name, place in places.items()}


def allocate(path: Path, slots: Sequence[Slot]) -> dict[str, int]:
    """Create the file with its header and its full size; the offset of every tensor."""
    prefix, places = header(slots)
    with path.open("wb") as file:
        file.write(prefix)
        file.truncate(len(prefix) + sum(slot.nbytes for slot in slots))
    return places


def write_at(path: Path, offset: int, values: NDArray[Any]) -> None:
    """Write raw values at a byte offset of an existing file."""
    data = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
    with path.open("r+b", buffering=0) as file:
        done = 0
        while done < len(data):
            done += os.pwrite(file.fileno(), data[done:], offset + done)


def shards(slots: Sequence[Slot], limit: int) -> list[list[Slot]]:
    """Deal tensors to files of at most ``limit`` bytes, in order, never splitting one. Pure."""
    groups: list[list[Slot]] = [[]]
    size = 0
    for slot in slots:
        if groups[-1] and size + slot.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(slot)
        size += slot.nbytes
    return groups


def shard_name(stem: str, number: int, count: int) -> str:
    """``<stem>-00001-of-0000M.safetensors``, counted from 1."""
    return f"{stem}-{number:05d}-of-{count:05d}.safetensors"


def weight_index(files: Mapping[str, Sequence[Slot]]) -> dict[str, Any]:
    """The index of a sharded checkpoint, as transformers writes it. Pure."""
    placed = {slot.name: name for name, slots in files.items() for slot in slots}
    total = sum(slot.nbytes for slots in files.values() for slot in slots)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
