"""Hugging Face checkpoints wherever they lie: what is in them, judged from configs and safetensors headers alone.

Only headers are parsed and only byte ranges are read, so no framework is imported, nothing is downloaded as a whole and a
tensor of any size costs no more memory than the rows asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from storage.adapters import ADAPTER_CONFIG, adapter_notes, adapter_tensors, check_base_copies
from storage.errors import CheckpointError
from storage.files import Folder, read_whole
from storage.headers import read_header
from storage.layout import DTYPES
from storage.tensors import TensorInfo

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
ADAPTER = "adapter_model.safetensors"
MAX_JSON_BYTES = 100_000_000
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
SIDE_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja",
    "chat_template.json", "spiece.model", "sentencepiece.bpe.model", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
"""Files beside the weights that an exported expert needs to load: configuration and tokenizer."""
DEQUANTISE = (
    "Use the checkpoint it was quantised from, or write one in bf16: from_pretrained(...).dequantize() and save_pretrained(...)"
)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose headers have been read and found sound."""

    label: str
    """How errors name it: 'base' or 'expert math'."""
    folder: Folder
    config: Mapping[str, Any]
    """The model's; of an adapter, its base's."""
    tensors: Mapping[str, TensorInfo]
    files: tuple[str, ...]
    """Names of all files that determine the result: weights, config, tokenizer."""
    notes: tuple[str, ...] = ()
    is_adapter: bool = False
    """Whether it is a LoRA adapter, which needs its base's rows and files."""

    @property
    def tied(self) -> bool | None:
        """Whether its own configuration ties its LM head to its embedding; None when it leaves that to the model's default."""
        told = self.config.get("tie_word_embeddings", _text_config(self.config).get("tie_word_embeddings"))
        return None if told is None else bool(told)

    @property
    def side_files(self) -> tuple[str, ...]:
        """Those of its files that an exported expert needs beside its weights."""
        return tuple(name for name in self.files if name in SIDE_FILES)


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a multimodal configuration."""
    found = config.get("text_config")
    return found if isinstance(found, dict) else {}


def read_json(folder: Folder, name: str) -> dict[str, Any]:
    """A JSON object of a source. CheckpointError when it is none."""
    file = folder.file(name)
    try:
        found = json.loads(read_whole(file, MAX_JSON_BYTES))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file.place} is no JSON ({error}). Save or download it again.") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{file.place}: expected a JSON object, got {str(found)[:40]}. Save or download it again.")
    return found


def _indexed_files(folder: Folder) -> dict[str, list[str]]:
    """File -> the tensors it holds, by the index of a checkpoint of several files."""
    place = folder.file(INDEX).place
    placed = read_json(folder, INDEX).get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(name, str) for name in placed.values()):
        raise CheckpointError(f"{place}: expected a weight_map from tensors to files. Save or download it again.")
    files: dict[str, list[str]] = {}
    for tensor, name in placed.items():
        files.setdefault(name, []).append(tensor)
    outside = sorted(name for name in files if name.startswith(".") or "/" in name or "\\" in name or not name)
    if outside:
        raise CheckpointError(f"{place}: it names files outside its folder: {', '.join(map(repr, outside))}. Refused.")
    missing = sorted(files.keys() - folder.names)
    if missing:
        gone = [f"{name} (with {files[name][0]} and {len(files[name]) - 1} other tensors)" for name in missing]
        raise CheckpointError(f"{place}: it names shards that are not there: {', '.join(gone)}. Complete the copy.")
    return files


def _weight_files(folder: Folder) -> dict[str, list[str]]:
    """File -> the tensors its index says it holds; nothing is said of a file without an index."""
    names = folder.names
    if SINGLE in names:  # as transformers does, also where an index of other files lies beside it
        return {SINGLE: []}
    if INDEX in names:
        return _indexed_files(folder)
    found = sorted(name for name in names if name.endswith(".safetensors") and name != ADAPTER)
    if found:
        return {name: [] for name in found}
    place = folder.place
    if any(name.endswith(".gguf") for name in names):
        raise CheckpointError(f"{place} holds GGUF files, which are quantised, and no safetensors. {DEQUANTISE}.")
    pickles = sorted(name for name in names if any(fnmatch(name, pattern) for pattern in PICKLES))
    if pickles:
        raise CheckpointError(
            f"{place} has no safetensors, only pickles ({', '.join(pickles)}), which are never opened. "
            "Convert it: load it with transformers and save_pretrained(..., safe_serialization=True)."
        )
    raise CheckpointError(f"{place} has no *.safetensors file. Give the folder of a Hugging Face checkpoint.")


def _header_of(folder: Folder, name: str) -> dict[str, TensorInfo]:
    return read_header(folder.file(name))


def _read_tensors(folder: Folder, files: Mapping[str, list[str]]) -> tuple[dict[str, TensorInfo], list[str]]:
    """The tensors of some files, and what is wrong with them."""
    tensors: dict[str, TensorInfo] = {}
    problems: list[str] = []
    holders: dict[str, str] = {}
    with ThreadPoolExecutor(min(8, len(files))) as pool:  # each may be a request
        headers = {name: pool.submit(_header_of, folder, name) for name in files}
    for name, header in headers.items():
        try:
            found = header.result()
        except CheckpointError as error:
            problems.append(str(error))
            continue
        twice = sorted(found.keys() & tensors.keys())
        problems += [f"tensor {tensor}: it is stored in two files, {holders[tensor]} and {name}; keep one" for tensor in twice]
        lost = sorted(set(files[name]) - found.keys())
        problems += [
            f"{name}: tensor {tensor}: the index says it is there, and it is not; complete the copy" for tensor in lost
        ]
        tensors.update(found)
        holders |= dict.fromkeys(found, name)
    return tensors, problems


def _quantised(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> tuple[str | None, str | None]:
    """Whether weights are quantised: (problem, note).

    Merged models often keep the configuration of the quantised base they were trained on, with weights that are not
    quantised: what their types are decides.
    """
    told = config.get("quantization_config") or config.get("compression_config")
    packed = sorted(n for n, info in tensors.items() if info.dtype not in DTYPES or not DTYPES[info.dtype].mergeable)
    by_name = sorted(name for name in tensors if name.endswith((".qweight", ".quant_state.bitsandbytes__nf4", ".SCB")))
    if told is None and not by_name:
        return None, None
    method = told.get("quant_method", told.get("quant_algo", "unknown")) if isinstance(told, dict) else "unknown"
    if by_name or packed:
        first = (by_name or packed)[0]
        what = f"quantization_config of method {method!r}" if told else "names of a quantised model"
        return (
            f"its weights are quantised ({what}, tensor {first} is {tensors[first].dtype}) and cannot be merged. {DEQUANTISE}",
            None,
        )
    return None, f"config.json names a quantisation ({method}), but no weight is quantised: exports leave that entry out"


def open_checkpoint(label: str, folder: Folder, base: Checkpoint | None = None) -> Checkpoint:
    """Read config and headers of a checkpoint, or of a LoRA adapter of ``base``. CheckpointError lists all that is wrong."""
    names = folder.names
    if ADAPTER_CONFIG in names and not {SINGLE, INDEX} & names:
        return _open_adapter(label, folder, base)
    problems: list[str] = []
    config: dict[str, Any] = {}
    files: dict[str, list[str]] = {}
    tensors: dict[str, TensorInfo] = {}
    try:
        if CONFIG not in names:
            raise CheckpointError(f"{folder.place} has no {CONFIG}; is it a checkpoint's folder?")
        config = read_json(folder, CONFIG)
    except CheckpointError as error:
        problems.append(str(error))
    try:
        files = _weight_files(folder)
        tensors, found = _read_tensors(folder, files)
        problems += found
    except CheckpointError as error:
        problems.append(str(error))
    problem, note = _quantised(config, tensors)
    if problem:
        problems.append(problem)
    if problems:
        raise CheckpointError.listing(label, problems)
    notes = [note] if note else []
    if {SINGLE, INDEX} <= names:
        notes.append(f"{folder.place} holds {SINGLE} and an index of other files; {SINGLE} is used, as transformers does")
    if ADAPTER_CONFIG in names:
        notes.append(f"{folder.place} holds a whole model and an adapter; the model is used")
    if folder.is_local and folder.id is not None and not any("token" in name or name.startswith("vocab") for name in names):
        notes.append(f"{folder.place}: offline, and the cache holds no tokenizer of it")
    used = {name for name in SIDE_FILES if name in names} | ({INDEX} & names) | files.keys()
    return Checkpoint(label, folder, config, tensors, tuple(sorted(used)), tuple(f"{label}: {text}" for text in notes))


def _open_adapter(label: str, folder: Folder, base: Checkpoint | None) -> Checkpoint:
    if base is None:
        raise CheckpointError(
            f"{label}: {folder.place} is a LoRA adapter; expected a whole model. Give the model it was trained on."
        )
    if ADAPTER not in folder.names:
        raise CheckpointError(
            f"{label}: {folder.place} has {ADAPTER_CONFIG} but no {ADAPTER}; pickles (adapter_model.bin) are never opened. "
            "Load it with peft and save it again."
        )
    config = read_json(folder, ADAPTER_CONFIG)
    stored, problems = _read_tensors(folder, {ADAPTER: []})
    if problems:
        raise CheckpointError.listing(label, problems)
    tensors = adapter_tensors(label, config, stored, base.tensors)
    notes = tuple(f"{label}: {note}" for note in adapter_notes(config, base.folder.place, tensors))
    side = {name for name in SIDE_FILES if name in folder.names} - {CONFIG}
    files = tuple(sorted({ADAPTER, ADAPTER_CONFIG} | side))
    return Checkpoint(label, folder, base.config, tensors, files, notes, is_adapter=True)


def check_adapter(label: str, folder: Folder, base: Mapping[str, TensorInfo]) -> None:
    """Compare what an adapter copied of its base with this base, which reads weights. CheckpointError when they differ."""
    check_base_copies(label, read_header(folder.file(ADAPTER)), base)
