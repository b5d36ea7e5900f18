"""Files of a source wherever it lies: names, sizes, identities, and ranges of their bytes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from storage.digests import DigestCache, sha256_file, stamp
from storage.errors import CheckpointError

AHEAD_BYTES = 1 << 20
"""From this size of a read on, as much again is read ahead."""


class File(Protocol):
    """One file, read by ranges. Small, and it pickles: it holds no connection and no credential."""

    @property
    def place(self) -> str:
        """How errors name it: a path, ``org/name@commit/file`` or a URL without credentials."""
        ...

    @property
    def size(self) -> int:
        """Bytes."""
        ...

    def read_into(self, view: memoryview, offset: int) -> int:
        """Fill the view (bytes) from this offset on and return how many there were: fewer only where the file ends.

        SourceError when it cannot be reached, CheckpointError when it is not what it was when it was listed.
        """
        ...


class Folder(Protocol):
    """The files of one source. Small, and it pickles."""

    @property
    def place(self) -> str:
        """As a resolved recipe names it: an absolute path, ``org/name@commit`` or a URL."""
        ...

    @property
    def id(self) -> str | None:
        """What identifies all its content, where it has such a thing: the Hub's commit."""
        ...

    @property
    def is_local(self) -> bool:
        """Whether its files lie on this machine, so that nothing has to be fetched."""
        ...

    @property
    def names(self) -> frozenset[str]:
        """Names of the files at its top level."""
        ...

    def file(self, name: str) -> File:
        """One of its files."""
        ...

    def local(self, names: Iterable[str]) -> dict[str, Path]:
        """Whole local copies of (small) files, fetched at once where that is needed."""
        ...

    def identities(self, names: Iterable[str]) -> dict[str, str]:
        """What identifies the content of each file: its sha256 in hex, or ``<kind>:<value>`` where a store knows no sha256."""
        ...

    def stamps(self, names: Iterable[str]) -> dict[str, Any]:
        """What would show that a file was changed after it was identified; empty where content cannot change."""
        ...

    def changed(self, stamps: Mapping[str, Any], identities: Mapping[str, str]) -> list[str]:
        """The names whose content is not, or may not be, what it was."""
        ...


@dataclass(frozen=True)
class LocalFile:
    """A file on this machine or on a disk that all workers share."""

    path: Path
    size: int

    @property
    def place(self) -> str:
        return str(self.path)

    def read_into(self, view: memoryview, offset: int) -> int:
        done = 0
        with self.path.open("rb", buffering=0) as file:
            if len(view) >= AHEAD_BYTES:  # what follows is wanted next; the disk can read it while this is at work
                os.posix_fadvise(file.fileno(), offset, 2 * len(view), os.POSIX_FADV_WILLNEED)
            while done < len(view):
                got = os.preadv(file.fileno(), [view[done:]], offset + done)
                if got == 0:
                    break
                done += got
        return done


@dataclass(frozen=True)
class LocalFolder:
    """A folder on this machine or on a disk that all workers share."""

    path: Path
    id: str | None = None

    @property
    def place(self) -> str:
        return str(self.path)

    @property
    def is_local(self) -> bool:
        return True

    @property
    def names(self) -> frozenset[str]:
        return frozenset(path.name for path in self.path.iterdir() if path.is_file())

    def file(self, name: str) -> LocalFile:
        path = self.path / name
        return LocalFile(path, path.stat().st_size)

    def local(self, names: Iterable[str]) -> dict[str, Path]:
        return {name: self.path / name for name in names}

    def identities(self, names: Iterable[str]) -> dict[str, str]:
        found = DigestCache().sha256([self.path / name for name in names])
        return {path.name: digest for path, digest in found.items()}

    def stamps(self, names: Iterable[str]) -> dict[str, Any]:
        return {name: stamp((self.path / name).resolve()) for name in names}

    def changed(self, stamps: Mapping[str, Any], identities: Mapping[str, str]) -> list[str]:
        return [name for name, seen in stamps.items() if not is_same(self.path / name, seen, identities[name])]


def is_same(path: Path, seen: list[int], digest: str) -> bool:
    """Whether a file has its old stamp or, if only its change time is another (permissions, links), its old content.

    One that was written to is another, though its content be the old one again: it was not while it was read.
    """
    try:
        size, modified, changed, inode = stamp(path.resolve())
        if [size, modified, changed, inode] == seen:
            return True
        return [size, modified, inode] == [seen[0], seen[1], seen[3]] and sha256_file(path) == digest
    except OSError:
        return False


def open_local(label: str, path: Path) -> LocalFolder:
    """A local folder. CheckpointError when there is none."""
    if not path.is_dir():
        raise CheckpointError(f"{label}: there is no directory {path}. Correct the path in the recipe.")
    return LocalFolder(path)


def read_whole(file: File, limit: int) -> bytes:
    """A small file's bytes. CheckpointError when it has more than ``limit`` of them."""
    if file.size > limit:
        raise CheckpointError(f"{file.place}: expected at most {limit} bytes, got {file.size}. Is it the right file?")
    data = bytearray(file.size)
    got = file.read_into(memoryview(data), 0)
    return bytes(data[:got])
