"""The compiled kernels' scratch memory lives as long as they use it.

Arrays are taken from their owners before the inner loops (see ``compiled.unowned``), and numba frees an owner after its last
use. Freed scratch goes unnoticed until another thread of the same allocator gets it: here two threads ask for nothing else.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys, threading
import numpy as np
from numba import njit
from pipeline.kernels.forms import COMBINED, ELECT, MASK, Combining, PoolRows, Pruning
from pipeline.kernels.fused import merging, sizes, tables
from pipeline.kernels.fused.floats import tagged
from pipeline.kernels.sizes import BINS

@njit(nogil=True)
def ask(times, length):
    total = 0.0
    for _ in range(times):
        other = np.empty(length, np.float32)
        other[:] = 1e30
        total += other[0]
    return total

generator = np.random.default_rng(0)
ROWS, WIDTH, EXPERTS = 16, 2048, 4
bits = lambda x: (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
weights = generator.normal(size=(ROWS, WIDTH)) * 0.02
base = bits(weights)
experts = np.stack([bits(weights + generator.normal(size=weights.shape) * 0.001) for _ in range(EXPERTS)])
stored = (experts - base).view(np.int16)

def measure():
    squares, ignored, counts = np.zeros(ROWS), np.zeros(ROWS), np.zeros(BINS, np.int64)
    top = sizes.measure(tagged(experts[0], "BF16"), tagged(base, "BF16"), ROWS, squares, ignored, counts)
    return [top, *squares]

def row_thresholds():
    out = np.empty((ROWS, EXPERTS), np.float32)
    sizes.row_thresholds(tagged(base, "BF16"), stored, 0, 700, out)
    return out.ravel().tolist()

def row_masses():
    out = np.empty((ROWS, 2))
    sizes.row_masses(tagged(base, "BF16"), stored, 0, 1, np.array([1, 2], np.uint32), 1 << 31, 0, out)
    return out.ravel().tolist()

def table():
    return tables.table(tagged(base, "BF16"), stored, 0, "gram").ravel().tolist()

def merge_rows():
    channels = np.arange(ROWS)
    rows = PoolRows(
        np.arange(ROWS + 1), np.full(ROWS, 15, np.uint64), np.full(ROWS, COMBINED, np.uint8), channels,
        np.full(ROWS, 0.25, np.float32),
    )
    keys = np.arange(2 * EXPERTS, dtype=np.uint32).reshape(EXPERTS, 2)
    scales, none = np.full(EXPERTS, 2, np.float32), np.zeros((1, EXPERTS), np.float32)
    out = np.empty((ROWS, WIDTH), np.uint16)
    found = Pruning(MASK, keys, 1 << 31, scales, none, 0)
    ways = Combining(ELECT, True, np.ones((1, EXPERTS), np.float32))
    errors, bad = merging.merge_rows(tagged(base, "BF16"), stored, 0, rows, found, ways, tagged(out, "BF16"))
    return [*errors.ravel().tolist(), *out.ravel().tolist()]

work = globals()[sys.argv[1]]
expected = work()
for length in (512, 1024, 2048, 4096):
    ask(1, length)
stop = False

def other(length):
    while not stop:
        ask(2000, length)

lengths = [int(text) for text in sys.argv[2].split(",")]
threads = [threading.Thread(target=other, args=(length,)) for length in lengths]
for thread in threads:
    thread.start()
wrong = sum(work() != expected for _ in range(int(sys.argv[3])))
stop = True
for thread in threads:
    thread.join()
print(wrong)
"""


@pytest.mark.parametrize("kernel", ["measure", "row_thresholds", "row_masses", "table", "merge_rows"])
def test_scratch_is_nobody_elses(kernel: str, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    line = [sys.executable, str(program), kernel, "512,520,2048,4128,5120", "1500"]
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=environment)
    assert (done.stdout.strip(), done.stderr) == ("0", "")
