"""What ``channel-merge clean`` does: the places of a recipe, and what it prints of their leftovers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flows.output import counted, size
from flows.run import read_recipe
from storage import cleaning
from storage.cleaning import Cleaned
from storage.stores import open_store

_SOURCES: Mapping[str, Any] = {
    "base": "any/base",
    "experts": {"first": "any/expert", "second": "any/expert"},
    "merge": {},
    "router": {"kind": "none"},
}
"""Stands for what is merged, and how: a recipe whose sources are gone can still be cleaned up after."""


def clean_up(
    recipe: Path,
    settings: Mapping[str, Any],
    output: str | None,
    deltas: str | None,
    days: float,
    *,
    delete: bool,
    tell: Callable[[str], None],
) -> Cleaned:
    """Find the leftovers of a recipe's delta store and output, and remove them with ``delete``. Only its places are read.

    RecipeError for places that cannot be meant; StoreError for those that cannot be reached.
    """
    kept = {key: value for key, value in settings.items() if key.partition(".")[0] not in _SOURCES}
    places = read_recipe(recipe, {**kept, **_SOURCES}, output, deltas)
    return cleaning.clean(open_store(places.deltas), open_store(places.output), days, delete=delete, tell=tell)


def document(found: Cleaned) -> dict[str, Any]:
    """For scripts."""
    listed = [
        {"place": one.place, "kind": one.kind, "bytes": one.bytes, "files": one.files, "reason": one.reason}
        for one in found.leftovers
    ]
    total = sum(one.bytes for one in found.leftovers)
    return {"leftovers": listed, "bytes": total, "notes": [*found.notes], "removed": found.removed}


HEADINGS = ("size", "kind", "reason", "place")


def table(found: Cleaned) -> Sequence[Sequence[str]]:
    """A row per leftover."""
    return [[size(one.bytes), one.kind, one.reason, one.place] for one in found.leftovers]


def totals(found: Cleaned) -> list[str]:
    """What it comes to."""
    notes = [f"note: {note}" for note in found.notes]
    if not found.leftovers:
        return [*notes, "nothing to remove"]
    files, total = sum(one.files for one in found.leftovers), sum(one.bytes for one in found.leftovers)
    summed = f"{counted(len(found.leftovers), 'leftover')}, {counted(files, 'file')}, {size(total)}"
    return [*notes, f"{summed}: removed"] if found.removed else [*notes, summed, "dry run: nothing was removed; add --delete"]
