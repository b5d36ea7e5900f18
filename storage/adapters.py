"""PEFT LoRA adapters read as experts: which factors belong to which tensor of the base (arXiv 2106.09685; peft 0.21).

An adapter is ``adapter_config.json`` beside ``adapter_model.safetensors``. What peft's ``PeftModel.from_pretrained(base,
adapter).merge_and_unload()`` would hold is described here tensor by tensor; nothing is computed and no weight is read, but by
``check_base_copies``. An adapter that means more than ``base + scale * (B A)`` is refused, never approximated.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.adapter_settings import (
    ADAPTER_CONFIG,
    EMBEDDING,
    MERGE,
    Settings,
    adapter_notes,
    is_in,
    is_tied,
    read_settings,
    variant_problems,
)
from storage.errors import CheckpointError
from storage.layout import DTYPES, is_transposed
from storage.tensors import BaseRows, LowRank, TensorInfo

__all__ = ["ADAPTER_CONFIG", "PREFIX", "adapter_notes", "adapter_tensors", "check_base_copies"]

PREFIX = "base_model.model."
"""What peft puts before the names of the model it wraps."""

_OTHER_BASE = "Give the base that the adapter was trained on"
_AGAIN = "Save the adapter again with peft"

_FACTOR = re.compile(r"(.+)\.lora_([AB])(?:\.[^.]+)?\.weight")
_EMBEDDING_FACTOR = re.compile(r"(.+)\.lora_embedding_([AB])(?:\.[^.]+)?")
_SAVED = re.compile(r"(.+)\.modules_to_save\.(.+)")
_ORIGINAL = re.compile(r"(.+)\.original_module\.(.+)")
_COPY = re.compile(r"(.+)\.base_layer\.weight")
_FOREIGN = re.compile(r"(?:^|\.)(?:lora_\w+|token_adapter|base_layer)(?:\.|$)")
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out)(?:\.weight)?$")

_Problems = dict[str, list[str]]
"""For every kind of problem, a sentence with a place for examples: the examples."""

_UNTIE = "Merge the adapter with peft, untie the merged model (config.tie_word_embeddings = False) and give it as the expert"
_MISSING = f"target modules that the base does not have: {{}}. {_OTHER_BASE}"
_TIED = (
    "a LM head of its own, {}, which the base does not have: a base that ties its head to its embedding stores no head, and an "
    f"expert of it cannot hold two different ones. {_UNTIE}"
)
_LEFT = (
    "an embedding of its own, {}, for a base that ties others to it and stores them once: peft trains a copy and leaves the "
    f"LM head at the base's weights, and an expert of this base cannot hold two different ones. {_UNTIE}"
)
_HALF = f"an A without B or a B without A: {{}}. The file is not whole: {_AGAIN.lower()} or download it again"
_TWICE = f"two tensors of the adapter for the same tensor of the base: {{}}. {_AGAIN}, one adapter in a folder"
_AMBIGUOUS = f"names that fit several tensors of the base: {{}}. {MERGE}"
_UNKNOWN = f"tensors that are not understood: {{}}. {MERGE}"
_SHAPES = f"factors that do not fit the base: {{}}. {_OTHER_BASE}; when its vocabulary was resized, merge the adapter with peft"
_RANKS = f"ranks that differ from {ADAPTER_CONFIG}: {{}}. Restore the {ADAPTER_CONFIG} that was saved beside these tensors"
_DTYPES = f"factors of a data type that is not read (expected BF16, F16 or F32): {{}}. {_AGAIN} in one of these types"
_QUANTISED = "targets whose base is no BF16, F16 or F32: {}. Give the base without quantisation"
_COPIES = (
    f"the adapter's own copies of tensors, which should be equal to them: {{}}. {_OTHER_BASE}; when its vocabulary was "
    "resized, merge the adapter with peft; else save it again with save_pretrained(..., save_embedding_layers=False)"
)
_UNSAVED = (
    f"modules_to_save without a tensor in the adapter: {{}}. The file is not whole: {_AGAIN.lower()} or download it again"
)


@dataclass
class _Parts:
    """The stored tensors by what they are; names without peft's own parts."""

    factors: dict[tuple[str, bool], dict[str, TensorInfo]] = field(default_factory=dict)
    """By module and whether they are an embedding's: A and B."""
    whole: dict[str, TensorInfo] = field(default_factory=dict)
    originals: dict[str, TensorInfo] = field(default_factory=dict)
    """What modules to save were before training. Peft saves them of a resized vocabulary, and merging drops them."""
    copies: dict[str, TensorInfo] = field(default_factory=dict)
    """Of the base's tensors, beside factors."""


def _finder(base: Mapping[str, TensorInfo]) -> Callable[[str], list[str]]:
    """A function from a name without peft's prefix to the base's names it may mean: one exactly, else by dotted suffix."""
    by_suffix: dict[str, list[str]] = defaultdict(list)
    for name in base:
        parts = name.split(".")
        for start in range(1, len(parts) - 1):
            by_suffix[".".join(parts[start:])].append(name)

    def find(name: str) -> list[str]:
        if name in base:
            return [name]
        parts = name.split(".")
        shorter = [suffix for start in range(1, len(parts) - 1) if (suffix := ".".join(parts[start:])) in base]
        return by_suffix.get(name, []) + shorter

    return find


def _saved_name(name: str, find: Callable[[str], list[str]]) -> str:
    """The name of a tensor of ``modules_to_save``, whose key may hold these words and after them the adapter's name."""
    match = _SAVED.fullmatch(name)
    if not match:
        return name
    module, rest = match.groups()
    adapter, _, inner = rest.partition(".")
    without = f"{module}.{inner}"
    return without if inner and (adapter == "default" or find(without)) else f"{module}.{rest}"


def _parts(stored: Mapping[str, TensorInfo], find: Callable[[str], list[str]], problems: _Problems) -> _Parts:
    """The stored tensors by what they are; those that fit no form become problems."""
    parts = _Parts()
    for key, info in sorted(stored.items()):
        name = key.removeprefix(PREFIX)
        factor, embedding = _FACTOR.fullmatch(name), _EMBEDDING_FACTOR.fullmatch(name)
        if match := factor or embedding:
            sides = parts.factors.setdefault((match[1], factor is None), {})
            if match[2] in sides:
                problems[_TWICE].append(f"{key} and {sides[match[2]].name}")
            sides[match[2]] = info
        elif match := _COPY.fullmatch(name):
            parts.copies[f"{match[1]}.weight"] = info
        elif match := _ORIGINAL.fullmatch(name):
            parts.originals[".".join(match.groups())] = info
        elif _FOREIGN.search(whole := _saved_name(re.sub(r"\.base_layer\.bias$", ".bias", name), find)):
            problems[_UNKNOWN].append(key)
        else:
            if (other := parts.whole.get(whole)) and not (whole == name and _is_saved_twice(other, info)):
                problems[_TWICE].append(f"{other.name} and {key}")
            parts.whole[whole] = info
    problems[_UNKNOWN] += [info.name for name, info in parts.originals.items() if name not in parts.whole]
    return parts


def _is_saved_twice(inner: TensorInfo, plain: TensorInfo) -> bool:
    """Whether it is the one tensor that peft saves as ``X.modules_to_save.weight`` too when the vocabulary was resized.

    The plain one comes later in order of names, and is the one that peft reads.
    """
    return bool(_SAVED.fullmatch(inner.name)) and (inner.dtype, inner.shape) == (plain.dtype, plain.shape)


def _one(name: str, key: str, find: Callable[[str], list[str]], problems: _Problems, missing: str | None) -> str | None:
    """The base's name for a name of the adapter; None with a problem noted (when it is missing, of the kind given)."""
    found = find(name)
    if len(found) == 1:
        return found[0]
    if found:
        problems[_AMBIGUOUS].append(f"{key} ({', '.join(sorted(found)[:3])})")
    elif _HEAD.search(name):
        problems[_TIED].append(key)
    elif missing:
        problems[missing].append(key)
    return None


def _misfit(a: TensorInfo, b: TensorInfo, target: TensorInfo, embedding: bool) -> str | None:
    """How the factors' shapes do not fit, if they do not."""
    outer, inner = (target.width, target.rows) if embedding else (target.rows, target.width)
    rank = a.shape[0] if a.shape else 0
    if len(target.shape) == 2 and rank > 0 and a.shape == (rank, inner) and b.shape == (outer, rank):
        return None
    return (
        f"{target.name} {list(target.shape)}: expected A [rank, {inner}] and B [{outer}, rank], "
        f"got A {list(a.shape)} and B {list(b.shape)}"
    )


def _low_rank(
    module: str, embedding: bool, sides: Mapping[str, TensorInfo], target: TensorInfo, settings: Settings, problems: _Problems
) -> TensorInfo | None:
    """The expert's tensor of one target module; None with problems noted."""
    a, b = sides["A"], sides["B"]
    if not _is_read(target):  # before its shape, which packing changes
        problems[_QUANTISED].append(f"{target.name} ({target.dtype})")
        return None
    if (misfit := _misfit(a, b, target, embedding)) is not None:
        problems[_SHAPES].append(misfit)
        return None
    rank, expected = a.shape[0], settings.rank_of(module)
    if expected not in (None, rank):
        problems[_RANKS].append(f"{module}: expected {expected}, got {rank}")
    if strange := [f"{info.name} ({info.dtype})" for info in (a, b) if not _is_read(info)]:
        problems[_DTYPES].extend(strange)
    return replace(target, data=LowRank(a, b, settings.scale(module, rank), transposed=embedding))


def _is_read(info: TensorInfo) -> bool:
    return info.dtype in DTYPES and DTYPES[info.dtype].mergeable


def _targets(
    parts: _Parts, settings: Settings, base: Mapping[str, TensorInfo], find: Callable[[str], list[str]], problems: _Problems
) -> dict[str, TensorInfo]:
    """The expert's tensors that are the base's plus a delta, by the base's names."""
    found: dict[str, TensorInfo] = {}
    for (module, embedding), sides in parts.factors.items():
        if len(sides) < 2:
            problems[_HALF].extend(info.name for info in sides.values())
        name = _one(f"{module}.weight", module, find, problems, _MISSING)
        if name is None or len(sides) < 2:
            continue
        if name in found:
            problems[_TWICE].append(f"{module} for {name}")
        if info := _low_rank(module, embedding, sides, base[name], settings, problems):
            found[name] = info
    matrices = [info for info in found.values() if isinstance(info.data, LowRank) and not info.data.transposed]
    if settings.fan_in_fan_out and matrices and not any(is_transposed(info.shape, info.channel_axis) for info in matrices):
        problems[_SHAPES].append(
            f"fan_in_fan_out in {ADAPTER_CONFIG} means weights stored (in, out), the base's {matrices[0].name} is (out, in)"
        )
    return found


def _tied_twin(name: str, parts: _Parts) -> TensorInfo | None:
    """The embedding that a head, saved beside it because the vocabulary was resized, is a copy of when the base ties both."""
    head = parts.whole[name]
    return next(
        (
            info
            for other, info in parts.whole.items()
            if _HEAD.search(name) and EMBEDDING.search(other) and (info.dtype, info.shape) == (head.dtype, head.shape)
        ),
        None,
    )


def _own(
    parts: _Parts, settings: Settings, base: Mapping[str, TensorInfo], find: Callable[[str], list[str]], problems: _Problems
) -> dict[str, TensorInfo]:
    """Tensors that the adapter holds whole, by the base's names, or by their own where the base has none."""
    found: dict[str, TensorInfo] = {}
    for whole, info in parts.whole.items():
        declared = settings.saves(whole)
        if not declared and not find(whole) and _tied_twin(whole, parts):
            continue
        is_new = declared and not find(whole) and not _HEAD.search(whole)
        name = whole if is_new else _one(whole, info.name, find, problems, _UNKNOWN)
        if name is None:
            continue
        if name in found:
            problems[_TWICE].append(f"{info.name} for {name}")
        found[name] = replace(info, name=name, channel_axis=base[name].channel_axis if name in base else info.channel_axis)
    for entry in settings.modules_to_save or ():
        if any(is_in(name, entry) for name in base) and not any(is_in(whole, entry) for whole in parts.whole):
            problems[_UNSAVED].append(entry)
    return found


def _left_behind(
    own: Mapping[str, TensorInfo], parts: _Parts, config: Mapping[str, Any], base: Mapping[str, TensorInfo]
) -> list[str]:
    """Whole embeddings without the head that the base ties to them, which therefore stays the base's.

    With ``ensure_weight_tying``, and for a resized vocabulary, peft trains and saves both alike.
    """
    if config.get("ensure_weight_tying"):
        return []
    twins = [twin.data for head in parts.whole if (twin := _tied_twin(head, parts))]
    return [
        name
        for name, info in own.items()
        if name in base and is_tied(name, config, base) and not any(info.data is twin for twin in twins)
    ]


def _copies(
    parts: _Parts, base: Mapping[str, TensorInfo], find: Callable[[str], list[str]], problems: _Problems
) -> dict[str, TensorInfo]:
    """The adapter's copies of the base's own tensors, by the base's names."""
    found: dict[str, TensorInfo] = {}
    for copy, info in parts.copies.items():
        name = _one(copy, info.name, find, problems, _MISSING)
        if name is None:
            continue
        if info.shape != base[name].shape or not _is_read(info):
            expected = f"{base[name].dtype} {list(base[name].shape)}"
            problems[_COPIES].append(f"{info.name}: expected {expected}, got {info.dtype} {list(info.shape)}")
        found[name] = info
    return found


def _few(examples: list[str]) -> str:
    return ", ".join(examples[:4]) + (f" and {len(examples) - 4} more" if len(examples) > 4 else "")


def adapter_tensors(
    label: str, config: Mapping[str, Any], stored: Mapping[str, TensorInfo], base: Mapping[str, TensorInfo]
) -> dict[str, TensorInfo]:
    """An adapter's tensors as an expert's, under the base's names and in the base's order; then those the base lacks. Pure.

    Target modules are ``LowRank`` in the base's shape and data type, tensors that the adapter holds whole (``modules_to_save``,
    biases, resized embeddings) are its own in their own, all others are ``BaseRows``. ``stored``: the tensors of the adapter's
    headers by name. What peft saves twice is taken to be equal: see ``check_base_copies``. CheckpointError lists all that is
    not understood or does not fit.
    """
    kind = config.get("peft_type")
    if str(kind).upper() != "LORA":
        raise CheckpointError(f"{label}: {ADAPTER_CONFIG}: expected peft_type LORA, got {kind}. {MERGE}.")
    settings, listed = read_settings(config)
    listed += variant_problems(config)
    if settings is None:
        raise CheckpointError.listing(label, [f"{problem}." for problem in listed])
    find, problems = _finder(base), defaultdict[str, list[str]](list)
    parts = _parts(stored, find, problems)
    _copies(parts, base, find, problems)
    targets = _targets(parts, settings, base, find, problems)
    own = _own(parts, settings, base, find, problems)
    problems[_TWICE] += sorted(targets.keys() & own.keys())
    problems[_LEFT] += _left_behind(own, parts, config, base)
    if not stored:
        listed.append(f"the adapter holds no tensor. {_AGAIN} or download it again")
    listed += [sentence.format(_few(examples)) for sentence, examples in problems.items() if examples]
    if listed:
        raise CheckpointError.listing(label, [f"{problem}." for problem in listed])
    unchanged = {name: replace(info, data=BaseRows()) for name, info in base.items()}
    return unchanged | targets | own


def _values(bits: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Raw bits as numbers that compare across types."""
    if dtype == "BF16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(np.float16 if dtype == "F16" else np.float32)


def _differ(left: TensorInfo, right: TensorInfo) -> tuple[int, int] | None:
    """The first rows that differ in value, a chunk at a time."""
    for start in range(0, left.rows, left.chunk_rows):
        stop = min(start + left.chunk_rows, left.rows)
        if not np.array_equal(_values(left.read(start, stop), left.dtype), _values(right.read(start, stop), right.dtype)):
            return start, stop
    return None


def check_base_copies(label: str, stored: Mapping[str, TensorInfo], base: Mapping[str, TensorInfo]) -> None:
    """Read what an adapter that ``adapter_tensors`` accepted holds twice, and compare it.

    Peft saves the base's tensors beside an embedding's factors (``X.base_layer.weight``), and both of a tied head and embedding
    when the vocabulary was resized. CheckpointError names tensors that differ: the adapter belongs to another base, or to an
    untied one. Nothing else is read.
    """
    find, problems = _finder(base), defaultdict[str, list[str]](list)
    parts = _parts(stored, find, problems)
    pairs = [
        (replace(copy, channel_axis=base[name].channel_axis), base[name])
        for name, copy in _copies(parts, base, find, problems).items()
    ]
    pairs += [(parts.whole[name], twin) for name in parts.whole if not find(name) and (twin := _tied_twin(name, parts))]
    for copy, other in pairs:
        if rows := _differ(copy, other):
            problems[_COPIES].append(f"{copy.name} (rows {rows[0]} to {rows[1]} differ from {other.name})")
    if problems[_COPIES]:
        raise CheckpointError.listing(label, [f"{_COPIES.format(_few(problems[_COPIES]))}."])
