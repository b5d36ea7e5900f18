"""A repository on a Hub on loopback, and what tests of the client ask of it."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest

from storage.errors import ChannelMergingError
from storage.files import File
from storage.hub import HEAD_BYTES, HubFile, HubFolder, open_hub
from tests.support.hub_server import HubServer

REPO, WEIGHTS = "org/expert", "model.safetensors"
TOKEN = "hf_good"
SIZE = 1_500_001


def write_repo(folder: Path, seed: int = 0) -> Path:
    (folder / "original").mkdir(parents=True)
    (folder / WEIGHTS).write_bytes(np.random.default_rng(seed).bytes(SIZE))
    (folder / "config.json").write_text('{"model_type": "mistral"}')
    (folder / "tokenizer.json").write_text(f'{{"seed": {seed}}}' * 100)
    (folder / "empty.txt").touch()
    (folder / "original" / "consolidated.bin").write_bytes(b"below the top level")
    return folder


def opened(revision: str | None = None) -> HubFolder:
    folder = open_hub("expert math", REPO, revision)
    assert isinstance(folder, HubFolder)
    return folder


def weights() -> HubFile:
    return opened().file(WEIGHTS)


def read(file: File, offset: int, count: int) -> bytes:
    data = bytearray(count)
    got = file.read_into(memoryview(data), offset)
    return bytes(data[:got])


def ranges(hub: HubServer, pattern: str = "cdn GET") -> list[str | None]:
    return [request.range for request in hub.asked(pattern)]


def files_under(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def caught(kind: type[ChannelMergingError], action: Callable[[], object]) -> str:
    """The message of the error that an action ends with; nothing of the client's hangs on it."""
    with pytest.raises(kind) as found:
        action()
    error = found.value
    assert "\n" not in str(error)
    assert error.__cause__ is None
    assert error.__context__ is None
    assert type(pickle.loads(pickle.dumps(error))) is kind
    return str(error)


# addresses


def parts(file: File, count: int = 100_000) -> bytes:
    """The file behind its start, read in ranges."""
    return b"".join(read(file, offset, count) for offset in range(HEAD_BYTES, SIZE, count))


def together(count: int, action: Callable[[int], bytes]) -> list[bytes]:
    """What threads that start at the same moment get."""
    start = Barrier(count)

    def run(index: int) -> bytes:
        start.wait()
        return action(index)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))
