"""Artifacts: open one, read rows of its pool, check every byte, publish a new version."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from storage.atomic import canonical_json, sync, write_atomically
from storage.digests import sha256_file
from storage.errors import ArtifactError, OutputExistsError
from storage.files import LocalFolder
from storage.headers import read_header
from storage.layout import LATEST, MANIFEST, POOL_INDEX, RESIDUE_FILE, ROWS_FILE
from storage.manifest import Manifest, version_of
from storage.tensors import TensorInfo

WORK = ".work"


def resolve(location: str) -> Path:
    """The version folder meant by an artifact argument: such a folder, ``<output>`` (its latest) or ``<output>@version``."""
    folder, version = Path(location), ""
    if not folder.exists() and "@" in location:
        head, version = location.rsplit("@", 1)
        folder = Path(head)
    if not folder.is_dir():
        raise ArtifactError(f"there is no artifact at {location}: no such directory. Give an artifact's folder or an output.")
    if version:
        folder = folder / version
    elif not (folder / MANIFEST).is_file() and (folder / LATEST).is_file():
        folder = folder / latest(folder)["version"]
    if folder.parent.name == WORK or not (folder / MANIFEST).is_file():
        raise ArtifactError(
            f"{folder} is not an artifact: it has no {MANIFEST}. Its run did not finish, or the path is wrong: "
            "give a published version's folder or the output folder above it."
        )
    return folder


def latest(output: Path) -> dict[str, Any]:
    """The content of ``latest.json``: version and sequence."""
    path = output / LATEST
    try:
        found = json.loads(path.read_bytes())
        version, sequence = found["version"], found["sequence"]
        if not isinstance(version, str) or Path(version).name != version or not isinstance(sequence, int):
            raise ValueError("no version or no sequence")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} is damaged ({error}). Name a version: {output}@VERSION.") from None
    return dict(found)


class Artifact:
    """One published version in a local folder."""

    def __init__(self, location: str | Path) -> None:
        self.path = resolve(str(location))
        self.manifest = Manifest.from_bytes((self.path / MANIFEST).read_bytes(), str(self.path / MANIFEST))

    @cached_property
    def _pool(self) -> dict[str, TensorInfo]:
        found: dict[str, TensorInfo] = {}
        with self.damage_explained(POOL_INDEX):
            placed = json.loads((self.path / POOL_INDEX).read_bytes())["weight_map"]
            for name in sorted(set(placed.values())):
                found.update(read_header(LocalFolder(self.path).file(name)))
        return found

    @contextmanager
    def damage_explained(self, name: str) -> Iterator[None]:
        """Turn whatever reading a damaged file of the artifact raises into an ArtifactError."""
        try:
            yield
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise ArtifactError(
                f"{self.path / name} is missing or damaged ({error!r}). Pull or build the artifact again."
            ) from None

    def check_expert(self, expert: str) -> None:
        """ArtifactError unless the artifact has this expert."""
        if expert not in self.manifest.experts:
            names = ", ".join(self.manifest.experts)
            raise ArtifactError(f"{self.path} has no expert {expert!r}; it has {names}. Name one of these.")

    def expert_rows(self, expert: str) -> dict[str, NDArray[np.int32]]:
        """Per tensor of the expert, (channels,) int32: the pool row of every channel."""
        self.check_expert(expert)
        name = f"experts/{expert}/{ROWS_FILE}"
        with self.damage_explained(name):
            rows = load_file(self.path / name)
            held = {n for n, record in self.manifest.tensors.items() if any(expert in span.experts for span in record.spans)}
            if rows.keys() != held:
                raise ValueError(f"expected rows of {len(held)} tensors, got {len(rows)}")
            return rows

    def residue(self, expert: str) -> dict[str, tuple[NDArray[np.int32], NDArray[Any]]]:
        """Per tensor the entries the expert keeps beside the pool: columns (rows, count) int32 and their raw bits.

        Empty unless the artifact's method keeps any (BYOM). They replace what the pool's rows hold there.
        """
        self.check_expert(expert)
        name = f"experts/{expert}/{RESIDUE_FILE}"
        if name not in self.manifest.files:
            return {}
        with self.damage_explained(name):
            infos = read_header(LocalFolder(self.path).file(name))
            stems = sorted({tensor.rsplit(".", 1)[0] for tensor in infos})
            found = {stem: (infos[f"{stem}.columns"], infos[f"{stem}.values"]) for stem in stems}
            return {stem: self._residue_of(stem, columns, values) for stem, (columns, values) in found.items()}

    def _residue_of(self, tensor: str, columns: TensorInfo, values: TensorInfo) -> tuple[NDArray[np.int32], NDArray[Any]]:
        """One tensor's kept entries; ValueError when they cannot be put over its rows."""
        info = self._pool[tensor]
        places = columns.read(0, columns.rows).view(np.int32)
        if columns.shape != values.shape or values.dtype != info.dtype:
            raise ValueError(f"{tensor}: {values.dtype} {values.shape} values at {columns.shape} columns of {info.dtype}")
        if places.size and not 0 <= int(places.min()) <= int(places.max()) < info.width:
            raise ValueError(f"{tensor}: columns {places.min()} to {places.max()} of {info.width}")
        return places, values.read(0, values.rows)

    def rows(self, tensor: str, indices: NDArray[np.int32]) -> NDArray[Any]:
        """(len(indices), width) raw bits of pool rows. The only reader of the pool: the format may store rows otherwise."""
        with self.damage_explained(POOL_INDEX):
            info = self._pool[tensor]
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < info.rows:
            raise ArtifactError(f"{self.path}: tensor {tensor}: a row index lies outside its {info.rows} rows. Run verify.")
        unique, inverse = np.unique(indices, return_inverse=True)
        breaks = np.flatnonzero(np.diff(unique) != 1) + 1
        runs = [run for run in np.split(unique, breaks) if len(run)]
        parts = [info.read(int(run[0]), int(run[-1]) + 1) for run in runs]
        result: NDArray[Any] = np.concatenate(parts)[inverse]
        return result

    def verify(self) -> list[str]:
        """Everything that differs from the manifest: missing, changed and unknown files. Empty when all is well."""
        problems: list[str] = []
        for name, record in self.manifest.files.items():
            path = self.path / name
            if not path.is_file():
                problems.append(f"{name} is missing")
            elif path.stat().st_size != record.bytes:
                problems.append(f"{name}: expected {record.bytes} bytes, got {path.stat().st_size}")
            elif (found := sha256_file(path)) != record.sha256:
                problems.append(f"{name}: expected sha256 {record.sha256}, got {found}")
        known = {*self.manifest.files, MANIFEST}
        present = {p.relative_to(self.path).as_posix() for p in self.path.rglob("*") if p.is_symlink() or not p.is_dir()}
        problems += [f"{name} is not part of the artifact" for name in sorted(present - known)]
        version = version_of(self.manifest.files)
        if version != self.manifest.version:
            problems.append(f"{MANIFEST}: its files make version {version}, it says {self.manifest.version}")
        return problems


def _versions(output: Path) -> list[Path]:
    return sorted(path.parent for path in output.glob(f"*/{MANIFEST}"))


def check_output(output: Path) -> None:
    """OutputExistsError when the place holds something other than artifacts: nothing of a stranger's is overwritten."""
    if not output.exists():
        return
    if not output.is_dir():
        raise OutputExistsError(f"output {output} is a file, not a folder of artifacts. Choose another output.")
    entries = sorted(path.name for path in output.iterdir())
    if entries and not ({LATEST, WORK} & set(entries)):
        raise OutputExistsError(
            f"output {output} exists and is not a folder of artifacts: it has neither {LATEST} nor {WORK} but holds "
            f"{', '.join(entries[:5])}{' …' if len(entries) > 5 else ''}. Choose another output or empty it."
        )


def find_by_inputs(output: Path, inputs: str) -> Manifest | None:
    """A whole published version made from the same inputs, if there is one."""
    known = output / WORK / f"{inputs}.version"
    alias = known.read_text() if known.is_file() else None
    for folder in _versions(output):
        try:
            manifest = Artifact(folder).manifest
        except ArtifactError:  # another format or a damaged one: not what was asked for
            continue
        same = manifest.inputs == inputs or manifest.version == alias
        if same and folder.name == manifest.version and _is_whole(folder):
            return manifest
    return None


def _is_whole(folder: Path) -> bool:
    try:
        return not Artifact(folder).verify()
    except ArtifactError:
        return False


def publish(staged: Path, output: Path, manifest: Manifest) -> bool:
    """Make a staged folder the version the manifest names, then the latest. False when that version was there, whole.

    The manifest is written last, after the folder has its final name: until then nothing reads it as an artifact. A
    version that is there without a manifest (a killed publish) or fails verification is replaced. Other inputs that
    come to the same version are remembered, so that their next run finds it.
    """
    final, content = output / manifest.version, manifest.to_bytes()
    with FileLock(output / WORK / "publish.lock"):
        new = not _is_whole(final)
        if new:
            for path in staged.rglob("*"):
                sync(path)
            if final.exists():
                final.rename(output / WORK / f"replaced-{uuid.uuid4().hex[:8]}")
            staged.rename(final)
            sync(output)
            write_atomically(final / MANIFEST, content)
            for old in (output / WORK).glob("replaced-*"):
                shutil.rmtree(old)
        elif Artifact(final).manifest.inputs != manifest.inputs:
            write_atomically(output / WORK / f"{manifest.inputs}.version", manifest.version.encode())
        _point_latest(output, manifest.version)
    return new


def make_latest(output: Path, version: str) -> None:
    """Let ``latest.json`` name a published version; unchanged when it does so already."""
    with FileLock(output / WORK / "publish.lock"):
        _point_latest(output, version)


def _point_latest(output: Path, version: str) -> None:
    try:
        known = latest(output)
    except ArtifactError:  # none yet, or a damaged one, which this mends
        known = {"version": None, "sequence": 0}
    if known["version"] != version:
        record = {"version": version, "sequence": known["sequence"] + 1}
        write_atomically(output / LATEST, canonical_json(record))
