"""What is fetched is what was forecast, to the byte."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from pipeline import memory
from pipeline.forecast import fetched_bytes
from pipeline.plan import plan_blocks
from pipeline.stages.ingest import IngestTask, ingest_block
from storage import layout
from storage.arrays import ArrayGroup
from storage.local_store import LocalStore
from storage.tensors import FileRows, LowRank, TensorInfo

READ: list[int] = []


@dataclass(frozen=True)
class CountingFile:
    """A file of noise that counts what is read of it."""

    size: int = 1 << 24

    @property
    def place(self) -> str:
        return "noise"

    def read_into(self, view: memoryview, offset: int) -> int:
        READ.append(len(view))
        values = np.random.default_rng(offset).standard_normal(len(view) // 4).astype("<f4")
        view[: 4 * len(values)] = values.tobytes()
        return len(view)


def noise(name: str, shape: tuple[int, ...], axis: int = 0, offset: int = 0) -> TensorInfo:
    return TensorInfo(name, "F32", shape, FileRows(CountingFile(), offset), axis)


@pytest.mark.parametrize("budget", [40_000, 200_000, 10**9])
@pytest.mark.parametrize(
    "info",
    [
        noise("rows", (300, 16)),
        noise("columns", (16, 300), 1),
        noise("packed", (7, 16, 23), 2),
        noise("packed in rows", (7, 23, 16), 1),
        TensorInfo("adapter", "F32", (300, 16), LowRank(noise("a", (4, 16)), noise("b", (300, 4)), 0.5)),
        TensorInfo("embedding", "F32", (300, 16), LowRank(noise("a", (4, 300)), noise("b", (16, 4)), 0.5, True)),
    ],
    ids=lambda info: info.name if isinstance(info, TensorInfo) else None,
)
def test_ingest_reads_what_was_forecast(info: TensorInfo, budget: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "CHUNK_ELEMENTS", 20 * 16)
    base = TensorInfo(info.name, "F32", info.shape, FileRows(_Zeros(), 0), 0)
    base = base if info.channel_axis == 0 else TensorInfo("base", "F32", (info.rows, info.width), FileRows(_Zeros(), 0), 0)
    group = ArrayGroup(LocalStore(tmp_path / "group"))
    READ.clear()
    blocks = plan_blocks([info], memory.block_elements(budget, 1))
    for block in blocks:
        ingest_block(IngestTask(group, block, {info.name: (info, base)}))
    assert sum(READ) == fetched_bytes([info], budget)
    if budget == 40_000 and info.name == "packed":
        assert len(blocks) == 1  # a piece is eight matrices at least


@dataclass(frozen=True)
class _Zeros:
    size: int = 1 << 24

    @property
    def place(self) -> str:
        return "zeros"

    def read_into(self, view: memoryview, offset: int) -> int:
        view[:] = bytes(len(view))
        return len(view)
