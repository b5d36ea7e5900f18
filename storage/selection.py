"""What of an artifact is pulled: all of it, or one expert, as the plan of a transfer and what makes it an artifact again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from storage.artifact import PARALLEL, Artifact, StoredFile
from storage.atomic import canonical_json
from storage.digests import digest_of, sha256_file
from storage.fetching import Check, Part, Plan, Range, cut
from storage.headers import read_header
from storage.layout import ARTIFACT_FORMAT, CARD, DTYPES, POOL_INDEX, RESIDUE_FILE, ROWS_FILE, SHARD_BYTES
from storage.manifest import FileRecord, Manifest, ParameterCounts, Span, TensorRecord, version_of
from storage.safetensors_file import Slot, header, shard_name, shards, weight_index
from storage.tensors import FileRows, TensorInfo


class Selection(Protocol):
    """What is pulled."""

    @property
    def plan(self) -> Plan:
        """What has to be fetched."""
        ...

    def complete(self, files: Path) -> Manifest:
        """Write what is not fetched, but for the manifest, beside what was, and return the manifest."""
        ...


@dataclass(frozen=True)
class WholeArtifact:
    """Every file as it is, and the same manifest."""

    plan: Plan
    manifest: Manifest

    def complete(self, files: Path) -> Manifest:
        return self.manifest


def _files(artifact: Artifact, names: Sequence[str]) -> tuple[dict[str, int], list[Range], list[Check]]:
    """Whole files: their sizes, ranges and checks."""
    records = {name: artifact.manifest.files[name] for name in names}
    sizes = {name: record.bytes for name, record in records.items()}
    ranges = [piece for name, size in sizes.items() for piece in cut(name, [Part(0, size, name, 0)])]
    return sizes, ranges, [Check(name, 0, record.bytes, record.sha256, name) for name, record in records.items()]


def whole_artifact(artifact: Artifact) -> WholeArtifact:
    """All files of the manifest. Nothing is asked of the store."""
    sizes, ranges, checks = _files(artifact, sorted(artifact.manifest.files))
    return WholeArtifact(Plan(sizes, {}, ranges, checks), artifact.manifest)


@dataclass(frozen=True)
class OneExpert:
    """An expert's rows in a pool of their own, and its files."""

    plan: Plan
    parent: Manifest
    name: str
    tensors: dict[str, TensorRecord]
    rows: dict[str, NDArray[np.int32]]
    """Per tensor (channels,): rows of the new pool."""
    pool: dict[str, list[Slot]]
    """The new pool's files."""
    residue: int
    """Entries the expert keeps beside the pool."""

    def complete(self, files: Path) -> Manifest:
        rows = files / "experts" / self.name / ROWS_FILE
        rows.parent.mkdir(parents=True, exist_ok=True)
        rows.write_bytes(save(self.rows))
        (files / POOL_INDEX).write_bytes(canonical_json(weight_index(self.pool)))
        (files / CARD).write_text(
            f"# {self.parent.name}: expert {self.name}\n\nThe rows and files of one expert of version {self.parent.version}, "
            "pulled by channel-merge. Its exports are those of that version.\n",
            "utf-8",
        )
        paths = sorted(path for path in files.rglob("*") if path.is_file())
        with ThreadPoolExecutor(PARALLEL) as pool:
            digests = list(pool.map(sha256_file, paths))
        records = {
            path.relative_to(files).as_posix(): FileRecord(bytes=path.stat().st_size, sha256=digest)
            for path, digest in zip(paths, digests, strict=True)
        }
        return self._manifest(records)

    def _manifest(self, files: dict[str, FileRecord]) -> Manifest:
        entries = sum(slot.shape[0] * slot.shape[1] for slots in self.pool.values() for slot in slots)
        record, parent = self.parent.experts[self.name], self.parent
        return parent.model_copy(
            update={
                "format": ARTIFACT_FORMAT,
                "version": version_of(files),
                "inputs": digest_of([parent.inputs, parent.version, self.name]),
                "parent": parent.version,
                "experts": {self.name: record},
                "tensors": self.tensors,
                "files": files,
                "router": None,  # it chooses among experts that are not here
                "parameters": ParameterCounts(
                    pool=entries,
                    residue=self.residue,
                    experts=record.parameters,
                    ratio=(entries + self.residue) / record.parameters,
                ),
                "notes": (*parent.notes, f"expert {self.name} alone, of version {parent.version}"),
            }
        )


@dataclass(frozen=True)
class _Own:
    """The pool rows of one tensor that are an expert's, moved together."""

    info: TensorInfo
    """In the old pool."""
    spans: tuple[Span, ...]
    """In the old pool, in order."""

    @property
    def starts(self) -> list[int]:
        """First rows of the spans in the new pool; then the number of its rows."""
        return [0, *np.cumsum([span.rows for span in self.spans]).tolist()]

    @property
    def row_bytes(self) -> int:
        return self.info.width * DTYPES[self.info.dtype].size

    def renumbered(self, rows: NDArray[np.int32]) -> NDArray[np.int32]:
        """Rows of the old pool as those of the new one; ValueError when one is in no span of the expert's."""
        first = np.array([span.start for span in self.spans], np.int64)
        which = np.searchsorted(first, rows, side="right") - 1
        within = rows - first[which]
        if (which < 0).any() or (within >= np.array([span.rows for span in self.spans])[which]).any():
            raise ValueError(f"tensor {self.info.name}: rows of other experts")
        return (np.array(self.starts[:-1], np.int64)[which] + within).astype(np.int32)


def _own_rows(artifact: Artifact, expert: str, tensor: str) -> _Own:
    record, info = artifact.manifest.tensors[tensor], artifact.pool[tensor]
    spans = tuple(sorted((span for span in record.spans if expert in span.experts), key=lambda span: span.start))
    stops = [0, *(span.start + span.rows for span in spans)]
    if any(span.start < stop or span.rows < 1 for span, stop in zip(spans, stops, strict=False)) or stops[-1] > info.rows:
        raise ValueError(f"tensor {tensor}: spans that overlap or lie outside its {info.rows} rows")
    return _Own(info, spans)


def of_expert(artifact: Artifact, expert: str) -> OneExpert:
    """One expert of an artifact. Its row indices and the headers of the pool are read now.

    ArtifactError when those are damaged or do not fit the manifest.
    """
    beside = f"experts/{expert}/"
    rows = artifact.expert_rows(expert)
    with artifact.damage_explained(f"{beside}{ROWS_FILE}"):
        own = {tensor: _own_rows(artifact, expert, tensor) for tensor in artifact.manifest.tensors if tensor in rows}
        moved = {tensor: part.renumbered(rows[tensor]) for tensor, part in own.items()}
        slots = [Slot(tensor, part.info.dtype, (part.starts[-1], part.info.width)) for tensor, part in own.items()]
        dealt = shards(slots, SHARD_BYTES)
    pool = {shard_name("pool", number, len(dealt)): group for number, group in enumerate(dealt, 1)}
    names = [name for name in artifact.manifest.files if name.startswith(beside) and name != f"{beside}{ROWS_FILE}"]
    sizes, ranges, checks = _files(artifact, sorted(names))
    heads, wanted = {}, []
    for target, group in pool.items():
        heads[target], places = header(group)
        sizes[target] = len(heads[target]) + sum(slot.nbytes for slot in group)
        for slot in group:
            parts, own_checks = _span_parts(own[slot.name], target, places[slot.name])
            wanted += parts
            checks += own_checks
    for key in sorted({key for key, _ in wanted}):
        ranges += cut(key, [part for source, part in wanted if source == key])
    tensors = {tensor: _record(artifact.manifest.tensors[tensor], expert, part) for tensor, part in own.items()}
    residue = _residue_entries(artifact, f"{beside}{RESIDUE_FILE}")
    return OneExpert(Plan(sizes, heads, ranges, checks), artifact.manifest, expert, tensors, moved, pool, residue)


def _span_parts(own: _Own, target: str, place: int) -> tuple[list[tuple[str, Part]], list[Check]]:
    """The spans of one tensor, each with the file it is fetched from, for a place in a new pool file."""
    data = own.info.data
    assert isinstance(data, FileRows)
    assert isinstance(data.file, StoredFile)
    key = data.file.key
    parts, checks = [], []
    for span, start in zip(own.spans, own.starts, strict=False):
        offset, length = place + start * own.row_bytes, span.rows * own.row_bytes
        parts.append((key, Part(data.offset + span.start * own.row_bytes, length, target, offset)))
        checks.append(Check(target, offset, length, span.sha256, f"tensor {own.info.name}, rows from {span.start} on"))
    return parts, checks


def _record(record: TensorRecord, expert: str, own: _Own) -> TensorRecord:
    spans = tuple(
        Span(experts=(expert,), start=start, rows=span.rows, sha256=span.sha256)
        for span, start in zip(own.spans, own.starts, strict=False)
    )
    return record.model_copy(update={"rows": own.starts[-1], "spans": spans})


def _residue_entries(artifact: Artifact, name: str) -> int:
    """Values in an expert's residue file; 0 without one."""
    if name not in artifact.manifest.files:
        return 0
    with artifact.damage_explained(name):
        infos: Mapping[str, TensorInfo] = read_header(artifact.file(name))
        return sum(info.rows * info.width for stem, info in infos.items() if stem.endswith(".values"))
