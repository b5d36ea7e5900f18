"""Two merged checkpoints entry by entry, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from benchmarks.families import Family

MANY = 10_000
"""Entries from which a tensor's spread says something."""


def _tensors(*folders: Path) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """Every tensor's name with its values in each checkpoint, one tensor in memory at a time."""
    with ExitStack() as stack:
        paths = [path for folder in folders for path in sorted(folder.glob("*.safetensors"))]
        if len(paths) != len(folders):
            raise ValueError(f"expected one safetensors file in each of {', '.join(map(str, folders))}")
        files = [stack.enter_context(safe_open(path, framework="pt")) for path in paths]
        names = [set(file.keys()) for file in files]
        if any(found != names[0] for found in names):
            raise ValueError(f"the checkpoints {', '.join(map(str, folders))} do not have the same tensors")
        for name in sorted(names[0]):
            yield name, [file.get_tensor(name) for file in files]


def _place(values: torch.Tensor) -> torch.Tensor:
    """Each bf16 number's place among all of them in order, so that neighbours differ by 1; both zeros have place 0."""
    bits = values.view(torch.int16).to(torch.int32)
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def _at_threshold(base: torch.Tensor, experts: Sequence[torch.Tensor], density: float) -> torch.Tensor:
    """Where some expert's |delta| equals the smallest that TIES keeps: which of these equals are kept is nobody's rule."""
    found = torch.zeros_like(base, dtype=torch.bool)
    for values in experts:
        size = (values.float() - base.float()).abs()
        found |= size == size.flatten().kthvalue(size.numel() - max(1, int(density * size.numel())) + 1).values
    return found


def differences(theirs: Path, ours: Path, family: Family, density: float | None) -> dict[str, Any]:
    """Per tensor and in all: entries that differ, by more than the last place, beyond equal magnitudes; the largest."""
    tensors: dict[str, dict[str, float]] = {}
    for name, (left, right, *sources) in _tensors(theirs, ours, *family.checkpoints):
        steps = (_place(left) - _place(right)).abs()
        tensors[name] = {
            "entries": steps.numel(),
            "differ": int((steps > 0).sum()),
            "more_than_last_place": int((steps > 1).sum()),
            "largest": float((left.float() - right.float()).abs().max()),
        }
        if density is not None:
            tensors[name]["not_at_threshold"] = int(((steps > 0) & ~_at_threshold(sources[0], sources[1:], density)).sum())
    total = {key: sum(record[key] for record in tensors.values()) for key in next(iter(tensors.values())) if key != "largest"}
    return {**total, "largest": max(record["largest"] for record in tensors.values()), "tensors": tensors}


def spreads(base: Path, theirs: Path, ours: Path) -> dict[str, Any]:
    """Per tensor of many entries and in all: mean and standard deviation of the merged delta, mergekit's first."""
    tensors: dict[str, dict[str, list[float]]] = {}
    entries, sums, squares = 0, [0.0, 0.0], [0.0, 0.0]
    for name, (reference, *merged) in _tensors(base, theirs, ours):
        deltas = [(values.float() - reference.float()).double() for values in merged]
        if reference.numel() >= MANY:
            tensors[name] = {"mean": [float(d.mean()) for d in deltas], "sd": [float(d.std(correction=0)) for d in deltas]}
        entries += reference.numel()
        sums = [total + float(d.sum()) for total, d in zip(sums, deltas, strict=True)]
        squares = [total + float(d.square().sum()) for total, d in zip(squares, deltas, strict=True)]
    means = [total / entries for total in sums]
    deviations = [(total / entries - mean**2) ** 0.5 for total, mean in zip(squares, means, strict=True)]
    return {"mean": means, "sd": deviations, "tensors": tensors}
