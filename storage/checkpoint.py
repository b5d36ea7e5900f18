"""Hugging Face checkpoints in a local folder: what is in them, and rows of their tensors as raw bits.

Only safetensors headers are parsed here and only byte ranges are read, so no framework is imported and a tensor of
any size costs no more memory than the rows asked for.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.errors import CheckpointError
from storage.layout import DTYPES, as_rows, chunk_rows

MAX_HEADER_BYTES = 100_000_000
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
SIDE_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja",
    "chat_template.json", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
"""Files beside the weights that an exported expert needs to load: configuration and tokenizer."""


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies."""

    name: str
    dtype: str
    """As in the header, for example BF16."""
    shape: tuple[int, ...]
    path: Path
    offset: int
    """First byte of the tensor in the file."""

    @property
    def rows(self) -> int:
        return as_rows(self.shape)[0]

    @property
    def width(self) -> int:
        return as_rows(self.shape)[1]

    @property
    def chunk_rows(self) -> int:
        """Rows of a chunk of the delta store."""
        return chunk_rows(self.rows, self.width)

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Rows [start, stop) as raw bits: (stop - start, width), unsigned integers of the tensor's entry size."""
        dtype = DTYPES[self.dtype]
        row_bytes = self.width * dtype.size
        wanted = (stop - start) * row_bytes
        bits = np.empty((stop - start, self.width), dtype.bits)
        view, done = bits.reshape(-1).view(np.uint8).data, 0
        with self.path.open("rb", buffering=0) as file:
            while done < wanted:
                got = os.preadv(file.fileno(), [view[done:]], self.offset + start * row_bytes + done)
                if got == 0:
                    raise CheckpointError(
                        f"{self.path}: tensor {self.name}: the file ends inside rows {start} to {stop}; it changed since "
                        "it was planned. Run again."
                    )
                done += got
        return bits


def padded_rows(info: TensorInfo | None, start: int, stop: int, like: TensorInfo) -> tuple[NDArray[Any], str]:
    """Rows [start, stop) as raw bits, 0 where the tensor has no such row, and their data type.

    A tensor that does not exist at all is rows of 0 in the shape and type of ``like``.
    """
    dtype = (info or like).dtype
    if info is not None and stop <= info.rows:
        return info.read(start, stop), dtype
    out = np.zeros((stop - start, like.width), DTYPES[dtype].bits)
    if info is not None and start < info.rows:
        rows = info.read(start, min(stop, info.rows))
        out[: len(rows)] = rows
    return out, dtype


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose headers have been read and found sound."""

    label: str
    """How errors name it: 'base' or 'expert math'."""
    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    files: tuple[str, ...]
    """Names, relative to the folder, of all files that determine the result: weights, config, tokenizer."""

    @property
    def tied(self) -> bool:
        """Whether the expert's own configuration ties its LM head to its embedding."""
        return bool(self.config.get("tie_word_embeddings", False))


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(size, int) and size >= 0 for size in value)


def _entry_problem(name: str, entry: Any) -> str | None:
    """What is wrong with one header entry, if anything. A type that is not known here is the plan's to refuse."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        return f"tensor {name}: its header entry lacks dtype, shape or data_offsets"
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape):
        return f"tensor {name}: impossible shape {shape}"
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"tensor {name}: impossible byte range {offsets}"
    dtype = DTYPES.get(str(entry["dtype"]))
    expected = int(np.prod(shape, dtype=np.int64)) * (dtype.size if dtype else 0)
    if dtype and offsets[1] - offsets[0] != expected:
        return f"tensor {name}: {entry['dtype']} {shape} needs {expected} bytes, the header gives {offsets[1] - offsets[0]}"
    return None


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file. CheckpointError when the file is torn or its header is not sound."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if length < 2 or length > min(MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(
                f"{path}: not a whole safetensors file: expected a header of 2 to {max(size - 8, 0)} bytes, got {length}. "
                "Download or save the file again."
            )
        raw = file.read(length)
    try:
        header = json.loads(raw)
        if not isinstance(header, dict):
            raise ValueError("the header is no JSON object")
    except ValueError as error:
        raise CheckpointError(f"{path}: its safetensors header cannot be read ({error}). Save the file again.") from None
    header.pop("__metadata__", None)
    problems = [problem for name, entry in header.items() if (problem := _entry_problem(name, entry))]
    spans = sorted(tuple(entry["data_offsets"]) for entry in header.values()) if not problems else []
    if any(left[1] > right[0] for left, right in pairwise(spans)):
        problems.append("the bytes of two tensors overlap")
    if spans and spans[-1][1] != size - 8 - length:
        problems.append(f"its tensors need {spans[-1][1]} bytes of data, the file has {size - 8 - length} (is it torn?)")
    if problems:
        raise CheckpointError.listing(f"{path} is damaged and must be saved or downloaded again", problems)
    return {
        name: TensorInfo(name, entry["dtype"], tuple(entry["shape"]), path, 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def _weight_files(label: str, folder: Path) -> list[str]:
    """Names of the safetensors files of a checkpoint, from its index where it has one."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{label}: {index} cannot be read ({error!r}). Save the checkpoint again.") from None
        bad = [name for name in names if not isinstance(name, str) or Path(name).name != name]
        if bad:
            raise CheckpointError(f"{label}: {index} names files outside its folder: {bad}. Refused.")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(f"{label}: {folder} lacks shards its index names: {', '.join(missing)}. Complete the copy.")
        return names
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if names:
        return names
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{label}: {folder} has no safetensors, only pickles ({', '.join(pickles)}), which are never opened. "
            "Convert it: load it with transformers and save_pretrained(..., safe_serialization=True)."
        )
    raise CheckpointError(f"{label}: {folder} has no *.safetensors file. Give the folder of a Hugging Face checkpoint.")


def open_checkpoint(label: str, folder: Path) -> Checkpoint:
    """Read config and headers of a local checkpoint. CheckpointError lists all that is wrong with it."""
    if not folder.is_dir():
        raise CheckpointError(f"{label}: there is no directory {folder}. Correct the path in the recipe.")
    problems: list[str] = []
    config: dict[str, Any] = {}
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except FileNotFoundError:
        problems.append(f"{folder} has no config.json; is it a checkpoint's folder?")
    except ValueError as error:
        problems.append(f"{folder / 'config.json'} is no JSON ({error})")
    if not isinstance(config, dict):
        problems.append(f"{folder / 'config.json'}: expected a JSON object, got {str(config)[:40]}")
    tensors: dict[str, TensorInfo] = {}
    weights: list[str] = []
    try:
        weights = _weight_files(label, folder)
    except CheckpointError as error:
        problems.append(str(error).removeprefix(f"{label}: "))
    for name in weights:
        try:
            found = read_header(folder / name)
        except CheckpointError as error:
            problems.extend([str(error)])
            continue
        twice = sorted(found.keys() & tensors.keys())
        if twice:
            problems.append(f"tensors stored in two shards: {', '.join(twice)}")
        tensors.update(found)
    if problems:
        raise CheckpointError.listing(label, problems)
    side = [name for name in SIDE_FILES if (folder / name).is_file()]
    index = [name for name in ("model.safetensors.index.json",) if (folder / name).is_file()]
    return Checkpoint(label, folder, config, tensors, tuple(sorted(side + index + weights)))
