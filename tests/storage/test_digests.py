from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from storage import digests
from storage.atomic import write_atomically
from storage.digests import DigestCache, short_id


def test_unchanged_files_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    read: list[Path] = []
    real = digests.sha256_file

    def recorded(path: Path) -> str:
        read.append(path)
        return real(path)

    monkeypatch.setattr(digests, "sha256_file", recorded)
    cache = DigestCache(tmp_path / "cache.json")
    assert cache.sha256([path]) == {path: hashlib.sha256(b"one").hexdigest()}
    assert cache.sha256([path]) == DigestCache(tmp_path / "cache.json").sha256([path])
    assert len(read) == 1


def test_an_edit_in_place_with_the_old_time_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    status = path.stat()
    cache = DigestCache(tmp_path / "cache.json")
    cache.sha256([path])
    path.write_bytes(b"two")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert cache.sha256([path])[path] == hashlib.sha256(b"two").hexdigest()


def test_a_torn_cache_is_only_a_cache(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    (tmp_path / "cache.json").write_bytes(b'{"half')
    assert DigestCache(tmp_path / "cache.json").sha256([path])[path] == hashlib.sha256(b"one").hexdigest()


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    cache = DigestCache(tmp_path / "file" / "cache.json")
    assert cache.sha256([path])[path] == hashlib.sha256(b"one").hexdigest()


def test_ids_depend_on_names_and_contents_not_order() -> None:
    assert short_id({"a": "1", "b": "2"}) == short_id({"b": "2", "a": "1"})
    assert short_id({"a": "1", "b": "2"}) != short_id({"a": "2", "b": "1"})
    assert len(short_id({})) == 40


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    write_atomically(path, b"old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
