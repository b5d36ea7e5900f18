"""What handing out blocks costs: runs over many small tensors, on threads of one process and on a cluster of this machine.

A Mixture-of-Experts family of tiny matrices has as many tensors as the largest models, and next to no arithmetic. What the
cluster's side takes longer per block is what a block costs to be sent, begun and told of. Both sides in the same run, each in a
process of its own, from an empty delta store to a published version.

    python -m benchmarks.scheduling --work /tmp/scheduling
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.processes import measure

ROWS, WIDTH, VOCABULARY = 32, 64, 64
PARTS = ("gate_proj", "up_proj", "down_proj")
NAMES = ("base", "math", "code", "chinese")
SEED, BASE_SD, DELTA_SD = 0, 0.02, 0.001


def shapes(tensors: int, layers: int) -> dict[str, tuple[int, ...]]:
    """At least this many matrices of experts ``[32, 64]`` in so many layers, and what else a model has."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    experts = -(-tensors // (layers * len(PARTS)))
    for layer in range(layers):
        mlp = f"model.layers.{layer}.mlp"
        found[f"{mlp}.gate.weight"] = (experts, WIDTH)
        for expert in range(experts):
            found |= {
                f"{mlp}.experts.{expert}.{part}.weight": (WIDTH, ROWS) if part == "down_proj" else (ROWS, WIDTH)
                for part in PARTS
            }
    return {**found, "model.norm.weight": (WIDTH,), "lm_head.weight": (VOCABULARY, WIDTH)}


def write_family(work: Path, tensors: int, layers: int) -> Path:
    """A base and its experts, made once; their folder."""
    import torch
    from safetensors.torch import save_file

    folder = work / f"mixture-{tensors}-{layers}"
    if (folder / "complete").is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    generator = torch.Generator().manual_seed(SEED)
    wanted = shapes(tensors, layers)
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": WIDTH, "intermediate_size": ROWS,
        "moe_intermediate_size": ROWS, "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 4,
        "num_experts": -(-tensors // (layers * len(PARTS))), "vocab_size": VOCABULARY, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }  # fmt: skip
    base = {name: torch.randn(shape, generator=generator) * BASE_SD for name, shape in wanted.items()}
    for name in NAMES:
        (folder / name).mkdir(parents=True)
        shift = 0.0 if name == "base" else DELTA_SD
        weights = {
            tensor: (value + shift * torch.randn(value.shape, generator=generator)).to(torch.bfloat16)
            for tensor, value in base.items()
        }
        save_file(weights, folder / name / "model.safetensors", metadata={"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps(config))
    (folder / "complete").touch()
    return folder


def write_recipe(work: Path, tensors: int, layers: int, cluster: dict[str, Any]) -> Path:
    """The recipe of a family of this size."""
    family = write_family(work, tensors, layers)
    fields = {
        "name": "mixture", "base": str(family / "base"), "experts": {name: str(family / name) for name in NAMES[1:]},
        "merge": {"groups": 2}, "output": "./output", "cluster": cluster,
    }  # fmt: skip
    path = work / f"{family.name}.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


@dataclass
class Stage:
    """What was seen of a stage."""

    blocks: int = 0
    began: float = field(default_factory=time.monotonic)
    ended: float = field(default_factory=time.monotonic)


class Clock:
    """A reporter that keeps when each stage was first and last heard of."""

    def __init__(self) -> None:
        self.stages: dict[str, Stage] = {}
        self._lock = threading.Lock()

    def _touch(self, stage: str, blocks: int = 0) -> None:
        with self._lock:
            seen = self.stages.setdefault(stage, Stage())
            seen.blocks += blocks
            seen.ended = time.monotonic()

    def start(self, stage: str, total: int) -> None:
        self._touch(stage, total)

    def skip(self, stage: str, count: int) -> None:
        self._touch(stage)

    def advance(self, stage: str, label: str) -> None:
        self._touch(stage)

    def done(self, stage: str) -> None:
        self._touch(stage)

    def note(self, text: str) -> None:
        pass


def one_side(recipe: Path, cluster: str, target: Path) -> dict[str, Any]:
    """Plan and run in this process: blocks and seconds of every stage."""
    from flows.run import read_recipe, run_recipe
    from pipeline.job import plan_recipe

    read = read_recipe(recipe, None, str(target / "output"), str(target / "deltas"), cluster)
    started = time.monotonic()
    tensors = len(plan_recipe(read).tensors)
    planned = time.monotonic() - started
    clock = Clock()
    started = time.monotonic()
    outcome = run_recipe(read, clock)
    seconds = time.monotonic() - started
    stages = {name: {"blocks": s.blocks, "seconds": s.ended - s.began} for name, s in clock.stages.items()}
    return {"tensors": tensors, "plan": planned, "seconds": seconds, "version": outcome.version, "stages": stages}


def in_own_process(recipe: Path, cluster: str, target: Path) -> dict[str, Any]:
    """One side, of which nothing is left but what it told."""
    shutil.rmtree(target, ignore_errors=True)
    command = [sys.executable, "-m", "benchmarks.scheduling", "--side", cluster, "--recipe", str(recipe), "--work", str(target)]
    try:
        told = measure(command, os.environ, Path.cwd()).output
    finally:
        shutil.rmtree(target, ignore_errors=True)
    found: dict[str, Any] = json.loads(told.splitlines()[-1])
    return found


@dataclass(frozen=True)
class Row:
    """A stage on both sides."""

    stage: str
    blocks: int
    threads_seconds: float
    cluster_seconds: float

    @property
    def overhead_ms(self) -> float | None:
        """Milliseconds that a block takes longer on the cluster; negative where processes beat threads."""
        return 1000 * (self.cluster_seconds - self.threads_seconds) / self.blocks if self.blocks else None


def compare(threads: dict[str, Any], cluster: dict[str, Any]) -> list[Row]:
    """The stages that have blocks, in the order in which they began."""
    if threads["version"] != cluster["version"]:
        raise AssertionError(f"the sides made other versions: {threads['version']}, {cluster['version']}")
    rows = []
    for name, seen in threads["stages"].items():
        other = cluster["stages"].get(name)
        if other and seen["blocks"]:
            rows.append(Row(name, seen["blocks"], seen["seconds"], other["seconds"]))
    return rows


def show(rows: Sequence[Row], threads: dict[str, Any], cluster: dict[str, Any], workers: int) -> None:
    print(f"{threads['tensors']:,} tensors, {len(NAMES) - 1} experts, {workers} workers")
    print(f"plan: {threads['plan']:.2f} s")
    print("\n| stage | blocks | threads, s | cluster, s | overhead per block, ms |\n|---|---:|---:|---:|---:|")
    for row in rows:
        print(f"| {row.stage} | {row.blocks} | {row.threads_seconds:.2f} | {row.cluster_seconds:.2f} | {row.overhead_ms:.1f} |")
    blocks = sum(row.blocks for row in rows)
    whole = 1000 * (cluster["seconds"] - threads["seconds"]) / blocks
    print(f"| whole run | {blocks} | {threads['seconds']:.2f} | {cluster['seconds']:.2f} | {whole:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, help="folder for family and stores (default: a temporary one)")
    parser.add_argument("--tensors", type=int, default=20_000)
    parser.add_argument("--layers", type=int, default=64)
    parser.add_argument("--memory", default="2GiB", help="cluster.memory: less of it makes more blocks")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--side", choices=("none", "local"), help=argparse.SUPPRESS)
    parser.add_argument("--recipe", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(one_side(options.recipe, options.side, options.work)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).absolute()
        cluster_section = {"memory": options.memory, "workers": options.workers}
        in_own_process(write_recipe(work, 1, 1, cluster_section), "none", work / "side-warm")  # compiles, for all that follow
        recipe = write_recipe(work, options.tensors, options.layers, cluster_section)
        threads, cluster = (in_own_process(recipe, side, work / f"side-{side}") for side in ("none", "local"))
    rows = compare(threads, cluster)
    if options.json:
        stages = [{**asdict(row), "overhead_ms": row.overhead_ms} for row in rows]
        print(json.dumps({"plan_seconds": threads["plan"], "stages": stages, "none": threads, "local": cluster}, indent=2))
        return
    show(rows, threads, cluster, options.workers)


if __name__ == "__main__":
    main()
