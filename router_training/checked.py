"""What has been checked is not checked again: sources that were found fit to prepare, remembered across runs.

A run on a schedule meets the same commits and digests every time; it must not read a million rows, or fetch the beginning of
every data set, to find that nothing has changed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock
from platformdirs import user_cache_path

from router_training.sources import Part, QuerySection
from storage.atomic import canonical_json, write_atomically
from storage.digests import DigestCache, digest_of

RULES = 1
"""Of what is refused; another release may refuse more."""
KEPT = 200
"""Sections that are remembered, the latest."""
SETTINGS = ("config", "split", "column", "messages", "group", "language", "limit")


def key_of(section: QuerySection, parts: Sequence[Part]) -> str | None:
    """What identifies content and settings of pinned sources; None when a file cannot be read."""
    files = [Path(part.spec.source) for part in parts if part.is_local]
    try:
        digests = DigestCache().sha256(files)
    except OSError:
        return None
    content: list[Any] = []
    for part in parts:
        identity = digests[Path(part.spec.source)] if part.is_local else part.streams[0].place
        read_as = [stream.format for stream in part.streams[:1]]
        content.append([part.label, identity, read_as, *(getattr(part.spec, name) for name in SETTINGS)])
    return digest_of([RULES, section.total, section.bad_share, content])


class Checked:
    """Keys of sections that were found fit."""

    def __init__(self) -> None:
        self.path = user_cache_path("channel-merging") / "checked-queries.json"

    def _load(self) -> list[str]:
        try:
            known = json.loads(self.path.read_bytes())
        except (OSError, ValueError):  # no cache yet, or one torn by another program: it is only a cache
            return []
        return [key for key in known if isinstance(key, str)] if isinstance(known, list) else []

    def has(self, key: str | None) -> bool:
        return key is not None and key in self._load()

    def add(self, key: str | None) -> None:
        """Remember a key. A place that cannot be written costs time, not the run."""
        if key is None:
            return
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self.path}.lock"):
                others = [known for known in self._load() if known != key]
                write_atomically(self.path, canonical_json([*others, key][-KEPT:]))
