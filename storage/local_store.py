"""A store in a local folder: atomic replacement of files, and locks that the system frees when their holder dies."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from storage.atomic import sync
from storage.digests import digest_of
from storage.errors import StoreError
from storage.files import LocalFolder

TEMPORARY = ".part"
"""The end of the names of files under way; they begin with a dot."""
LOCK = ".lock"
LOCK_POLL_S = 0.5
"""How long a lock is waited for before the caller is asked whether to go on."""
COPY_BYTES = 1 << 24
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what a full or read-only disk says into an error that a user can act on."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        remedy = "Free space there" if error.errno in _NO_ROOM else "Make it writable"
        raise StoreError(f"{path}: {error.strerror}. {remedy} and run again: finished work is kept.") from None


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """As ``explained``, where a folder that is gone is an error too."""
    try:
        with explained(path):
            yield
    except FileNotFoundError:
        raise StoreError(f"{path}: its folder was removed while it was written. Run again.") from None


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(error.errno, error.strerror, str(path)) from None
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}. Make it readable and run again: finished work is kept.") from None


def _is_temporary(name: str) -> bool:
    return name.startswith(".") and name.endswith((TEMPORARY, LOCK))


@dataclass(frozen=True)
class LocalStore:
    """A folder on this machine, or on a disk that all workers share. See ``storage.stores.Store``."""

    path: Path

    @property
    def place(self) -> str:
        return str(self.path)

    @property
    def is_local(self) -> bool:
        return True

    def under(self, prefix: str) -> LocalStore:
        return LocalStore(self.path / prefix)

    def get(self, key: str) -> bytes:
        with _reading(self.path / key):
            return (self.path / key).read_bytes()

    def read(self, key: str, start: int, stop: int) -> bytes:
        data, done = bytearray(max(0, stop - start)), 0
        view = memoryview(data)
        with _reading(self.path / key), (self.path / key).open("rb", buffering=0) as file:
            while done < len(view):
                got = os.preadv(file.fileno(), [view[done:]], start + done)
                if not got:
                    break
                done += got
        return bytes(view[:done])

    def ahead(self, keys: Iterable[str]) -> None:
        for key in keys:
            with suppress(OSError), (self.path / key).open("rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

    def put(self, key: str, *parts: bytes | bytearray | memoryview, durable: bool = True) -> None:
        self._write(self.path / key, parts, durable=durable)

    def upload(self, key: str, pieces: Iterable[bytes | bytearray | memoryview], *, size: int | None = None) -> None:
        self._write(self.path / key, pieces, durable=True)

    def _write(self, path: Path, parts: Iterable[bytes | bytearray | memoryview], *, durable: bool) -> None:
        partial = path.with_name(f".{path.name[:50]}.{uuid.uuid4().hex[:8]}{TEMPORARY}")
        try:
            with _writing(path):
                file = _created(partial)
            with file:
                for part in parts:  # what their source raises is not this disk's fault
                    with _writing(path):
                        _write_all(file, part)
                with _writing(path):
                    if durable:
                        os.fsync(file.fileno())
                    partial.replace(path)
                    if durable:
                        sync(path.parent)
        except BaseException:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise

    def copy(self, source: str, target: str) -> None:
        path = self.path / source
        with _reading(path):
            file = path.open("rb", buffering=0)
        with file:
            self.upload(target, _blocks(file, path))

    def share(self, source: str, target: str) -> None:
        old, new = self.path / source, self.path / target
        partial = new.with_name(f".{new.name[:50]}.{uuid.uuid4().hex[:8]}{TEMPORARY}")
        with _writing(new):
            _make_folder(new.parent)
        try:
            os.link(old, partial)
            partial.replace(new)  # which does nothing when both are the same file already
        except OSError:  # a disk without links, or another one
            self.copy(source, target)
        finally:
            partial.unlink(missing_ok=True)

    def move(self, source: str, target: str) -> None:
        old, new = self.path / source, self.path / target
        with _writing(new):
            if old.is_dir():
                for path in (old, *old.rglob("*")):
                    sync(path)
                _make_folder(new.parent)
                old.rename(new)
            for folder in {old.parent, new.parent}:
                if folder.is_dir():  # what died after the renaming may have left this to be done
                    sync(folder)

    def sizes(self, prefix: str = "") -> dict[str, int]:
        found: dict[str, int] = {}
        pending = [self.path / prefix]
        while pending:
            folder = pending.pop()
            with suppress(FileNotFoundError), _reading(folder), os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(folder / entry.name)
                    elif not _is_temporary(entry.name):
                        with suppress(FileNotFoundError):
                            found[(folder / entry.name).relative_to(self.path).as_posix()] = entry.stat().st_size
        return found

    def children(self, prefix: str = "") -> list[str]:
        with suppress(FileNotFoundError), _reading(self.path / prefix):
            return sorted(name for name in os.listdir(self.path / prefix) if not _is_temporary(name))  # noqa: PTH208 - names
        return []

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            with _writing(self.path / key), suppress(FileNotFoundError, NotADirectoryError):
                (self.path / key).unlink()

    def clear(self, prefix: str) -> None:
        with _writing(self.path / prefix):
            while (self.path / prefix).is_dir():
                with suppress(FileNotFoundError):  # another is clearing it too
                    shutil.rmtree(self.path / prefix)

    def tagged(self, key: str) -> tuple[bytes, str] | None:
        try:
            data = self.get(key)
        except FileNotFoundError:
            return None
        return data, digest_of(data.hex())

    def swap(self, key: str, data: bytes, tag: str | None) -> bool:
        known = self.tagged(key)
        if (None if known is None else known[1]) != tag:
            return False
        self.put(key, data)
        return True

    @contextmanager
    def lock(self, name: str, waiting: Callable[[], None]) -> Iterator[None]:
        path = self.path / f"{name}{LOCK}"
        path = path.with_name(f".{path.name.lstrip('.')}")
        with _writing(path):
            _make_folder(path.parent)
            lock = FileLock(path, thread_local=False)
            is_free = _is_acquired(lock)
        while not is_free:
            waiting()
            with _writing(path):
                is_free = _is_acquired(lock, LOCK_POLL_S)
        try:
            yield
        finally:
            lock.release()

    def folder(self) -> LocalFolder:
        return LocalFolder(self.path)


def _is_acquired(lock: FileLock, timeout: float = 0) -> bool:
    try:
        lock.acquire(timeout=timeout)
    except Timeout:  # an OSError itself
        return False
    return True


def _created(path: Path) -> BinaryIO:
    """A new file for writing; its folder is made when it is not there."""
    with suppress(FileNotFoundError):
        return path.open("xb", buffering=0)
    _make_folder(path.parent)
    return path.open("xb", buffering=0)


def _make_folder(folder: Path) -> None:
    """A durable folder, with those above it."""
    new = list(takewhile(lambda path: not path.is_dir(), (folder, *folder.parents)))
    folder.mkdir(parents=True, exist_ok=True)
    for path in new:
        sync(path.parent)


def _blocks(file: BinaryIO, path: Path) -> Iterator[bytes]:
    while True:
        with _reading(path):
            block = file.read(COPY_BYTES)
        if not block:
            return
        yield block


def _write_all(file: BinaryIO, part: bytes | bytearray | memoryview) -> None:
    view = memoryview(part)
    if view.nbytes:  # without, it may have a shape that cannot be cast
        view = view.cast("B")
        while view:
            view = view[file.write(view) :]
