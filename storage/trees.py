"""Whole folders to and from a store, files of any size in bounded memory."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from storage.stores import Store

PIECE_BYTES = 16 * 1024**2


def copy_up(source: Path, target: Store, *, last: str | None = None) -> None:
    """Copy all files of a folder into a store. ``last`` names the file whose being there says that all are.

    StoreError when the store cannot be reached; what has been copied then stays.
    """
    files = {path.relative_to(source).as_posix(): path for path in source.rglob("*") if path.is_file()}
    for name in sorted(files, key=lambda name: (name == last, name)):
        path = files[name]
        with path.open("rb") as file:
            target.upload(name, iter(partial(file.read, PIECE_BYTES), b""), size=path.stat().st_size)


def copy_down(source: Store, target: Path, *, last: str | None = None) -> None:
    """Copy all files of a store into a folder; ``last`` as in ``copy_up``.

    FileNotFoundError when one goes meanwhile, StoreError when the store cannot be reached.
    """
    sizes = source.sizes()
    for name in sorted(sizes, key=lambda name: (name == last, name)):
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            for start in range(0, sizes[name], PIECE_BYTES):
                file.write(source.read(name, start, min(start + PIECE_BYTES, sizes[name])))
