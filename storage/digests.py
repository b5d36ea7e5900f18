"""Digests of files and sources, cached by (path, size, times, inode) so that a second run reads nothing twice."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock
from platformdirs import user_cache_path

from storage.atomic import canonical_json, write_atomically

ID_LENGTH = 40


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(value: Any) -> str:
    """Hex sha256 of a JSON value in its canonical form."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def short_id(files: Mapping[str, str]) -> str:
    """A source's id: sha256 over its sorted (file name, sha256), cut to the length of a Git commit."""
    return digest_of(sorted(files.items()))[:ID_LENGTH]


def stamp(path: Path) -> list[int]:
    """What changes when a file is edited: size, modification and change time in ns, inode."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


class DigestCache:
    """sha256 of files, remembered across runs. An edited file has another size, time or inode and is read again."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or user_cache_path("channel-merging") / "digests.json"

    def _load(self) -> dict[str, list[Any]]:
        try:
            known = json.loads(self.path.read_bytes())
        except (OSError, ValueError):  # no cache yet, or one torn by another program: it is only a cache
            return {}
        return known if isinstance(known, dict) else {}

    def sha256(self, paths: list[Path]) -> dict[Path, str]:
        """sha256 of every path, reading only those that changed since they were last asked for."""
        known = self._load()
        found: dict[Path, str] = {}
        unknown: dict[Path, list[int]] = {}
        for path in paths:
            resolved = path.resolve()
            key = stamp(resolved)
            entry = known.get(str(resolved))
            if isinstance(entry, list) and entry[:-1] == key:
                found[path] = entry[-1]
            else:
                unknown[path] = key
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            digests = list(pool.map(sha256_file, (path.resolve() for path in unknown)))
        found |= dict(zip(unknown, digests, strict=True))
        fresh = {str(path.resolve()): [*key, found[path]] for path, key in unknown.items()}
        if fresh:
            with suppress(OSError):  # a place that cannot be written costs time, not the run
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with FileLock(f"{self.path}.lock"):
                    write_atomically(self.path, canonical_json({**self._load(), **fresh}))
        return found
