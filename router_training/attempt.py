"""A training in a process of its own, from its queries to its router's files: ``python -m router_training.attempt FOLDER``."""

from __future__ import annotations

import pickle
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from router_training.processes import end_with_parent, say
from router_training.training import Training, train_router
from storage.atomic import canonical_json, write_atomically
from storage.errors import ChannelMergingError
from storage.stores import Store
from storage.trees import copy_up

CALL = "call.pickle"
"""What is to be done, from who started the process."""
DONE = "record.json"


@dataclass(frozen=True)
class Place:
    """What a training has on the way, and where its router goes. Small, and it pickles."""

    folder: Path
    """Of this machine: prepared queries, checkpoints."""
    shared: Store
    """The same folder, where it lies on a disk; else the queries' folder has been copied there, under its name."""
    into: Store
    """For the router's files."""


def carry_out(training: Training, place: Place, tell: Callable[[str], None], devices: int | None = None) -> dict[str, Any]:
    """Train in this process, on all of its devices or so many, and write the router's files; the record for the manifest."""
    done = place.folder / "done"
    shutil.rmtree(done, ignore_errors=True)
    record = train_router(training, place.folder, done, tell, devices)
    copy_up(done, place.into)
    return record


def main() -> None:
    """The process."""
    end_with_parent()
    folder = Path(sys.argv[1])
    training, place, devices = pickle.loads((folder / CALL).read_bytes())  # noqa: S301 - from who started this process
    try:
        record = carry_out(training, place, lambda text: say(tell=text), devices)
    except ChannelMergingError as error:
        say(error=type(error).__name__, text=str(error))
        sys.exit(1)
    write_atomically(folder / DONE, canonical_json(record))


if __name__ == "__main__":
    main()
