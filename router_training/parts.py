"""Prepared queries as training and measuring read them: Parquet parts of at most 256 rows, in a fixed order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray


class PreparedQueries(Protocol):
    """Labelled queries; ``router_training.data.Prepared`` of sources."""

    @property
    def experts(self) -> tuple[str, ...]: ...

    @property
    def card(self) -> Mapping[str, Any]: ...

    def parts(self, which: Any) -> tuple[Path, ...]:
        """Parquet files of ``train``, ``validation`` or ``outside``."""
        ...


@dataclass(frozen=True)
class Rows:
    """Queries with their labels, positions among the experts (-1 outside), and their languages, "" where unknown."""

    texts: tuple[str, ...]
    labels: NDArray[np.int32]
    languages: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)


def rows_of(part: bytes) -> Rows:
    """The rows of a part, from the content of its file."""
    table = pq.read_table(pa.BufferReader(part), columns=["text", "label", "language"], use_threads=False)
    texts, labels, languages = (table.column(name) for name in ("text", "label", "language"))
    return Rows(tuple(texts.to_pylist()), labels.to_numpy().astype(np.int32), tuple(languages.to_pylist()))


def count_rows(path: Path) -> int:
    """Rows of a part, from the end of its file."""
    return int(pq.read_metadata(path).num_rows)


def each_part(paths: Iterable[Path]) -> Iterator[Rows]:
    """The rows of parts, one part after the other."""
    for path in paths:
        yield rows_of(path.read_bytes())


def waves(paths: Sequence[Path], most_parts: int, most_bytes: int) -> Iterator[list[bytes]]:
    """The contents of parts in groups, each of at least one part and otherwise within both limits. Order is kept."""
    held: list[bytes] = []
    for path in paths:
        content = path.read_bytes()
        if held and (len(held) >= most_parts or sum(map(len, held)) + len(content) > most_bytes):
            yield held
            held = []
        held.append(content)
    if held:
        yield held
