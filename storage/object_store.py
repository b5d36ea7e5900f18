"""A store in an object store (S3, Google Cloud Storage, Azure): files that appear whole, conditional writes, leases as locks.

Nothing of an upload that fails is left. What a killed process had begun stays with the store, unseen and paid for, until a
lifecycle rule ends incomplete uploads.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError

from storage.buckets import (
    READ_SILENCE,
    RESUMES,
    WRITE_SILENCE,
    Use,
    all_under,
    code_of,
    connected,
    directly_under,
    failure,
    fill,
    no_bucket,
    pause,
    persist,
    place_of,
    status_of,
)
from storage.errors import StoreError
from storage.leases import LEASE, held
from storage.objects import ObjectFolder, listing

if TYPE_CHECKING:
    from obstore import GetResult, ObjectMeta, UpdateVersion, WritableFile
    from obstore.store import ObjectStore as Connection

    from storage.stores import Buffer

PART_BYTES = 32 << 20
"""Of an upload whose size is not known: files of up to 312 GiB."""
LEAST_PART_BYTES = 8 << 20
MOST_PARTS = 10_000
"""Of S3 and Google Cloud Storage; Azure takes more."""
PARTS_IN_FLIGHT = 4
SINGLE_PUT_BYTES = 64 << 20
"""Up to here, what lies in memory is sent by one request."""
USE = Use(StoreError, StoreError, "Create it, or correct the place", "Give a prefix of its own")

_PIECE_BYTES = 64 * 1024
_PARALLEL = 8
_TOKEN = "upload"  # noqa: S105 - metadata that tells whose upload an object is
_TOO_LARGE_TO_COPY = ("InvalidRequest", "EntityTooLarge")


@dataclass(frozen=True)
class ObjectStore:
    """All below a prefix of a bucket. See ``storage.stores.Store``; ``at`` makes one."""

    place: str

    @classmethod
    def at(cls, place: str) -> ObjectStore:
        """The store at a URL: ``s3://bucket/prefix``, ``gs://…``, ``az://container/prefix``, ``abfss://container@host/…``.

        StoreError when the URL holds more than a place. Nothing is asked for.
        """
        store = cls(place_of(place, USE))
        if any(part in ("", ".", "..") for part in store._prefix.split("/")) and store._prefix:
            raise StoreError(f"{store.place}: a prefix of names with single slashes between them is expected. Correct it.")
        return store

    @property
    def is_local(self) -> bool:
        return False

    def under(self, prefix: str) -> ObjectStore:
        escaped = re.sub(r"[%?#]", lambda found: f"%{ord(found[0]):02X}", prefix.strip("/"))
        return ObjectStore(f"{self.place}/{escaped}".rstrip("/"))

    def get(self, key: str) -> bytes:
        return self._read(key, 0, None)[0]

    def read(self, key: str, start: int, stop: int) -> bytes:
        if stop > start:
            return self._read(key, start, stop)[0]
        self._meta(key)
        return b""

    def ahead(self, keys: Iterable[str]) -> None:
        """Nothing: what is not asked for is not sent."""

    def put(self, key: str, *parts: Buffer, durable: bool = True) -> None:
        views = [view.cast("B") for part in parts if (view := memoryview(part)).nbytes]
        size = sum(map(len, views))
        if size > SINGLE_PUT_BYTES:
            self.upload(key, views, size=size)
        else:
            self._put(key, views)

    def _put(self, key: str, views: list[Buffer] | list[memoryview]) -> None:
        """By one request."""
        where, connection = self._named(key), self._connection(writes=True)
        try:
            persist(lambda: obstore.put(connection, self._path(key), iter(views), use_multipart=False), where, USE)
        except FileNotFoundError:
            raise no_bucket(where, USE) from None

    def upload(self, key: str, pieces: Iterable[Buffer], *, size: int | None = None) -> None:
        """As ``Store.upload``. With ``size``, the bytes there will be, parts are as small as they may be; without, 32 MiB.

        At most six parts are held. StoreError when there are more than 10,000 parts of bytes.
        """
        part_bytes = PART_BYTES if size is None else max(LEAST_PART_BYTES, -(-size // (MOST_PARTS - 1)))
        slices = _slices(pieces, part_bytes)
        head, length = [], 0  # kept until the upload has begun, as its beginning may have to be repeated
        for part in slices:
            head.append(part)
            length += len(part)
            if length >= part_bytes:
                break
        if length < part_bytes:
            self._put(key, head)
            return
        token = uuid.uuid4().hex
        writer = self._begun(key, head, part_bytes, token)
        del head
        try:
            for part in slices:
                length += len(part)
                if length > part_bytes * MOST_PARTS:
                    raise StoreError(
                        f"{self._named(key)}: it has more bytes than {MOST_PARTS} parts of {part_bytes}. Give its size."
                    )
                with self._explained(key):
                    writer.write(part)
        except BaseException:
            _abort(writer)
            raise
        with self._explained(key):
            try:
                writer.close()
            except (BaseError, OSError):
                if not self._is_of(key, token):  # the store did it, and its answer was lost
                    raise

    def _begun(self, key: str, head: list[Buffer], part_bytes: int, token: str) -> WritableFile:
        """An upload with its first part."""

        def begin() -> WritableFile:
            writer = obstore.open_writer(
                self._connection(writes=True),
                self._path(key),
                attributes={_TOKEN: token},
                buffer_size=part_bytes,
                max_concurrency=PARTS_IN_FLIGHT,
            )
            try:
                for part in head:
                    writer.write(part)
            except BaseException:
                _abort(writer)
                raise
            return writer

        with self._explained(key):
            return persist(begin, self._named(key), USE)

    @contextmanager
    def _explained(self, key: str) -> Iterator[None]:
        try:
            yield
        except (BaseError, OSError) as error:
            raise failure(self._named(key), error, USE) from None

    def copy(self, source: str, target: str) -> None:
        self._copy(source, target)
        if self._meta(target)["size"] != self._meta(source)["size"]:
            raise StoreError(f"{self._named(target)}: the store made no whole copy of {source}. Run again.")

    def share(self, source: str, target: str) -> None:
        self.copy(source, target)

    def _copy(self, source: str, target: str) -> None:
        if not self._copied(source, target):
            meta = self._meta(source)
            self.upload(target, self._pieces(source, meta), size=meta["size"])

    def move(self, source: str, target: str) -> None:
        sizes = self.sizes(source)
        names = {key: _joined(target, key.removeprefix(f"{source.strip('/')}/")) for key in sizes}
        with ThreadPoolExecutor(_PARALLEL) as pool:
            list(pool.map(self._copy, names, names.values()))
        there = self.sizes(target) if names else {}
        for key, name in names.items():
            if there.get(name) != sizes[key]:
                raise StoreError(f"{self._named(name)}: the store made no whole copy of {key}. Run again.")
        self.delete(sizes)

    def sizes(self, prefix: str = "") -> dict[str, int]:
        return {key: size for key, size in self._sizes(prefix).items() if not key.endswith(LEASE)}

    def _sizes(self, prefix: str) -> dict[str, int]:
        """Those of leases too."""
        where, own = self._named(prefix), self._path(prefix)
        found = {entry["path"]: entry["size"] for entry in all_under(self._connection(), own or None, where, USE)}
        folders = {folder for path in found for folder in _parents(path)}  # an object of a folder's name is a console's marker
        cut = len(self._prefix) + 1 if self._prefix else 0
        return {path[cut:]: size for path, size in found.items() if path != own and (size or path not in folders)}

    def children(self, prefix: str = "") -> list[str]:
        own = self._path(prefix)
        found = directly_under(self._connection(), own or None, self._named(prefix), USE)
        paths = {*found["common_prefixes"], *(entry["path"] for entry in found["objects"])} - {own, ""}
        names = (path.rpartition("/")[2] for path in paths)
        return sorted(name for name in names if not name.endswith(LEASE))

    def delete(self, keys: Iterable[str]) -> None:
        paths, connection = [self._path(key) for key in keys], self._connection()
        try:
            if paths:
                persist(lambda: obstore.delete(connection, paths), self.place, USE)
        except FileNotFoundError:  # Google's and Azure's way; the others may not have been tried
            with ThreadPoolExecutor(_PARALLEL) as pool:
                list(pool.map(self._delete, paths))

    def _delete(self, path: str) -> None:
        with suppress(FileNotFoundError):
            persist(lambda: obstore.delete(self._connection(), path), self.place, USE)

    def clear(self, prefix: str) -> None:
        self.delete(self._sizes(prefix))

    def tagged(self, key: str) -> tuple[bytes, str] | None:
        try:
            data, meta = self._read(key, 0, None)
        except FileNotFoundError:
            return None
        return data, json.dumps({name: meta[name] for name in ("e_tag", "version") if meta[name]}, sort_keys=True)

    def swap(self, key: str, data: bytes, tag: str | None) -> bool:
        """As ``Store.swap``. Also true when there is equal content by now: it may be ours, its answer lost."""
        mode: Any = "create" if tag is None else _version(tag)
        connection = self._connection(writes=True)
        for trial in range(1 + RESUMES):
            try:
                # a put that is repeated after a lost answer meets its own object; what is there then decides
                persist(lambda: obstore.put(connection, self._path(key), data, mode=mode), self._named(key), USE)
            except (AlreadyExistsError, PreconditionError, FileNotFoundError):
                now = self.tagged(key)
                if now is not None and now[0] == data:
                    return True
                if (None if now is None else now[1]) != tag:
                    return False
                pause(trial)  # S3 answers 409 while another put is under way
            else:
                return True
        return False

    def lock(self, name: str, waiting: Callable[[], None]) -> AbstractContextManager[None]:
        return held(self, f"{name}{LEASE}", waiting)

    def folder(self) -> ObjectFolder:
        files = listing(self.place, USE)[0]
        return ObjectFolder(self.place, tuple(file for file in files if not file.name.endswith(LEASE)))

    @property
    def _root(self) -> str:
        """Scheme and bucket, so that all stores in it share their connections."""
        return "/".join(self.place.split("/")[:3])

    @property
    def _prefix(self) -> str:
        """Below the bucket, decoded as that of a source is."""
        return unquote(self.place[len(self._root) + 1 :])

    def _path(self, key: str) -> str:
        return _joined(self._prefix, key)

    def _named(self, key: str) -> str:
        return _joined(self.place, key)

    def _connection(self, *, writes: bool = False) -> Connection:
        return connected(self._root, USE, WRITE_SILENCE if writes else READ_SILENCE)

    def _asked(self, key: str, **options: Any) -> GetResult:
        return obstore.get(self._connection(), self._path(key), options=options)  # type: ignore[arg-type]

    def _meta(self, key: str) -> ObjectMeta:
        try:
            return persist(lambda: obstore.head(self._connection(), self._path(key)), self._named(key), USE)
        except FileNotFoundError:
            raise FileNotFoundError(key) from None

    def _read(self, key: str, start: int, stop: int | None, etag: str | None = None) -> tuple[bytes, ObjectMeta]:
        """Bytes [start, stop) of one state of an object, and this state; no less than there are."""
        where = self._named(key)
        for _ in range(1 + RESUMES):
            try:
                return persist(lambda: self._ranged(key, start, stop, etag), where, USE)
            except FileNotFoundError:
                raise FileNotFoundError(key) from None
            except PreconditionError:  # replaced while it was read
                if etag is not None:
                    break
        raise StoreError(f"{where}: it is replaced again and again while it is read. Run again when nothing else writes it.")

    def _ranged(self, key: str, start: int, stop: int | None, etag: str | None) -> tuple[bytes, ObjectMeta]:
        # asked for by range even when it is whole: the answer then tells its size apart from how many bytes it has itself
        try:
            condition = {"if_match": etag} if etag else {}
            result = self._asked(key, range={"offset": start} if stop is None else (start, stop), **condition)
        except BaseError as error:
            if status_of(error) != "416":
                raise
            meta = self._meta(key)
            if start < meta["size"]:
                raise PreconditionError from None  # it has grown since
            return b"", meta
        meta = result.meta
        end = meta["size"] if stop is None else min(stop, meta["size"])
        with suppress(BaseError, OSError):
            if len(body := result.bytes()) == end - start:
                return body.to_bytes(), meta
        data = bytearray(end - start)
        fill(memoryview(data), lambda done: self._rest(key, start + done, end, meta), self._named(key), USE)
        return bytes(data), meta

    def _rest(self, key: str, start: int, stop: int, meta: ObjectMeta) -> Iterable[bytes]:
        """Bytes [start, stop) of the state that was met."""
        condition = {"if_match": meta["e_tag"]} if meta["e_tag"] else {}
        result = self._asked(key, range=(start, stop), **condition)
        if result.meta["e_tag"] != meta["e_tag"]:  # a store that knows no If-Match
            raise PreconditionError
        return result.stream(min_chunk_size=_PIECE_BYTES)

    def _pieces(self, key: str, meta: ObjectMeta) -> Iterator[bytes]:
        """One state of an object, in order."""
        for start in range(0, meta["size"], PART_BYTES):
            yield self._read(key, start, min(start + PART_BYTES, meta["size"]), meta["e_tag"])[0]

    def _copied(self, source: str, target: str) -> bool:
        """Whether the store copied it; False when it says that it is too large for that."""
        connection = self._connection(writes=True)
        try:
            persist(lambda: self._copy_or_too_large(connection, source, target), self._named(source), USE)
        except FileNotFoundError:
            raise FileNotFoundError(source) from None
        except _TooLargeError:
            return False
        return True

    def _copy_or_too_large(self, connection: Connection, source: str, target: str) -> None:
        try:
            obstore.copy(connection, self._path(source), self._path(target))
        except BaseError as error:
            if status_of(error) in ("400", "413") and code_of(error) in _TOO_LARGE_TO_COPY:
                raise _TooLargeError from None
            raise

    def _is_of(self, key: str, token: str) -> bool:
        """Whether an object was written by the upload with this token."""
        try:
            return persist(lambda: self._asked(key).attributes, self._named(key), USE).get(_TOKEN) == token
        except (FileNotFoundError, StoreError):
            return False


class _TooLargeError(Exception):
    """For a copy by one request."""


def _abort(writer: WritableFile) -> None:
    """Give up an upload with all of its parts, where the store can still be told."""
    with suppress(BaseError, OSError):
        writer.__exit__(RuntimeError, None, None)


def _joined(*parts: str) -> str:
    return "/".join(part.strip("/") for part in parts if part)


def _parents(path: str) -> Iterator[str]:
    """All folders a path lies in."""
    while "/" in path:
        path = path.rpartition("/")[0]
        yield path


def _slices(pieces: Iterable[Buffer], most: int) -> Iterator[Buffer]:
    """The pieces in slices of at most this many bytes, which no caller changes while they are sent."""
    for piece in pieces:
        view = memoryview(piece)
        if not view.nbytes:
            continue
        view = view.cast("B")
        for start in range(0, len(view), most):
            part = view[start : start + most]
            yield part if isinstance(view.obj, bytes) else bytes(part)


def _version(tag: str) -> UpdateVersion:
    """What a tag of ``tagged`` stands for."""
    version: UpdateVersion = json.loads(tag)
    return version
