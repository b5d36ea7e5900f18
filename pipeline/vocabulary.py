"""Whether experts mean the same tokens by the rows that they share with the base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipeline.plan import MergePlan
from pipeline.roles import is_vocabulary
from storage.errors import CheckpointError, PlanError
from storage.tokens import compare_tokens, read_tokens

SHOWN = 3


def _same_files(base: Mapping[str, Path], expert: Mapping[str, Path]) -> bool:
    names = [name for name in (*base, *expert) if "token" in name or name.startswith(("vocab", "merges", "spiece"))]
    return all(name in base and name in expert and base[name].read_bytes() == expert[name].read_bytes() for name in names)


def compare_vocabularies(plan: MergePlan, base: Mapping[str, Path], experts: Mapping[str, Mapping[str, Path]]) -> list[str]:
    """Notes on tokens of one id and different strings. PlanError when rows of such tokens were to be merged.

    ``base``, ``experts``: files of their tokenizers, by name.
    """
    tensors = [t for t in plan.tensors.values() if t.base is not None and is_vocabulary(t.name) and len(t.shape) > 1]
    merged = [tensor.name for tensor in tensors if tensor.policy == "merge"]
    shared = max((tensor.base_rows for tensor in tensors), default=0)
    notes: list[str] = []
    problems: list[str] = []
    known = _tokens("base", base, notes) if shared else None
    for name, files in experts.items() if known is not None else ():
        if _same_files(base, files):
            continue
        tokens = _tokens(f"expert {name}", files, notes)
        different = compare_tokens(known, tokens, shared) if known is not None and tokens is not None else []
        if not different:
            continue
        shown = ", ".join(f"{number} is {mine!r}, in the base {its!r}" for number, its, mine in different[:SHOWN])
        found = f"expert {name}: {len(different)} of {shared} tokens are not the base's: {shown}"
        if merged:
            problems.append(f"{found}; rows of different tokens cannot be merged: make {', '.join(merged)} private")
        else:
            notes.append(f"{found}; it keeps rows and tokenizer of its own")
    if problems:
        raise PlanError.listing("vocabularies do not agree", problems)
    return notes


def _tokens(label: str, files: Mapping[str, Path], notes: list[str]) -> dict[int, str] | None:
    """Token strings by id; None, and for experts a note, when there are none that can be read."""
    try:
        found = read_tokens(files)
    except CheckpointError as error:
        notes.append(f"{label}: its tokens were not compared: {error}")
        return None
    if found is None and label != "base":
        notes.append(f"{label}: it has no tokenizer that can be read, so its tokens were not compared with the base's")
    return found
