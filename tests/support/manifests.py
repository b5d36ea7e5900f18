"""Manifests of artifacts that nobody has built: from who shares what in every channel, or of the size of real models."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from storage.layout import ARTIFACT_FORMAT
from storage.manifest import ExpertRecord, FileRecord, Health, Manifest, ParameterCounts, Span, TensorRecord

Channels = Sequence[Sequence[tuple[str, ...]]]
"""Per channel its groups, each the sorted names of its members."""
NO_DIGEST = "0" * 64


@dataclass(frozen=True)
class Drawn:
    """A manifest, and the groups of every channel that its spans stand for."""

    manifest: Manifest
    channels: dict[str, Channels]


def expert(name: str, layers: Mapping[str, float | None], parameters: int = 1000) -> ExpertRecord:
    """An expert's record."""
    return ExpertRecord(
        source=f"org/{name}@main",
        id="5" * 40,
        weight=1.0,
        files={"config.json": NO_DIGEST, "model.safetensors": NO_DIGEST},
        renamed={},
        health=Health(delta_ratio=0.05, unchanged=0.01, layers=dict(layers)),
        tied={},
        parameters=parameters,
        reconstruction_error=0.5,
        trimmed_to=None,
    )


def tensor(policy: str, shape: tuple[int, ...], spans: Mapping[tuple[str, ...], int], groups: Any = 0) -> TensorRecord:
    """A tensor's record, from the number of rows of every set of users."""
    starts = itertools.accumulate(spans.values(), initial=0)
    found = [
        Span(experts=users, start=start, rows=rows, sha256=NO_DIGEST)
        for (users, rows), start in zip(spans.items(), starts, strict=False)
    ]
    rows = sum(spans.values())
    return TensorRecord(policy=policy, shape=shape, dtype="BF16", channel_axis=0, groups=groups, rows=rows, spans=tuple(found))


def manifest(
    tensors: Mapping[str, TensorRecord],
    experts: Mapping[str, ExpertRecord],
    widths: Mapping[str, int] | None = None,
    **changes: Any,
) -> Manifest:
    """A manifest that adds up. ``widths``: of tensors that are no matrices of rows x columns."""
    pool = sum(record.rows * (widths or {}).get(name, record.shape[-1]) for name, record in tensors.items())
    whole = sum(record.parameters for record in experts.values())
    fields: dict[str, Any] = {
        "format": ARTIFACT_FORMAT,
        "name": "drawn",
        "version": "0" * 16,
        "inputs": NO_DIGEST,
        "created": "2026-01-01T00:00:00+00:00",
        "recipe": {
            "name": "drawn",
            "merge": {"groups": 2, "method": "dare", "density": 0.7},
            "experts": dict.fromkeys(experts),
        },
        "base": {"source": "org/base@main", "id": "4" * 40, "files": {"config.json": NO_DIGEST}},
        "experts": dict(experts),
        "tensors": dict(tensors),
        "files": {"pool-00001-of-00001.safetensors": FileRecord(bytes=2 * pool, sha256=NO_DIGEST)},
        "parameters": ParameterCounts(pool=pool, residue=0, experts=whole, ratio=pool / whole),
        "router": None,
        "seed": 0,
        "kernel": "fused",
        "packages": {"numpy": "2"},
        "seconds": {"ingest": 1.5},
        "moved": {"ingest read": 10},
        "notes": (),
    }
    return Manifest(**(fields | changes))


def drawn(seed: int, names: Sequence[str], layers: int = 2) -> Drawn:
    """A manifest of merged and private tensors with random groups; some experts have rows beyond the others'."""
    random = np.random.default_rng(seed)
    experts = sorted(names)
    channels: dict[str, Channels] = {}
    tensors: dict[str, TensorRecord] = {}
    stems = [f"model.layers.{9 + layer}.{part}.weight" for layer in range(layers) for part in ("up", "down")]
    for name in [*stems, "proj.weight", "embed.weight"]:
        rows, width = int(random.integers(1, 9)), int(random.integers(1, 5))
        extra = {e: int(random.integers(0, 3)) if name in ("proj.weight", "embed.weight") else 0 for e in experts}
        channels[name] = [
            _groups(random, [e for e in experts if channel < rows + extra[e]]) for channel in range(rows + max(extra.values()))
        ]
        spans: dict[tuple[str, ...], int] = {}
        for users in itertools.chain.from_iterable(channels[name]):
            spans[users] = spans.get(users, 0) + 1
        policy = "private" if name == "embed.weight" else "merge"
        tensors[name] = tensor(policy, (rows, width), spans, 2 if policy == "merge" else 0)
    known = {f"model.layers.{9 + layer}": float(random.random()) for layer in range(layers)} | {"proj.weight": None}
    return Drawn(manifest(tensors, {name: expert(name, known) for name in experts}), channels)


def _groups(random: np.random.Generator, members: Sequence[str]) -> list[tuple[str, ...]]:
    labels = random.integers(0, max(1, len(members)), len(members))
    return [tuple(m for m, label in zip(members, labels, strict=True) if label == which) for which in np.unique(labels)]


def large(names: Sequence[str], layers: int, hidden: int = 4096, intermediate: int = 14336, **changes: Any) -> Manifest:
    """A model of Mistral 7B's shapes (with 32 layers its 291 tensors) in which all sets of up to three experts share rows."""
    experts = sorted(names)
    sets = [users for size in (1, 2, 3) for users in itertools.combinations(experts, size)]
    tensors = {
        name: tensor("private", (32000, hidden), {(one,): 32000 for one in experts})
        for name in ("lm_head.weight", "model.embed_tokens.weight")
    }
    tensors["model.norm.weight"] = tensor("private", (hidden,), {(one,): 1 for one in experts})
    heights = {
        "q_proj": hidden,
        "k_proj": 1024,
        "v_proj": 1024,
        "o_proj": hidden,
        "gate_proj": intermediate,
        "up_proj": intermediate,
    }
    for layer in range(layers):
        stem = f"model.layers.{layer}"
        for part, rows in heights.items():
            spans = {users: rows // len(sets) + place for place, users in enumerate(sets)}
            tensors[f"{stem}.block.{part}.weight"] = tensor("merge", (rows, hidden), spans, 2)
        spans = {users: hidden // len(sets) + place for place, users in enumerate(sets)}
        tensors[f"{stem}.mlp.down_proj.weight"] = tensor("merge", (hidden, intermediate), spans, 2)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{stem}.{norm}.weight"] = tensor("private", (hidden,), {(one,): 1 for one in experts})
    known = {f"model.layers.{layer}": 0.01 + layer / 1000 for layer in range(layers)}
    return manifest(tensors, {name: expert(name, known, 7_241_732_096) for name in experts}, **changes)
