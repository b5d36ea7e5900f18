"""Whether experts mean the same tokens by the rows that they share with the base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipeline.plan import MergePlan
from pipeline.roles import is_vocabulary
from storage.errors import PlanError
from storage.tokens import compare_tokens, read_tokens

SHOWN = 3


def _same_files(base: Mapping[str, Path], expert: Mapping[str, Path]) -> bool:
    names = [name for name in (*base, *expert) if "token" in name or name.startswith(("vocab", "merges", "spiece"))]
    return all(name in base and name in expert and base[name].read_bytes() == expert[name].read_bytes() for name in names)


def compare_vocabularies(plan: MergePlan, base: Mapping[str, Path], experts: Mapping[str, Mapping[str, Path]]) -> list[str]:
    """Notes on tokens of one id and different strings. PlanError when rows of such tokens were to be merged.

    ``base``, ``experts``: files of their tokenizers, by name.
    """
    tensors = [tensor for tensor in plan.tensors.values() if is_vocabulary(tensor.name) and len(tensor.shape) > 1]
    shared = min((tensor.base_rows for tensor in tensors), default=0)
    merged = [tensor.name for tensor in tensors if tensor.policy == "merge"]
    known = read_tokens(base) if shared else None
    if known is None:
        return []
    notes, problems = [], []
    for name, files in experts.items():
        if _same_files(base, files):
            continue
        tokens = read_tokens(files)
        if tokens is None:
            notes.append(
                f"expert {name}: it has no tokenizer that can be read, so its tokens were not compared with the base's"
            )
            continue
        different = compare_tokens(known, tokens, shared)
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
