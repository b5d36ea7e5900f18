"""Instant lookup (arXiv 2412.15283, Eq. 5): rebuild an expert by gathering its rows, and export it as a checkpoint."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.artifact import Artifact
from storage.atomic import canonical_json, sync
from storage.errors import OutputExistsError
from storage.layout import RESIDUE_FILE, ROWS_FILE, SHARD_BYTES, is_transposed
from storage.safetensors_file import Slot, allocate, shard_name, shards, weight_index, write_at


def expert_shape(artifact: Artifact, tensor: str, rows: NDArray[np.int32]) -> tuple[int, ...]:
    """The tensor's shape in this expert: where rows are the first axis, an expert may have other numbers of them."""
    record = artifact.manifest.tensors[tensor]
    is_fixed = record.channel_axis > 0 or (len(record.shape) < 2 and record.channel_axis == 0)
    return record.shape if is_fixed else (len(rows), *record.shape[1:])


Residue = tuple[NDArray[np.int32], NDArray[Any]]
"""Columns and raw bits of the entries an expert keeps beside the pool, (rows, count) each."""


def expert_tensor(artifact: Artifact, tensor: str, rows: NDArray[np.int32], residue: Residue | None = None) -> NDArray[Any]:
    """Raw bits of one tensor of an expert, given the pool rows of its channels; in the checkpoint's own shape.

    ``residue`` replaces entries of its first rows, if the expert keeps any.
    """
    bits = artifact.rows(tensor, rows)
    if residue is not None:
        columns, values = residue
        np.put_along_axis(bits[: len(columns)], columns.astype(np.int64), values, axis=1)
    shape, axis = expert_shape(artifact, tensor, rows), artifact.manifest.tensors[tensor].channel_axis
    if is_transposed(shape, axis):
        return np.ascontiguousarray(bits.reshape(*shape[:-2], shape[-1], shape[-2]).swapaxes(-1, -2))
    return bits.reshape(shape)


def export(artifact: Artifact, expert: str, target: Path) -> list[Path]:
    """Write an expert of an artifact, be it here or in an object store, as a plain Hugging Face checkpoint; return its files.

    The target appears whole or not at all. OutputExistsError when it exists and is not empty. An empty folder that
    exists is filled, config.json last: it may be somebody's working directory or a mount point.
    """
    artifact.check_expert(expert)
    target = target.resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise OutputExistsError(f"{target} exists and is not an empty folder. Choose another place for the export.")
    target.parent.mkdir(parents=True, exist_ok=True)
    inside = target.exists()
    partial = (target if inside else target.parent) / f".{target.name}.{uuid.uuid4().hex[:8]}.part"
    try:
        partial.mkdir()
        _write_weights(artifact, expert, partial)
        _write_side_files(artifact, expert, partial)
        if inside:
            for path in sorted(partial.iterdir(), key=lambda path: path.name == "config.json"):
                path.rename(target / path.name)
            partial.rmdir()
        else:
            partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync(target if inside else target.parent)
    return sorted(target.iterdir())


def _write_side_files(artifact: Artifact, expert: str, folder: Path) -> None:
    """The expert's configuration and tokenizer."""
    beside = f"experts/{expert}/"
    for name in artifact.manifest.files:
        own = name.removeprefix(beside)
        if name.startswith(beside) and own not in (ROWS_FILE, RESIDUE_FILE):
            (folder / own).parent.mkdir(parents=True, exist_ok=True)
            with artifact.damage_explained(name), (folder / own).open("wb") as file:
                file.writelines(artifact.pieces(name))


def _write_weights(artifact: Artifact, expert: str, folder: Path) -> None:
    """The expert's tensors, by its own names for them."""
    rows, residues = artifact.expert_rows(expert), artifact.residue(expert)
    tensors, own_names = artifact.manifest.tensors, artifact.manifest.experts[expert].renamed
    held = {own_names.get(name, name): name for name in tensors if name in rows}
    slots = [Slot(own, tensors[name].dtype, expert_shape(artifact, name, rows[name])) for own, name in held.items()]
    dealt = shards(slots, SHARD_BYTES)
    single = len(dealt) == 1
    files = {"model.safetensors" if single else shard_name("model", i, len(dealt)): group for i, group in enumerate(dealt, 1)}
    for file, group in files.items():
        places = allocate(folder / file, group)
        for slot in group:
            name = held[slot.name]
            write_at(folder / file, places[slot.name], expert_tensor(artifact, name, rows[name], residues.get(name)))
    if not single:
        (folder / "model.safetensors.index.json").write_bytes(canonical_json(weight_index(files)))
