"""Speed of the kernels beside that of copying memory: python -m benchmarks.kernels [--threads 2] [--repeats 7].

Per matrix, number of experts and method: million entries of the matrix a second, bytes of weights read and written a second
((N + 1) rows in, the pool's K rows out per channel), and that in the speed of a memory copy measured in the same rounds.
Groups are drawn at random; groups of one are exact copies, as by default. Torch's operators do the same work beside it, on a
part of the rows, on the CPU and, where there is one, on a GPU; there the copy is one of the GPU's memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.memory import Peak
from pipeline.kernels.compiled import over_rows
from pipeline.kernels.forms import COMBINED, COPY_EXPERT, Combining, PoolRows, Pruning, in_order_of_channel
from pipeline.kernels.fused import merging as fused
from pipeline.kernels.fused import tables as fused_tables
from pipeline.kernels.fused.floats import tagged
from pipeline.kernels.masks import limit_of, mask_key
from pipeline.kernels.merging import merge_rows
from pipeline.kernels.methods import catalogue
from pipeline.kernels.partitions import drawn_partition
from pipeline.kernels.tables import table
from pipeline.memory import return_freed_memory

SHAPES = ((4096, 4096), (14336, 4096))
GROUPS = ((4, 2), (8, 3))
METHODS = ("task_arithmetic", "dare", "ties", "dare_ties")
DENSITY = 0.7
TORCH_ROWS = 512
COPIED = 1 << 28


@dataclass(frozen=True)
class Problem:
    """A matrix of a base, its experts' differences, and a grouping."""

    base: NDArray[np.uint16]
    stored: NDArray[np.int16]
    rows: PoolRows
    thresholds: NDArray[np.float32]

    @property
    def moved(self) -> int:
        """Bytes of weights in and out."""
        return int(self.base.nbytes + self.stored.nbytes + len(self.rows.users) * self.base.shape[1] * 2)

    def part(self, rows: int) -> Problem:
        """The first rows alone."""
        stop = int(self.rows.starts[rows])
        order = np.argsort(self.rows.places[:stop], kind="stable")
        places = np.empty(stop, np.int64)
        places[order] = np.arange(stop)
        kept = PoolRows(
            self.rows.starts[: rows + 1], self.rows.users[:stop], self.rows.kinds[:stop], places, self.rows.factors[:stop]
        )
        return Problem(self.base[:rows], np.ascontiguousarray(self.stored[:, :rows]), kept, self.thresholds)


def make_problem(shape: tuple[int, int], experts: int, groups: int) -> Problem:
    """bf16 weights of sd 0.02, experts of sd 0.001 around them, a random partition into exactly K groups per channel."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=generator).mul_(0.02).bfloat16()
    bits = base.view(torch.int16).numpy()
    stored = np.empty((experts, *shape), np.int16)
    thresholds = np.empty((1, experts), np.float32)
    for n in range(experts):
        expert = (base.float() + torch.randn(shape, generator=generator).mul_(0.001)).bfloat16()
        stored[n] = expert.view(torch.int16).numpy() - bits
        sample = (expert.float() - base.float()).abs().reshape(-1)[: 1 << 20]
        thresholds[0, n] = sample.kthvalue(round((1 - DENSITY) * len(sample))).values
    draws = np.random.default_rng(0).integers(0, 2**32, shape[0])
    labels = drawn_partition(draws, experts, groups)
    channels, users, kinds = [], [], []
    for channel, found in enumerate(labels):
        for group in range(groups):
            who = np.flatnonzero(found == group)
            channels.append(channel)
            users.append(sum(1 << int(n) for n in who))
            kinds.append(COPY_EXPERT if len(who) == 1 else COMBINED)
    order = np.lexsort((channels, users))
    sizes = np.array([one.bit_count() for one in users])[order]
    rows = in_order_of_channel(
        np.array(channels)[order], np.array(users, np.uint64)[order], np.array(kinds, np.uint8)[order],
        (1 / sizes).astype(np.float32), shape[0],
    )  # fmt: skip
    return Problem(bits.view(np.uint16), stored, rows, thresholds)


def told(problem: Problem, method: str) -> tuple[Pruning, Combining]:
    """What the kernels are told for a method."""
    count = len(problem.stored)
    kinds = catalogue.method(method, DENSITY, "merged").form
    keys = np.array([mask_key(0, f"expert{n}", "matrix") for n in range(count)], np.uint32)
    pruning = Pruning(kinds[0], keys, limit_of(DENSITY), np.full(count, 1 / DENSITY, np.float32), problem.thresholds, 0)
    return pruning, Combining(kinds[1], True, np.ones((1, count), np.float32))


def fused_runs(problem: Problem, threads: int, out: NDArray[np.uint16]) -> dict[str, Callable[[], object]]:
    """The compiled path: Gram matrices and every method."""
    base = tagged(problem.base, "BF16")
    runs: dict[str, Callable[[], object]] = {}
    runs["gram"] = lambda: fused_tables.table(base, problem.stored, 0, "gram", threads)
    for method in METHODS:
        pruning, combining = told(problem, method)
        runs[method] = partial(fused.merge_rows, base, problem.stored, 0, problem.rows, pruning, combining, out, threads)
    return runs


def torch_runs(problem: Problem, device: str) -> dict[str, Callable[[], object]]:
    """The same by torch's operators; on a GPU what travels there and back counts, as it does in a run."""
    out = np.empty((len(problem.rows.users), problem.base.shape[1]), np.uint16)
    own = [problem.base + stored.view(np.uint16) for stored in problem.stored]
    types = ["BF16"] * len(own)
    runs: dict[str, Callable[[], object]] = {}

    def gram() -> None:
        origin = torch.from_numpy(problem.base.view(np.int16)).to(device).view(torch.bfloat16).float()
        deltas = [torch.from_numpy(x.view(np.int16)).to(device).view(torch.bfloat16).float() - origin for x in own]
        table(torch.stack(deltas), "gram").cpu()

    runs["gram"] = gram
    for method in METHODS:
        pruning, combining = told(problem, method)
        found = catalogue.method(method, DENSITY, "merged")
        runs[method] = partial(
            merge_rows, problem.base, own, types, "BF16", problem.rows, found, pruning, combining, out, device
        )
    return runs


def timed(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def rounds(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each, measured in turn so that all see the same machine; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(repeats + 1):
        for name, run in runs.items():
            took = timed(run)
            if number:
                seconds[name].append(took)
    return {name: statistics.median(found) for name, found in seconds.items()}


def copying(threads: int) -> Callable[[], object]:
    """A copy of 256 MiB by as many threads as the kernels have."""
    source, target = np.ones(COPIED, np.uint8), np.zeros(COPIED, np.uint8)
    return lambda: over_rows(lambda start, stop: np.copyto(target[start:stop], source[start:stop]), COPIED, threads)


def gpu_copy_speed() -> float:
    """Bytes a second, in and out, of a copy inside the GPU's memory."""
    source = torch.ones(COPIED * 4, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds = []
    for _ in range(6):
        torch.cuda.synchronize()
        started = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * len(source) / min(seconds)


def measure(
    shape: tuple[int, int], groups: tuple[int, int], threads: int, repeats: int, torch_rows: int
) -> list[dict[str, Any]]:
    """One row of figures per path and kernel."""
    problem = make_problem(shape, *groups)
    out = np.zeros((len(problem.rows.users), shape[1]), np.uint16)
    runs = {"memory copy": copying(threads), **fused_runs(problem, threads, out)}
    seconds = rounds(runs, repeats)
    with Peak() as peak:
        for run in fused_runs(problem, threads, out).values():
            run()
    speed = 2 * COPIED / seconds["memory copy"]
    read = problem.base.nbytes + problem.stored.nbytes
    label = {"matrix": f"{shape[0]}x{shape[1]}", "experts": groups[0], "groups": groups[1]}
    found = [
        {
            **label, "path": "fused", "kernel": name, "entries_per_second": shape[0] * shape[1] / seconds[name],
            "bytes_per_second": (read if name == "gram" else problem.moved) / seconds[name],
            "copy_bytes_per_second": speed, "extra_bytes": peak.grown,
        }
        for name in runs if name != "memory copy"
    ]  # fmt: skip
    some = min(torch_rows, shape[0])
    part = problem.part(some)
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        own_speed = speed if device == "cpu" else gpu_copy_speed()
        for name, took in rounds(torch_runs(part, device), 2).items():
            moved = part.moved if name != "gram" else part.base.nbytes + part.stored.nbytes
            found.append(
                {
                    **label, "path": f"torch {device}", "kernel": name,
                    "entries_per_second": some * shape[1] / took, "bytes_per_second": moved / took,
                    "copy_bytes_per_second": own_speed, "extra_bytes": None,
                }
            )  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--rows", type=int, help="rows of one matrix of 4096 columns, instead of the two shapes")
    parser.add_argument("--torch-rows", type=int, default=TORCH_ROWS, help="rows that torch's operators are given")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    return_freed_memory()
    torch.set_num_threads(arguments.threads)
    shapes = ((arguments.rows, 4096),) if arguments.rows else SHAPES
    found = [
        row
        for shape in shapes
        for groups in GROUPS
        for row in measure(shape, groups, arguments.threads, arguments.repeats, arguments.torch_rows)
    ]
    if arguments.json:
        json.dump(found, sys.stdout)
        return
    print(f"bf16, {arguments.threads} threads; medians of {arguments.repeats} rounds, torch on {arguments.torch_rows} rows")
    print("| matrix | N, K | kernel | path | Mparam/s | GB/s | of memory copy | extra MiB |")
    print("|---|---|---|---|---:|---:|---:|---:|")
    for row in found:
        extra = "" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 2**20:.0f}"
        print(
            f"| {row['matrix']} | {row['experts']}, {row['groups']} | {row['kernel']} | {row['path']} | "
            f"{row['entries_per_second'] / 1e6:.0f} | {row['bytes_per_second'] / 1e9:.1f} | "
            f"{100 * row['bytes_per_second'] / row['copy_bytes_per_second']:.0f} % | {extra} |"
        )


if __name__ == "__main__":
    main()
