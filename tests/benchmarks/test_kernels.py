from __future__ import annotations

import json
import subprocess
import sys


def test_kernels_need_no_memory_beside_their_output() -> None:
    """Whatever the matrix: a core's tiles. The script prints every kernel of both paths."""
    line = [sys.executable, "-m", "benchmarks.kernels", "--rows", "512", "--repeats", "1", "--torch-rows", "8", "--json"]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    paths = {(row["experts"], row["path"], row["kernel"]) for row in found}
    kernels = ("gram", "task_arithmetic", "dare", "ties", "dare_ties")
    assert {(n, path, kernel) for n in (4, 8) for path in ("fused", "torch cpu") for kernel in kernels} <= paths
    for row in found:
        assert row["entries_per_second"] > 0
        if row["path"] == "fused":
            assert 0 <= row["extra_bytes"] < 64 * 2**20
