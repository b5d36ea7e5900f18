"""Artifacts, in a local folder or an object store: find the version that is meant, read rows of its pool, check every byte."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

from storage.errors import ArtifactError, StoreError
from storage.headers import read_header
from storage.layout import LATEST, MANIFEST, POOL_INDEX, RESIDUE_FILE, ROWS_FILE
from storage.local_store import LocalStore
from storage.manifest import FileRecord, Manifest, version_of
from storage.places import OBJECT_STORES, scheme_of
from storage.stores import Store, open_store
from storage.tensors import TensorInfo

WORK = ".work"
RANGE_BYTES = 1 << 24
"""What is asked for at once of large files: enough that an object store's latency does not matter."""
PARALLEL = 8
"""Ranges or files under way at once; their memory is at most this many times ``RANGE_BYTES``, twice."""
_NOT_THERE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


def resolve(location: str) -> Store:
    """The version's folder meant by an artifact argument, each a path or a URL of an object store.

    Such a folder, ``<output>`` (its latest) or ``<output>@version``. ArtifactError when there is none; StoreError when its
    store cannot be reached.
    """
    is_url = scheme_of(location) in OBJECT_STORES
    found = _in_store(location) if is_url else _in_folder(location)
    if WORK in found.place.split("/")[-2:-1] or not _has(found, MANIFEST):
        raise ArtifactError(
            f"{found.place} is not an artifact: it has no {MANIFEST}. Its run did not finish, or the path is wrong: "
            "give a published version's folder or the output folder above it."
        )
    return found


def _in_folder(location: str) -> Store:
    folder, version = Path(location), ""
    if not folder.exists() and "@" in location:
        head, version = location.rsplit("@", 1)
        folder = Path(head)
    if not folder.is_dir():
        raise ArtifactError(f"there is no artifact at {location}: no such directory. Give an artifact's folder or an output.")
    return LocalStore(folder / version) if version else _or_latest(LocalStore(folder))


def _in_store(location: str) -> Store:
    head, version = _split_version(location)
    if version:
        named = open_store(head).under(version)
        if _has(named, MANIFEST):
            return named
    try:
        whole = open_store(location)
    except StoreError:  # no URL, unless what follows the @ is a version
        if version:
            return named
        raise
    return _or_latest(whole)


def _or_latest(folder: Store) -> Store:
    """The folder itself, or the latest version if it is an output."""
    if _has(folder, MANIFEST):
        return folder
    try:
        data = folder.get(LATEST)
    except _NOT_THERE:
        return folder
    return folder.under(parsed_latest(data, folder.place)["version"])


def _split_version(url: str) -> tuple[str, str]:
    """``<output>`` and ``<version>`` of ``<output>@<version>``; '' for a URL without a version."""
    scheme, _, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    has_user = scheme.lower() in ("abfs", "abfss")  # container@host is the bucket
    named = path if slash else host.partition("@")[2] if has_user else host
    version = named.rpartition("@")[2] if "@" in named else ""
    return (url[: -len(version) - 1], version) if version and "/" not in version else (url, "")


def _has(store: Store, key: str) -> bool:
    """Whether there is such a file, with something in it."""
    try:
        store.read(key, 0, 1)
    except _NOT_THERE:
        return False
    return True


def latest(output: Store) -> dict[str, Any]:
    """The content of ``latest.json``: version and sequence. ArtifactError when there is none, or it is damaged."""
    try:
        data = output.get(LATEST)
    except _NOT_THERE:
        data = b""
    return parsed_latest(data, output.place)


def parsed_latest(data: bytes, output: str) -> dict[str, Any]:
    """Version and sequence in a ``latest.json`` of this content. ArtifactError when it is damaged. Pure."""
    try:
        found = json.loads(data)
        version, sequence = found["version"], found["sequence"]
        if not isinstance(version, str) or Path(version).name != version or not isinstance(sequence, int):
            raise ValueError("no version or no sequence")
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{output}/{LATEST} is damaged ({error}). Name a version: {output}@VERSION.") from None
    return dict(found)


@dataclass(frozen=True)
class StoredFile:
    """A file of an artifact, as ``storage.files.File`` has it."""

    store: Store
    key: str
    size: int
    """By the manifest. What is shorter is damaged."""

    @property
    def place(self) -> str:
        return f"{self.store.place}/{self.key}"

    def read_into(self, view: memoryview, offset: int) -> int:
        """As ``File.read_into``; StoreError when the store cannot be reached."""
        data = self.store.read(self.key, offset, min(offset + len(view), self.size)) if offset < self.size else b""
        view[: len(data)] = data
        return len(data)


class Artifact:
    """One published version, in a local folder or an object store."""

    def __init__(self, location: str | Path | Store) -> None:
        self.store = resolve(str(location)) if isinstance(location, (str, Path)) else location
        self.place = self.store.place
        try:
            data = self.store.get(MANIFEST)
        except _NOT_THERE:
            raise ArtifactError(f"{self.place} is not an artifact: it has no {MANIFEST}.") from None
        self.manifest = Manifest.from_bytes(data, f"{self.place}/{MANIFEST}")

    @property
    def path(self) -> Path:
        """The folder of a local artifact."""
        if not isinstance(self.store, LocalStore):
            raise ArtifactError(f"{self.place} is not a folder of this machine. Pull it first: channel-merge pull.")
        return self.store.path

    def file(self, name: str) -> StoredFile:
        """One of its files, to be read by ranges; KeyError when the manifest has none of this name."""
        return StoredFile(self.store, name, self.manifest.files[name].bytes)

    def pieces(self, name: str) -> Iterator[bytes]:
        """The bytes of one of its files, in bounded memory; fewer than the manifest says where it is cut."""
        size = self.manifest.files[name].bytes
        for start in range(0, size, RANGE_BYTES):
            yield self.store.read(name, start, min(start + RANGE_BYTES, size))

    def content(self, name: str) -> bytes:
        """A whole small file. ValueError when it is not what the manifest says, KeyError when that has none of this name."""
        record, data = self.manifest.files[name], self.store.get(name)
        if (found := hashlib.sha256(data).hexdigest()) != record.sha256:
            raise ValueError(f"expected {record.bytes} bytes of sha256 {record.sha256}, got {len(data)} of {found}")
        return data

    @cached_property
    def pool(self) -> dict[str, TensorInfo]:
        """The tensors of its row pool: (rows, width) each, raw bits."""
        with self.damage_explained(POOL_INDEX):
            placed = json.loads(self.content(POOL_INDEX))["weight_map"]
            files = [self.file(name) for name in sorted(set(placed.values()))]
            with ThreadPoolExecutor(PARALLEL) as pool:
                headers = list(pool.map(read_header, files))
        return {name: info for header in headers for name, info in header.items()}

    @contextmanager
    def damage_explained(self, name: str) -> Iterator[None]:
        """Turn whatever reading a damaged file of the artifact raises into an ArtifactError."""
        try:
            yield
        except ArtifactError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise ArtifactError(
                f"{self.place}/{name} is missing or damaged ({error!r}). Pull or build the artifact again."
            ) from None

    def check_expert(self, expert: str) -> None:
        """ArtifactError unless the artifact has this expert."""
        if expert not in self.manifest.experts:
            names = ", ".join(self.manifest.experts)
            raise ArtifactError(f"{self.place} has no expert {expert!r}; it has {names}. Name one of these.")

    def expert_rows(self, expert: str) -> dict[str, NDArray[np.int32]]:
        """Per tensor of the expert, (channels,) int32: the pool row of every channel."""
        self.check_expert(expert)
        name = f"experts/{expert}/{ROWS_FILE}"
        with self.damage_explained(name):
            rows = load(self.content(name))
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
            infos, _ = read_header(self.file(name)), self.pool
            stems = sorted({tensor.rsplit(".", 1)[0] for tensor in infos})
            found = {stem: (infos[f"{stem}.columns"], infos[f"{stem}.values"]) for stem in stems}
            with ThreadPoolExecutor(PARALLEL) as pool:
                kept = pool.map(lambda stem: self._residue_of(stem, *found[stem]), stems)
                return dict(zip(stems, kept, strict=True))

    def _residue_of(self, tensor: str, columns: TensorInfo, values: TensorInfo) -> tuple[NDArray[np.int32], NDArray[Any]]:
        """One tensor's kept entries; ValueError when they cannot be put over its rows."""
        info = self.pool[tensor]
        places = columns.read(0, columns.rows).view(np.int32)
        if columns.shape != values.shape or values.dtype != info.dtype:
            raise ValueError(f"{tensor}: {values.dtype} {values.shape} values at {columns.shape} columns of {info.dtype}")
        if places.size and not 0 <= int(places.min()) <= int(places.max()) < info.width:
            raise ValueError(f"{tensor}: columns {places.min()} to {places.max()} of {info.width}")
        return places, values.read(0, values.rows)

    def rows(self, tensor: str, indices: NDArray[np.int32]) -> NDArray[Any]:
        """(len(indices), width) raw bits of pool rows. The only reader of the pool: the format may store rows otherwise."""
        with self.damage_explained(POOL_INDEX):
            info = self.pool[tensor]
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < info.rows:
            raise ArtifactError(f"{self.place}: tensor {tensor}: a row index lies outside its {info.rows} rows. Run verify.")
        unique, inverse = np.unique(indices, return_inverse=True)
        breaks = np.flatnonzero(np.diff(unique) != 1) + 1
        runs = [(int(run[0]), int(run[-1]) + 1) for run in np.split(unique, breaks) if len(run)]
        with self.damage_explained(POOL_INDEX):
            if self.store.is_local or len(runs) == 1:
                parts = [info.read(*run) for run in runs]
            else:  # a round trip each
                with ThreadPoolExecutor(PARALLEL) as pool:
                    parts = list(pool.map(lambda run: info.read(*run), runs))
            result: NDArray[Any] = np.concatenate(parts)[inverse]
            return result

    def _listed(self) -> tuple[dict[str, str], list[str]]:
        """What one listing shows to differ from the manifest: per file of it, and beyond."""
        sizes, files = self.store.sizes(), self.manifest.files
        problems = {name: f"{name} is missing" for name in files if name not in sizes}
        for name in files.keys() & sizes.keys():
            if sizes[name] != files[name].bytes:
                problems[name] = f"{name}: expected {files[name].bytes} bytes, got {sizes[name]}"
        others = [f"{name} is not part of the artifact" for name in sorted(sizes.keys() - files.keys() - {MANIFEST})]
        version = version_of(files)
        if version != self.manifest.version:
            others.append(f"{MANIFEST}: its files make version {version}, it says {self.manifest.version}")
        return problems, others

    def misfits(self) -> list[str]:
        """What differs from the manifest by names and sizes alone, by one listing. Empty when those are right."""
        problems, others = self._listed()
        return [*(problems[name] for name in self.manifest.files if name in problems), *others]

    def verify(self) -> list[str]:
        """Everything that differs from the manifest: missing, changed and unknown files. Empty when all is well.

        Files are read by ranges, several at once; what has another size is not read. StoreError when the store cannot be
        reached.
        """
        problems, others = self._listed()
        read = {name: record for name, record in self.manifest.files.items() if name not in problems}
        with ThreadPoolExecutor(PARALLEL) as pool:
            found = dict(zip(read, pool.map(self._content_problem, read, read.values()), strict=True))
        told = {**problems, **found}
        return [*(told[name] for name in self.manifest.files if told[name]), *others]

    def _content_problem(self, name: str, record: FileRecord) -> str:
        digest = hashlib.sha256()
        try:
            for piece in self.pieces(name):
                digest.update(piece)
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        found = digest.hexdigest()
        return "" if found == record.sha256 else f"{name}: expected sha256 {record.sha256}, got {found}"
