"""Files of queries, and a slow account of what becomes of them, made of dicts and sets in one pass."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from router_training.data import Prepared, Row
from router_training.questions import MAX_CHARACTERS, VALIDATION_SHARE, identity
from router_training.sources import Queries, Source

Fields = Mapping[str, Any]


def write_lines(path: Path, rows: Sequence[Fields]) -> Source:
    data = "".join(json.dumps(dict(row)) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return Source(str(path))


def write_parquet(path: Path, rows: Sequence[Fields], group_rows: int = 7) -> Source:
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), path, row_group_size=group_rows)
    return Source(str(path))


def questions(name: str, count: int) -> list[str]:
    return [f"{name} asks number {i} of {name[::-1]}" for i in range(count)]


def example(folder: Path, names: Sequence[str] = ("a", "b"), count: int = 120) -> dict[str, list[Source]]:
    return {
        name: [write_lines(folder / f"{name}.jsonl", [{"text": text} for text in questions(name, count)])] for name in names
    }


def both(prepared: Prepared) -> dict[str, list[Row]]:
    return {"train": list(prepared.rows("train")), "validation": list(prepared.rows("validation"))}


def contents(prepared: Prepared) -> dict[str, bytes]:
    """Every file of the parts."""
    return {path.name: path.read_bytes() for which in ("train", "validation", "outside") for path in prepared.parts(which)}


def _order(seed: int, same: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{same}".encode()).digest()[:16]


def shares(available: Sequence[int], total: int | None) -> list[int]:
    """One after another gets one more, as long as there are any."""
    given = [0] * len(available)
    while sum(given) < min(sum(available), sum(available) if total is None else total):
        least = min(given[e] for e in range(len(given)) if given[e] < available[e])
        given[next(e for e in range(len(given)) if given[e] == least and given[e] < available[e])] += 1
    return given


def components(links: Sequence[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """Digest -> the smallest group of what it is connected with, by going round until nothing changes."""
    together: dict[bytes, set[bytes]] = {}
    for link in links:
        whole = set(link).union(*(together.get(one, set()) for one in link))
        together |= dict.fromkeys(whole, whole)
    groups = {group for _, group in links}
    return {one: min(whole & groups) for one, whole in together.items()}


def _is_held_out(group: bytes) -> bool:
    mixed = int.from_bytes(group[:8], "big")
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = ((mixed ^ (mixed >> shift)) * factor) % 2**64
    return (mixed ^ (mixed >> 31)) < int(VALIDATION_SHARE * 2**64)


def _short(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:16]


def accounted(
    rows: Mapping[str, Sequence[tuple[str, str | None]]], total: int | None, seed: int
) -> dict[str, list[tuple[str, str]]]:
    """Part -> (text, expert) in order, of rows (text, group) by expert; all in memory and one at a time."""
    held: dict[str, dict[str, set[tuple[str, str | None]]]] = {}
    links = []
    for expert, pairs in rows.items():
        for text, group in pairs:
            cut = text[:MAX_CHARACTERS]
            same = identity(cut)
            held.setdefault(same, {}).setdefault(expert, set()).add((cut, group))
            if group is not None and identity(group) != same:
                links.append((_short(same), _short(identity(group))))
    roots = components(links)
    alone = {same: who for same, who in held.items() if len(who) == 1}
    names = sorted(rows)
    quota = dict(zip(names, shares([sum(name in who for who in alone.values()) for name in names], total), strict=True))
    parts: dict[str, list[tuple[str, str]]] = {"train": [], "validation": []}
    for same in sorted(alone, key=lambda one: _order(seed, one)):
        ((expert, found),) = alone[same].items()
        if quota[expert]:
            quota[expert] -= 1
            own = min(text for text, _ in found)
            part = "validation" if _is_held_out(roots.get(_short(same), _short(same))) else "train"
            parts[part].append((own, expert))
    return parts


def section(sources: Mapping[str, Sequence[Source]], **options: Any) -> Queries:
    return Queries(sources, **options)
