from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from numpy.typing import NDArray

from pipeline.kernels import compiled as module
from pipeline.kernels.compiled import compiled, over_rows


def _doubled(values: NDArray[np.int64]) -> None:
    for j in range(len(values)):
        values[j] *= 2


def test_one_process_at_a_time_adds_compiled_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While another holds the folder, code that was compiled waits to be written; then it is, and runs."""
    monkeypatch.setattr(module, "_cache_folder", lambda: tmp_path)
    function, values = compiled(_doubled), np.arange(3)
    with FileLock(tmp_path / "lock"):
        thread = threading.Thread(target=function, args=(values,))
        thread.start()
        thread.join(timeout=5)
        assert thread.is_alive()
        assert values.tolist() == [0, 1, 2]
    thread.join()
    assert values.tolist() == [0, 2, 4]
    assert list(tmp_path.rglob("*.nbc"))


def test_ranges_cover_all_rows_once() -> None:
    for rows in (0, 1, 2, 7, 100):
        for threads in (1, 2, 5):
            seen = np.zeros(rows, np.int64)

            def mark(start: int, stop: int, seen: NDArray[np.int64] = seen) -> None:
                seen[start:stop] += 1

            over_rows(mark, rows, threads)
            assert (seen == 1).all()
