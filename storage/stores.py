"""Trees of files that are written: delta stores and outputs, in a local folder or in an object store, behind one protocol.

A store is small and it pickles: it holds neither a connection nor a credential, and every process opens its own. Keys are
relative paths with ``/``. What is written is whole or not there, so the same work done twice, or by two at once, is harmless.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from storage.files import Folder
from storage.local_store import LocalStore
from storage.places import OBJECT_STORES, scheme_of

Buffer = bytes | bytearray | memoryview


class Store(Protocol):
    """A tree of files under one place."""

    @property
    def place(self) -> str:
        """How errors name it: an absolute path, or a URL without credentials. No slash at the end."""
        ...

    @property
    def is_local(self) -> bool:
        """Whether it is a folder on this machine, or on a disk that all workers share."""
        ...

    def under(self, prefix: str) -> Store:
        """The tree below a prefix, as a store of its own."""
        ...

    def get(self, key: str) -> bytes:
        """A whole file. FileNotFoundError when there is none; StoreError when the store cannot be reached, after retries."""
        ...

    def read(self, key: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a file, fewer only where it ends. FileNotFoundError when there is none."""
        ...

    def ahead(self, keys: Iterable[str]) -> None:
        """Say that files will be read soon. A local disk begins to read them; nothing is waited for, nothing is an error."""
        ...

    def put(self, key: str, *parts: Buffer, durable: bool = True) -> None:
        """Write a file from these parts, whole or not at all, over what is there.

        ``durable=False``: it need not outlive a power cut, as what reads it checks it. StoreError when there is no room.
        """
        ...

    def upload(self, key: str, pieces: Iterable[Buffer], *, size: int | None = None) -> None:
        """Write a file of any size from its pieces in order, in bounded memory; it appears whole when the last is there.

        Pieces may have any size; ``size``, their sum where it is known, lets object stores choose their parts. When the
        iteration raises, nothing is left behind.
        """
        ...

    def copy(self, source: str, target: str) -> None:
        """A copy of a file of any size, on the store's side where it can do that; whole or not at all."""
        ...

    def share(self, source: str, target: str) -> None:
        """A file that is never written again under another name too: without copying it where the store can do that."""
        ...

    def move(self, source: str, target: str) -> None:
        """Move all files below one folder to below another, where nothing may lie, and make them durable.

        On a local disk at once; on object stores file by file, so that what is written afterwards declares it whole. Done
        twice, after a death in between, it completes.
        """
        ...

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Key -> bytes of every file at any depth below a folder. Empty when there is none. Temporary files are left out."""
        ...

    def children(self, prefix: str = "") -> list[str]:
        """Names of the files and folders directly below a folder, sorted; temporary files are left out."""
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Remove files; those that are gone already are no error."""
        ...

    def clear(self, prefix: str) -> None:
        """Remove all that lies below a folder, and the folder."""
        ...

    def tagged(self, key: str) -> tuple[bytes, str] | None:
        """A small file and what identifies this state of it; None when there is none."""
        ...

    def swap(self, key: str, data: bytes, tag: str | None) -> bool:
        """Write a small file if its state is still the one of this tag; with None, if there is none. Whether it was written.

        Atomic on object stores (If-Match, If-None-Match), where the very content being there already counts as written: the
        answer to a first try may have been lost. On a local disk the caller holds a lock.
        """
        ...

    def lock(self, name: str, waiting: Callable[[], None]) -> AbstractContextManager[None]:
        """Hold a name alone, of all processes of all machines.

        While another holds it ``waiting`` is called, every few seconds at least; what that raises ends the wait.
        The death of the holder frees it: at once on a local disk, after a while without a sign of life on object stores.
        """
        ...

    def folder(self) -> Folder:
        """The files directly below, to be read as those of a source are."""
        ...


def open_store(place: str) -> Store:
    """The store at a path or URL. Nothing is created or asked for. StoreError for a URL that holds more than a place."""
    if scheme_of(place) in OBJECT_STORES:
        from storage.object_store import ObjectStore

        return ObjectStore.at(place)
    return LocalStore(Path(place))


Sizes = Mapping[str, int]
"""Key -> bytes."""
