from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from benchmarks.processes import PROGRAM, WORKER, RunError, measure

HELD = 200 << 20
PARENT = """
import multiprocessing, time
from child import hold
if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(target=hold)
    process.start()
    process.join()
    print("done")
"""
CHILD = f"""
import time
def hold():
    held = bytearray({HELD})
    held[::4096] = b"x" * len(held[::4096])
    del held  # what is remembered is the peak, not what is there when someone looks
    time.sleep(1)
"""


def test_the_peak_of_every_kind_of_process_is_kept(tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    (tmp_path / "child.py").write_text(CHILD)
    found = measure([sys.executable, "parent.py"], os.environ, tmp_path, 0.05)
    assert found.output == "done\n"
    assert HELD <= found.largest[WORKER] < HELD + (100 << 20)
    assert 0 < found.largest[PROGRAM] < 100 << 20
    assert set(found.figures()) == {"seconds", "cpu_seconds", "resident", "anonymous"}


def test_a_program_that_fails_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"(?s)ended with status 3:.*out of luck"):
        measure([sys.executable, "-c", "import sys; print('out of luck'); sys.exit(3)"], os.environ, tmp_path)
