"""Artifacts made by hand with numpy and safetensors' own writer, and what their experts are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from storage.layout import ARTIFACT_FORMAT, ROUTER_FORMAT
from storage.manifest import ExpertRecord, FileRecord, Health, Manifest, ParameterCounts, Span, TensorRecord, version_of

EXPERTS = ("chinese", "code", "math")
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class SmallArtifact:
    """Files without a manifest, the manifest, and every expert's tensors as they must be exported."""

    folder: Path
    manifest: Manifest
    experts: dict[str, Arrays]


@dataclass
class _Pool:
    """The rows of one tensor, put together channel by channel."""

    name: str
    axis: int
    rows: Sequence[tuple[tuple[str, ...], int, NDArray[Any]]]
    """(its users, channel, values)"""

    def packed(self) -> tuple[NDArray[Any], tuple[Span, ...], dict[str, NDArray[np.int32]]]:
        """The pool's rows in order of their users, the spans, and per expert the row of every channel."""
        ordered = sorted(self.rows, key=lambda row: (row[0], row[1]))
        values = np.stack([row[2] for row in ordered])
        spans, indices = [], {name: [(c, i) for i, (users, c, _) in enumerate(ordered) if name in users] for name in EXPERTS}
        for users in sorted({row[0] for row in ordered}):
            own = [i for i, row in enumerate(ordered) if row[0] == users]
            digest = hashlib.sha256(values[own[0] : own[-1] + 1].tobytes()).hexdigest()
            spans.append(Span(experts=users, start=own[0], rows=len(own), sha256=digest))
        return (
            values,
            tuple(spans),
            {name: np.array([i for _, i in sorted(found)], np.int32) for name, found in indices.items()},
        )


def _partition(random: np.random.Generator) -> list[tuple[str, ...]]:
    """Experts in two groups, or in one."""
    labels = random.integers(0, 2, len(EXPERTS))
    groups = [tuple(name for name, label in zip(EXPERTS, labels, strict=True) if label == which) for which in (0, 1)]
    return [group for group in groups if group]


def _pools(random: np.random.Generator, rows: int, width: int) -> list[_Pool]:
    merged = [
        _Pool(
            name,
            axis,
            [
                (users, channel, random.standard_normal(width).astype(dtype))
                for channel in range(rows)
                for users in _partition(random)
            ],
        )
        for name, axis, dtype in (("layers.0.up.weight", 0, np.float32), ("layers.1.in_out.weight", 1, np.float16))
    ]
    # embeddings of different lengths, each expert's own; a norm of all
    tokens = [
        ((n,), c, random.standard_normal(width).astype(np.float16)) for i, n in enumerate(EXPERTS) for c in range(rows + i)
    ]
    norm = [(EXPERTS, 0, random.standard_normal(width).astype(np.float32))]
    return [_Pool("embed.weight", 0, tokens), *merged, _Pool("norm.weight", 0, norm)]


def _record(pool: _Pool, values: NDArray[Any], spans: Sequence[Span], rows: int, width: int) -> TensorRecord:
    shape = (width,) if pool.name == "norm.weight" else (width, rows) if pool.axis else (rows, width)
    dtype = {"float32": "F32", "float16": "F16"}[values.dtype.name]
    return TensorRecord(
        policy="private" if pool.name == "embed.weight" else "merge",
        shape=shape,
        dtype=dtype,
        channel_axis=pool.axis,
        groups=2,
        rows=len(values),
        spans=tuple(spans),
    )


def _shaped(pool: _Pool, rows: NDArray[Any]) -> NDArray[Any]:
    if pool.name == "norm.weight":
        return rows.reshape(-1)
    return np.ascontiguousarray(rows.T) if pool.axis else rows


def write_files(
    folder: Path, *, rows: int = 24, width: int = 16, residue: bool = False, router: bool = True, seed: int = 0
) -> SmallArtifact:
    """Three experts, four tensors in two pool files of two data types. ``residue``: entries kept beside one tensor's rows."""
    random = np.random.default_rng(seed)
    tensors: dict[str, TensorRecord] = {}
    files: dict[str, Arrays] = {}
    indices: dict[str, Arrays] = {name: {} for name in EXPERTS}
    experts: dict[str, Arrays] = {name: {} for name in EXPERTS}
    for number, pool in enumerate(_pools(random, rows, width)):
        values, spans, own = pool.packed()
        tensors[pool.name] = _record(pool, values, spans, rows, width)
        files.setdefault(f"pool-{number % 2 + 1:05d}-of-00002.safetensors", {})[pool.name] = values
        for name in EXPERTS:
            indices[name][pool.name] = own[name]
            experts[name][pool.name] = _shaped(pool, values[own[name]])
    folder.mkdir(parents=True)
    for file, part in files.items():
        save_file(part, folder / file)
    weight_map = {tensor: file for file, part in files.items() for tensor in part}
    (folder / "pool.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for name in EXPERTS:
        place = folder / "experts" / name
        place.mkdir(parents=True)
        save_file(indices[name], place / "rows.safetensors")
        (place / "config.json").write_text(json.dumps({"name": name}))
        (place / "tokenizer.json").write_text(json.dumps({"tokens": [name] * 50}))
        if residue:
            _write_residue(place, experts[name], "layers.0.up.weight", random)
    if router:
        _write_router(folder / "router", random)
    (folder / "README.md").write_text("# by hand\n")
    return SmallArtifact(folder, _manifest(folder, tensors, experts, router), experts)


def _write_residue(place: Path, own: Arrays, tensor: str, random: np.random.Generator) -> None:
    rows, width = own[tensor].shape
    columns = np.stack([random.permutation(width)[:3] for _ in range(rows)]).astype(np.int32)
    values = random.standard_normal((rows, 3)).astype(own[tensor].dtype)
    save_file({f"{tensor}.columns": columns, f"{tensor}.values": values}, place / "residue.safetensors")
    for row in range(rows):
        own[tensor][row, columns[row]] = values[row]


def _write_router(place: Path, random: np.random.Generator) -> None:
    place.mkdir()
    features = {"bits": 6, "shortest": 1, "longest": 3, "words": True}
    config = {
        "kind": "linear", "format": ROUTER_FORMAT, "experts": EXPERTS, "features": features, "link": "sigmoid",
        "temperature": 1.0, "thresholds": {}, "fallback": None,
    }  # fmt: skip
    (place / "router.json").write_text(json.dumps(config))
    weights = random.integers(-32767, 32768, (64, len(EXPERTS))).astype(np.int16)
    scale, bias = np.full(len(EXPERTS), 1e-4), np.zeros(len(EXPERTS))
    save_file({"weights": weights, "scale": scale, "bias": bias}, place / "router.safetensors")


def recorded(folder: Path) -> dict[str, FileRecord]:
    """The records of all files of a folder, but for a manifest's."""
    return {
        path.relative_to(folder).as_posix(): FileRecord(
            bytes=path.stat().st_size, sha256=hashlib.sha256(path.read_bytes()).hexdigest()
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }


def _manifest(folder: Path, tensors: dict[str, TensorRecord], experts: dict[str, Arrays], router: bool) -> Manifest:
    files = recorded(folder)
    health = Health(delta_ratio=0.1, unchanged=0.0, layers={})
    entries = {name: sum(array.size for array in own.values()) for name, own in experts.items()}
    return Manifest(
        format=ARTIFACT_FORMAT,
        name="small",
        version=version_of(files),
        inputs=hashlib.sha256(version_of(files).encode()).hexdigest(),
        created="2026-01-01T00:00:00+00:00",
        recipe={"merge": {"method": "average", "groups": 2}},
        base={},
        experts={
            name: ExpertRecord(
                source=name,
                id=name,
                weight=1.0,
                files={},
                renamed={"norm.weight": "own.norm.weight"} if name == "math" else {},
                health=health,
                tied={},
                parameters=entries[name],
                reconstruction_error=None,
                trimmed_to=None,
            )
            for name in EXPERTS
        },
        tensors=tensors,
        files=files,
        parameters=ParameterCounts(pool=1, residue=0, experts=sum(entries.values()), ratio=0.5),
        router={"kind": "linear", "accuracy": 1.0, "queries": 3} if router else None,
        seed=0,
        kernel="fused",
        packages={},
        seconds={},
        moved={},
        notes=(),
    )


def write_version(output: Path, **options: Any) -> SmallArtifact:
    """A whole version in an output folder, without ``latest.json``: ``folder`` is the version's."""
    small = write_files(output / "making", **options)
    folder = output / small.manifest.version
    small.folder.rename(folder)
    (folder / "manifest.json").write_bytes(small.manifest.to_bytes())
    return SmallArtifact(folder, small.manifest, small.experts)
