"""A local store on a disk that is full, read-only, or in the way; and what killed processes left."""

from __future__ import annotations

import errno
import itertools
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from storage.errors import StoreError
from storage.local_store import LocalStore

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("call", ["put('large.bin', b'x' * 60_000, b'y' * 60_000)", "upload('large.bin', [b'x' * 60_000] * 9)"])
def test_a_disk_without_room(tmp_path: Path, call: str) -> None:
    """The system's limit of a file's size stands for a full disk: writes fail in the middle just so."""
    script = f"""
        import resource, sys
        from storage.errors import StoreError
        from storage.local_store import LocalStore
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        store = LocalStore(__import__("pathlib").Path(sys.argv[1]))
        store.put("small.bin", b"x" * 100_000)
        try:
            store.{call}
        except StoreError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{tmp_path}/large.bin: File too large. Free space there and run again: finished work is kept.\n"
    assert [path.name for path in tmp_path.iterdir()] == ["small.bin"]


@pytest.mark.parametrize(
    ("code", "remedy"),
    [(errno.ENOSPC, "Free space there"), (errno.EDQUOT, "Free space there"), (errno.EROFS, "Make it writable")],
)
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_says_no_when_a_file_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, remedy: str, call: str
) -> None:
    store = LocalStore(tmp_path)
    store.put("x.bin", b"old")

    def fails(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    target: tuple[object, str] = (os, "fsync") if call == "fsync" else (Path, "replace")
    monkeypatch.setattr(*target, fails)
    with pytest.raises(StoreError, match=rf"^{tmp_path}/x\.bin: {os.strerror(code)}\. {remedy} and run again"):
        store.put("x.bin", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x.bin", b"old")]


def entered(store: LocalStore) -> None:
    with store.lock("a/b", lambda: None):
        pass


def test_what_is_in_the_way_of_a_folder_is_named(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("a", b"a file")
    attempts: list[Callable[[], None]] = [lambda: store.put("a/b", b""), lambda: entered(store)]
    for attempt in attempts:
        with pytest.raises(StoreError, match=rf"^{tmp_path}/a/\.?b(\.lock)?: (Not a directory|File exists)"):
            attempt()
    assert store.sizes() == {"a": 6}
    with pytest.raises(FileNotFoundError, match="a/b"):
        store.get("a/b")


def test_what_a_killed_process_had_begun_is_not_seen(tmp_path: Path) -> None:
    script = """
        import os, sys
        from pathlib import Path
        from storage.local_store import LocalStore
        def pieces():
            yield b"half"
            os.kill(os.getpid(), 9)
        LocalStore(Path(sys.argv[1])).upload("d/x.bin", pieces())
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(tmp_path)], cwd=ROOT, check=False)
    store = LocalStore(tmp_path)
    assert len(list((tmp_path / "d").iterdir())) == 1
    assert (store.sizes(), store.children("d")) == ({}, [])
    store.upload("d/x.bin", itertools.repeat(b"x", 5))
    assert store.sizes() == {"d/x.bin": 5}
