"""What a training leaves on its way, in a store that outlives the machine it runs on."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from storage.stores import Store
from storage.trees import copy_down, copy_up

WHOLE = "whole.json"
"""In a checkpoint, written last: names and sizes of its files."""
EVERY_S = 120.0
"""How often a checkpoint is copied at most: one of the default encoder is 2 GB. A shorter training is as soon done again."""


@dataclass(frozen=True)
class Kept:
    """Where the checkpoints of trainings are copied to, and how often. Small, and it pickles."""

    store: Store
    every: float = EVERY_S
    """Seconds."""


def last_whole(folder: Path) -> Path | None:
    """The last checkpoint that was written to its end; those that were not are removed."""
    found: dict[int, Path] = {}
    for path in folder.glob("checkpoint-*"):
        with suppress(OSError, ValueError):
            files = json.loads((path / WHOLE).read_bytes())
            if all((path / name).stat().st_size == size for name, size in files.items()):
                found[int(path.name.rpartition("-")[2])] = path
                continue
        shutil.rmtree(path)
    return found[max(found)] if found else None


class Keeper:
    """Copies of the checkpoints of one training."""

    def __init__(self, store: Store, every: float) -> None:
        self._store = store
        self._every = every
        self._copied = time.monotonic()

    def restore(self, folder: Path) -> None:
        """Fetch what was kept into a folder that has no whole checkpoint."""
        if last_whole(folder) is not None:
            return
        for name in self._names():
            with suppress(FileNotFoundError):  # one that its training has replaced by a later one
                copy_down(self._store.under(name), folder / name, last=WHOLE)

    def keep(self, checkpoints: Sequence[Path]) -> None:
        """Have copies of these whole checkpoints, made in this order, and of no others, if the last was made a while ago."""
        if time.monotonic() - self._copied < self._every:
            return
        wanted = {path.name: path for path in checkpoints}
        try:
            earlier = self._names()
            for name, path in wanted.items():
                if name not in earlier:
                    copy_up(path, self._store.under(name), last=WHOLE)
            for name in set(earlier) - wanted.keys():
                self._store.clear(name)
        finally:
            self._copied = time.monotonic()  # a store that fails is not asked at every checkpoint either

    def _names(self) -> list[str]:
        """Of the checkpoints that were copied to their end, the earliest first."""
        names = {key.partition("/")[0] for key in self._store.sizes() if key.endswith(f"/{WHOLE}")}
        return sorted(names, key=lambda name: int(name.rpartition("-")[2]))
