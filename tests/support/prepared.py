"""Prepared queries of given texts, as ``router_training.data`` would leave them: to train and measure without sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

ROWS = 256
"""Of one part."""
Labelled = tuple[str, int] | tuple[str, int, str]
"""Text, label and language."""


@dataclass(frozen=True)
class Written:
    """Parts in a folder."""

    experts: tuple[str, ...]
    folder: Path
    card: Mapping[str, Any] = field(default_factory=dict)

    def parts(self, which: str) -> tuple[Path, ...]:
        return tuple(sorted(self.folder.glob(f"{which}-*.parquet")))


def write_parts(folder: Path, which: str, rows: Sequence[Labelled]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, len(rows), ROWS)):
        block = [(*row, "")[:3] for row in rows[start : start + ROWS]]
        texts, labels, languages = (list(column) for column in zip(*block, strict=True))
        table = pa.table({"text": texts, "label": pa.array(labels, pa.int32()), "language": languages})
        pq.write_table(table, folder / f"{which}-{number:05d}.parquet")


def written(
    folder: Path,
    experts: Sequence[str],
    train: Sequence[Labelled],
    validation: Sequence[Labelled] = (),
    outside: Sequence[Labelled] = (),
) -> Written:
    """Parts of these rows, in this order."""
    for which, rows in (("train", train), ("validation", validation), ("outside", outside)):
        write_parts(folder, which, rows)
    return Written(tuple(experts), folder, {"sources": {}, "counts": {}})
