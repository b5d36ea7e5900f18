from __future__ import annotations

import json
import subprocess
import sys

import pytest

from pipeline import memory


@pytest.mark.parametrize(
    ("experts", "budget", "kind"), [(4, 345, "rows"), (1, 205, "rows"), (4, 345, "columns"), (4, 345, "adapters")]
)
def test_measured_peaks_stay_under_the_budget(experts: int, budget: int, kind: str) -> None:
    """fp32 matrices of 64 MiB per expert, hardly more than a chunk allowed: each stage's process grows by less."""
    line = [sys.executable, "-m", "benchmarks.memory", "--dtype", "float32", "--rows", "8192", "--json"]
    line += ["--experts", str(experts), "--budget", f"{budget}MiB", "--kind", kind]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["budget"] == budget * 2**20
    for stage in ("ingest", "similarity", "merge"):
        assert 0 < found["grown"][stage] <= found["budget"], stage


def test_the_model_counts_what_a_task_holds() -> None:
    """Four experts and the base, fp32, and four copies of a chunk while it is decoded."""
    assert memory.chunk_bytes(1000, 4) == 1000 * 4 * (4 + 1 + 4)
    assert memory.element_bytes(4) == 4 * 20 + 16 + 64


@pytest.mark.parametrize("experts", [1, 4, 8])
def test_larger_budgets_never_shrink_a_slice(experts: int) -> None:
    sizes = [memory.slice_rows(budget, 512, 4096, experts) for budget in range(2**27, 2**31, 2**25)]
    assert sizes == sorted(sizes)
    assert sizes[-1] * 4096 <= memory.SLICE_ELEMENTS
