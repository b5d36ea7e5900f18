"""What preparing queries takes, and whether all of them are ever in memory: python -m benchmarks.queries [--rows N …].

Four experts' files of JSON Lines are written, with phrasings of shared questions, and prepared in a process of their own,
without Dask and in Dask's threads; seconds, and the most memory that the process held beyond what importing its packages takes.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

from router_training.data import prepare
from router_training.sources import Queries, Source
from router_training.tasks import here, on_dask

EXPERTS = 4
PHRASINGS = 20
"""Rows that name the same question."""


def write(folder: Path, rows: int) -> int:
    """Write the experts' files; their bytes. Words differ by expert, lengths vary, a tenth of the rows repeat others."""
    draw = random.Random(0)  # noqa: S311 - text, not secrets
    words = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in ("a", "e", "io", "u") for c in ("n", "rt", "l", "sk", "m", "")]
    for expert in range(EXPERTS):
        own = words[expert * 60 :] + words[:40]
        with (folder / f"{expert}.jsonl").open("w") as file:
            for row in range(rows // EXPERTS):
                if row % 10:
                    text = " ".join(draw.choices(own, k=draw.randint(10, 120))) + f" {row}"
                else:
                    text = f"what is {expert} {row // 100}"
                question = f"question {expert} {row // PHRASINGS}"
                file.write(json.dumps({"query": text, "question": question, "answer": "x" * 300}) + "\n")
    return sum(path.stat().st_size for path in folder.iterdir())


def _memory(line: str) -> int:
    """Bytes of memory of this process: VmRSS, what it holds, or VmHWM, the most since ``_forget``."""
    found = next(text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith(line))
    return int(found.split()[1]) * 1024


def _forget() -> None:
    """Begin anew with the most memory; ru_maxrss cannot, and of a new process it is its parent's."""
    Path("/proc/self/clear_refs").write_text("5")


def _measured(folder: Path, target: Path, total: int | None, with_dask: bool) -> tuple[float, int, int]:
    """Seconds, bytes beyond the imports, rows kept."""
    import dask  # noqa: F401 - it, and those below, are held before anything is read
    import pyarrow.parquet  # noqa: F401
    import scipy.sparse.csgraph  # noqa: F401

    _forget()
    before, started = _memory("VmRSS"), time.monotonic()
    sources = {str(e): [Source(str(folder / f"{e}.jsonl"), column="query", group="question")] for e in range(EXPERTS)}
    found = prepare(Queries(sources, total=total), 0, target, on_dask if with_dask else here)
    kept = sum(sum(counts.values()) for counts in found.counts.values())
    return time.monotonic() - started, _memory("VmHWM") - before, kept


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 300_000, 1_000_000])
    asked = parser.parse_args(arguments)
    print("| rows read | bytes | total | kept | run by | seconds | memory, MiB |\n|---:|---:|---:|---:|---|---:|---:|")
    for rows in asked.rows:
        with TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "sources").mkdir()
            size = write(folder / "sources", rows)
            for total in (50_000, None):
                for with_dask in (False, True):
                    with get_context("spawn").Pool(1) as pool:
                        call = (folder / "sources", folder / f"prepared-{total}-{with_dask}", total, with_dask)
                        seconds, memory, kept = pool.apply(_measured, call)
                    runner = "Dask's threads" if with_dask else "one thread"
                    cells = [f"{rows:,}", f"{size / 1e6:.0f} MB", f"{total or 'all'}", f"{kept:,}", runner, f"{seconds:.1f}"]
                    print("|", " | ".join([*cells, f"{memory / 2**20:.0f}"]), "|", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
