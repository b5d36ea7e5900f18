"""Peak memory of every stage beside what the plan allows for it: python -m benchmarks.memory --budget 400MiB.

A family with one large matrix is generated. Ingest, similarity and merge run each in a process of its own, and the growth
of its peak resident set over its size at the start is printed beside the budget.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import save_file

from flows.run import run_recipe, workplace
from pipeline.engine import SerialEngine, Silent
from pipeline.job import Job, resolve
from pipeline.memory import return_freed_memory
from pipeline.recipe import load_recipe, parse_bytes
from pipeline.stages.waves import Waves


def resident() -> int:
    """Bytes of this process in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


class Peak:
    """The largest resident set seen by a thread that looks every two milliseconds."""

    def __enter__(self) -> Self:
        self.before = self.largest = resident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.is_set():
            self.largest = max(self.largest, resident())
            time.sleep(0.002)

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self.grown = self.largest - self.before


KINDS = ("rows", "columns", "adapters")
"""How the matrix is stored, (out, in) or (in, out); or (out, in) with LoRA adapters as experts."""
RANK = 64


def write_family(folder: Path, rows: int, width: int, dtype: str, experts: int, kind: str = "rows") -> Path:
    """A base and experts of one matrix inside a block, and a recipe over them."""
    generator = torch.Generator().manual_seed(0)
    name = "h.0.mlp.c_fc" if kind == "columns" else "model.layers.0.mlp.up_proj"
    base = torch.randn(rows, width, generator=generator) * 0.02
    names = [f"expert{i}" for i in range(experts)]
    for place in ("base", *names):
        (folder / place).mkdir()
        if kind == "adapters" and place != "base":
            _write_adapter(folder / place, name, rows, width, generator)
            continue
        weight = base if place == "base" else base + torch.randn(rows, width, generator=generator) * 0.001
        weight = weight.to(getattr(torch, dtype))
        tensors = {f"{name}.weight": weight}
        if kind == "columns":  # whose bias shows what is stored
            tensors = {f"{name}.weight": weight.T.contiguous(), f"{name}.bias": torch.zeros(rows, dtype=weight.dtype)}
        (folder / place / "config.json").write_text('{"model_type": "mistral"}')
        save_file(tensors, folder / place / "model.safetensors")
    recipe = {
        "name": "big",
        "merge": {"groups": min(2, experts)},
        "base": "./base",
        "experts": {n: f"./{n}" for n in names},
        "output": "out",
        "cluster": {"kind": "none"},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return folder / "recipe.yaml"


def _write_adapter(folder: Path, module: str, rows: int, width: int, generator: torch.Generator) -> None:
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["up_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    shapes = {"lora_A": (RANK, width), "lora_B": (rows, RANK)}
    factors = {f"base_model.model.{module}.{k}.weight": torch.randn(s, generator=generator) * 0.01 for k, s in shapes.items()}
    save_file(factors, folder / "adapter_model.safetensors")


STAGES = ("ingest", "similarity", "merge")
"""What is measured; the stages before are found finished in the stores."""


def _ingest(waves: Waves) -> None:
    for expert in waves.incoming:
        waves.ingest(expert)


def in_own_process(job: Job, stage: str) -> int:
    """Run a stage in a forked process, warm but with no memory of an earlier stage to reuse; its growth in bytes."""
    here, there = multiprocessing.get_context("fork").Pipe()

    def work() -> None:
        with Waves(job, SerialEngine(Silent())) as waves:
            stages: dict[str, Callable[[], None]] = {
                "ingest": partial(_ingest, waves),
                "similarity": waves.group,
                "merge": waves.merge,
            }
            for before in STAGES[: STAGES.index(stage)]:
                stages[before]()
            with Peak() as peak:
                stages[stage]()
        there.send(peak.grown)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    there.close()
    grown: int = here.recv()
    process.join()
    return grown


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, int]:
    """Growth of the peak resident set per stage, in bytes."""
    torch.set_num_threads(1)
    return_freed_memory()  # as in a worker
    # everything is imported, and every kernel has run once, before anything is measured: a task does not need that memory
    small = folder / "small"
    small.mkdir()
    run_recipe(load_recipe(write_family(small, 96, 64, arguments.dtype, 2, arguments.kind)), Silent())
    recipe = write_family(folder, arguments.rows, arguments.width, arguments.dtype, arguments.experts, arguments.kind)
    job = resolve(load_recipe(recipe, {"cluster.memory": arguments.budget, "merge.method": "dare"}))
    with workplace(job, Silent()):
        return {stage: in_own_process(job, stage) for stage in STAGES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--kind", choices=KINDS, default="rows")
    parser.add_argument("--budget", default="400MiB")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        grown = measure(Path(folder), arguments)
    budget = parse_bytes(arguments.budget)
    if arguments.json:
        json.dump({"budget": budget, "grown": grown}, sys.stdout)
        return
    size = f"{arguments.rows} x {arguments.width} {arguments.dtype}, {arguments.experts} experts, {arguments.kind}"
    print(f"{size}; budget of a task {budget / 2**20:.0f} MiB")
    for stage in STAGES:
        print(f"{stage:>10}: peak grew by {grown[stage] / 2**20:6.0f} MiB, {grown[stage] / budget:.2f} of the budget")


if __name__ == "__main__":
    main()
