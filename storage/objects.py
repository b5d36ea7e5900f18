"""Checkpoints in an object store (S3, Google Cloud Storage, Azure): one listing, ranges of files, small files kept locally.

Connections, credentials and errors are those of ``storage.buckets``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import obstore
from obstore.exceptions import PreconditionError
from platformdirs import user_cache_path

from storage.atomic import write_atomically
from storage.buckets import Use, connected, directly_under, family, fill, place_of, quoted
from storage.digests import DigestCache, digest_of
from storage.errors import ChannelMergingError, CheckpointError, SourceError

HEAD_BYTES = 128 * 1024
"""What is fetched at once when something near the start of a file is read: a header then costs one round trip."""
SMALL_BYTES = 20_000_000
"""Files up to this size (configurations, tokenizers) are identified by their sha256, as those of a local folder are."""
SOURCE = Use(CheckpointError, SourceError, "Correct the source in the recipe", "Copy the checkpoint to a prefix of its own")

_PIECE_BYTES = 16 * 1024  # what was buffered for an unfinished piece is lost where a body is cut; larger ones are no faster
_PARALLEL = 8


@dataclass(frozen=True)
class ObjectFile:
    """An object, read by ranges of the content it had when it was listed."""

    folder: str
    """The folder's URL."""
    name: str
    size: int
    etag: str
    """In quotes, as HTTP compares it."""

    @property
    def place(self) -> str:
        return f"{self.folder}/{self.name}"

    def read_into(self, view: memoryview, offset: int) -> int:
        """Fill the view from this offset on. CheckpointError when the object is not what it was, SourceError after retries."""
        wanted = max(0, min(len(view), self.size - offset))
        if wanted and offset + wanted <= HEAD_BYTES:
            view[:wanted] = _head(self)[offset : offset + wanted]
        elif wanted:
            _fetch(self, view[:wanted], offset)
        return wanted


@dataclass(frozen=True)
class ObjectFolder:
    """The objects directly under a prefix, as they were when they were listed."""

    place: str
    files: tuple[ObjectFile, ...]
    id: str | None = None

    @property
    def is_local(self) -> bool:
        return False

    @property
    def names(self) -> frozenset[str]:
        return frozenset(file.name for file in self.files)

    def file(self, name: str) -> ObjectFile:
        """One of its files. CheckpointError when it has none of this name."""
        for file in self.files:
            if file.name == name:
                return file
        raise CheckpointError(f"{self.place}: there is no file {name}. Complete the upload.")

    def local(self, names: Iterable[str]) -> dict[str, Path]:
        """Copies in the user's cache, by ETag, so that a file is fetched once while it stays the same."""
        wanted = [self.file(name) for name in names]
        with ThreadPoolExecutor(_PARALLEL) as pool:
            return {file.name: path for file, path in zip(wanted, pool.map(_copy, wanted), strict=True)}

    def identities(self, names: Iterable[str]) -> dict[str, str]:
        """sha256 of small files, ``etag:<ETag>:<bytes>`` of large ones.

        S3's ETags are digests of content; those of other stores tell versions of one file apart, so its URL is added.
        """
        wanted = [self.file(name) for name in names]
        copies = self.local(file.name for file in wanted if file.size <= SMALL_BYTES)
        digests = DigestCache().sha256(list(copies.values()))
        found = {name: digests[path] for name, path in copies.items()}
        for file in wanted:
            if file.name not in found:
                where = [] if family(self.place) == "s3" else [file.place]
                found[file.name] = ":".join(["etag", file.etag.strip('"'), str(file.size), *where])
        return {file.name: found[file.name] for file in wanted}

    def stamps(self, names: Iterable[str]) -> dict[str, Any]:
        """ETag and size of each file."""
        return {name: _stamp(self.file(name)) for name in names}

    def changed(self, stamps: Mapping[str, Any], identities: Mapping[str, str]) -> list[str]:
        """The names that a new listing lacks or gives another ETag or size."""
        now = {file.name: _stamp(file) for file in listing(self.place)[0]}
        return [name for name, seen in stamps.items() if now.get(name) != list(seen)]


def open_objects(label: str, url: str) -> ObjectFolder:
    """The files directly under a URL: ``s3://bucket/prefix``, ``gs://…``, ``az://container/prefix``, ``abfss://container@host/…``.

    CheckpointError when the URL holds more than a place, when there is no such bucket or prefix, or when access is refused;
    SourceError when the store cannot be reached.
    """
    try:
        place = place_of(url, SOURCE)
        files, folders = listing(place)
        if not files:
            under = f"; it has the folders {', '.join(folders[:5])}" if folders else ""
            raise CheckpointError(f"{place}: no files there{under}. Give the prefix that a checkpoint's files lie under.")
    except ChannelMergingError as error:
        raise type(error)(f"{label}: {error}") from None
    return ObjectFolder(place, files)


def listing(place: str, use: Use = SOURCE) -> tuple[tuple[ObjectFile, ...], list[str]]:
    """Files and folders directly under a prefix, by name. Errors are those of ``use``."""
    found = directly_under(connected(place, use), None, place, use)
    files = []
    for entry in found["objects"]:
        if entry["path"]:  # the object of the prefix's own name is a marker that consoles leave
            if not entry["e_tag"]:
                raise use.refused(f"{place}: the store gives no ETags, so changes would go unseen. Copy it to a local folder.")
            files.append(ObjectFile(place, entry["path"], entry["size"], quoted(entry["e_tag"])))
    return tuple(sorted(files, key=lambda file: file.name)), sorted(found["common_prefixes"])


def _stamp(file: ObjectFile) -> list[Any]:
    return [file.etag, file.size]


@lru_cache(maxsize=64)
def _head(file: ObjectFile) -> bytes:
    """The first bytes of a file: 8 MiB for all that are kept."""
    data = bytearray(min(file.size, HEAD_BYTES))
    _fetch(file, memoryview(data), 0)
    return bytes(data)


def _fetch(file: ObjectFile, view: memoryview, offset: int) -> None:
    """Fill the view, going on from the byte where a body was cut."""
    try:
        fill(view, lambda done: _body(file, offset + done, offset + len(view)), file.place, SOURCE)
    except FileNotFoundError:
        raise CheckpointError(f"{file.place}: it is gone; it changed since it was planned. Run again.") from None
    except PreconditionError:
        raise CheckpointError(_changed(file.place)) from None


def _body(file: ObjectFile, start: int, stop: int) -> Iterable[bytes]:
    """Bytes [start, stop) in pieces, of the content that was listed or not at all."""
    store = connected(file.folder, SOURCE)
    result = obstore.get(store, file.name, options={"range": (start, stop), "if_match": file.etag})
    etag = result.meta["e_tag"]
    if etag and quoted(etag) != file.etag:  # a store that knows no If-Match
        raise CheckpointError(_changed(file.place))
    return result.stream(min_chunk_size=_PIECE_BYTES)


def _copy(file: ObjectFile) -> Path:
    """A whole local copy, in a folder named by URL and ETag."""
    path = user_cache_path("channel-merging") / "objects" / digest_of([file.place, file.etag, file.size]) / file.name
    try:
        if not path.is_file() or path.stat().st_size != file.size:
            path.parent.mkdir(parents=True, exist_ok=True)
            data = bytearray(file.size)
            file.read_into(memoryview(data), 0)
            write_atomically(path, bytes(data))
    except OSError as error:
        raise SourceError(
            f"{file.place}: no copy can be kept in {path.parent} ({error.strerror}). Set XDG_CACHE_HOME to a folder with room."
        ) from None
    return path


def _changed(place: str) -> str:
    return f"{place}: it changed since it was planned. Run again."
