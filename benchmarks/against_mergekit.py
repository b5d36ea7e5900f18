"""The same merges by mergekit and by this project, as whole programs: python -m benchmarks.against_mergekit.

A base and four experts of random numbers are generated, and mergekit is installed into an environment of its own. Measured
from outside are wall time and peak memory of each program with all its processes. ``K=1`` does mergekit's work: one
model, all tensors merged. ``K=2`` is what mergekit cannot do: two groups per channel, embeddings, head and norms private.
``cold`` starts with no delta store and no cached digest of a source; ``warm`` finds both, as the second run of a sweep does.
Everything of ours counts: imports, hashing, ingest, start of the cluster, packing, publishing. Only code that is compiled
once per installation, as mergekit's is when pip installs it, is compiled before.

At K=1 the results are compared entry by entry; DARE draws other masks, so there only mean and spread of the deltas are.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.comparison import differences, spreads
from benchmarks.families import SHAPES, Family, write_family
from benchmarks.processes import Measured, RunError, measure

ROOT = Path(__file__).resolve().parent.parent
EXPERTS, DENSITY = 4, 0.7
PINS = (
    "mergekit==0.1.5", "accelerate==1.15.0", "datasets==5.2.0", "dill==0.4.1", "immutables==0.21", "multiprocess==0.70.19",
    "peft==0.21.2", "protobuf==7.36.2", "sentencepiece==0.2.3", "xxhash==4.1.0",
)  # fmt: skip
"""mergekit, and what it needs that the project's constraints do not name; torch is the project's own version."""


@dataclass(frozen=True)
class Method:
    """One merge in both programs' words, chosen so that the formulas agree."""

    name: str
    """mergekit's."""
    shared: Mapping[str, Any]
    """mergekit's parameters for the whole merge."""
    each: Mapping[str, Any]
    """mergekit's parameters for every expert, beside the weight."""
    ours: Mapping[str, Any]


METHODS = {
    "task_arithmetic": Method("task_arithmetic", {"normalize": False, "lambda": 1.0}, {}, {}),
    "dare": Method(  # the paper's rescaling by 1 / density
        "dare_linear", {"normalize": False, "rescale": False, "lambda": 1 / DENSITY}, {"density": DENSITY}, {"density": DENSITY}
    ),
    "ties": Method("ties", {"normalize": True}, {"density": DENSITY}, {"density": DENSITY, "trim_scope": "tensor"}),
}
RUNS = {1: {"K=1 cold": True, "K=1 warm": False}, 2: {"K=2 cold": True, "K=2 warm": False}}
"""Ours: K -> run -> whether stores and caches are emptied before."""
OURS = [run for runs in RUNS.values() for run in runs]
THEIRS = "mergekit"


@dataclass
class Found:
    """What one method came to."""

    runs: dict[str, list[Measured]] = field(default_factory=dict)
    stages: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    """Per run of ours the seconds per stage, from the manifest."""
    difference: dict[str, Any] | None = None

    def median(self, run: str, figure: str) -> float | None:
        values = [measured.figures()[figure] for measured in self.runs.get(run, ())]
        return statistics.median(values) if values else None


def note(text: str) -> None:
    """Progress and failures, apart from the tables."""
    print(text, file=sys.stderr, flush=True)


def install_mergekit(work: Path) -> Path | None:
    """The program mergekit-yaml in an environment of its own, made once; None, with the reason printed, when that fails."""
    constraints = ROOT / "constraints.txt"
    key = hashlib.sha256("\n".join([*PINS, constraints.read_text()]).encode()).hexdigest()[:12]
    folder = work / f"mergekit-{key}"
    if not (folder / "complete").is_file():
        note("installing mergekit into an environment of its own")
        shutil.rmtree(folder, ignore_errors=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        commands = ([sys.executable, "-m", "venv", str(folder)], [*pip, "--constraint", str(constraints), *PINS])
        for command in commands:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-5:])
                note(f"mergekit could not be installed; only our side is measured:\n{tail}")
                return None
        (folder / "complete").touch()
    return folder / "bin" / "mergekit-yaml"


class Bench:
    """Folders and programs of one comparison."""

    def __init__(self, work: Path, family: Family, mergekit: Path | None, drop_caches: bool, cluster: str) -> None:
        self.family, self.mergekit, self.drop_caches, self.cluster = family, mergekit, drop_caches, cluster
        self.theirs, self.ours, self.deltas, self.cache = (work / n for n in ("theirs", "ours", "deltas", "cache"))
        self.exported, self.configs = work / "exported", work / "configs"
        self.configs.mkdir(exist_ok=True)
        hidden = {"PYTHONPATH", "CUDA_VISIBLE_DEVICES"}
        self.environment = {k: v for k, v in os.environ.items() if k not in hidden}
        # both on the CPU, neither looks for anything on the network
        self.environment |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
        self.our_environment = {**self.environment, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(self.cache)}

    def settle(self) -> None:
        """The same page cache before every run: all sources in it, or nothing at all."""
        os.sync()
        if self.drop_caches:
            Path("/proc/sys/vm/drop_caches").write_text("3")
            return
        for folder in self.family.checkpoints:
            with (folder / "model.safetensors").open("rb", buffering=0) as file:
                while file.read(1 << 24):
                    pass

    def run_mergekit(self, program: Path, method: Method) -> Measured:
        """One merge by mergekit, with the options that are fastest on a CPU; sums in float32, as ours."""
        each = {"weight": 1 / EXPERTS, **method.each}
        config = {
            "merge_method": method.name,
            "base_model": str(self.family.base),
            "models": [{"model": str(folder), "parameters": each} for folder in self.family.experts.values()],
            "parameters": dict(method.shared),
            "dtype": "float32",
            "out_dtype": "bfloat16",
        }
        path = self.configs / "mergekit.yaml"
        path.write_text(json.dumps(config, indent=2))  # JSON is YAML
        shutil.rmtree(self.theirs, ignore_errors=True)
        self.settle()
        options = ["-j", str(len(os.sched_getaffinity(0))), "--async-write", "--out-shard-size", "5B", "--random-seed", "0"]
        quiet = ["--quiet", "--no-copy-tokenizer"]
        return measure([program, path, self.theirs, *options, *quiet], self.environment, self.configs)

    def our_program(self, *arguments: str | Path) -> Measured:
        """Our command line, as a program of its own."""
        return measure([sys.executable, "-m", "flows.cli", *arguments], self.our_environment, ROOT)

    def run_ours(self, name: str, groups: int, cold: bool) -> tuple[Measured, dict[str, Any]]:
        """One merge by our command line, and what it printed: seconds per stage and where the artifact is."""
        merge = {"groups": groups, "method": name, "scaling": "mean", **METHODS[name].ours}
        if groups == 1:
            merge["rules"] = [{"match": "*", "policy": "merge"}]
        recipe = {
            "name": "bench",
            "base": str(self.family.base),
            "experts": {expert: str(folder) for expert, folder in self.family.experts.items()},
            "merge": merge,
            "deltas": str(self.deltas),
            "output": str(self.ours),
        }
        path = self.configs / "recipe.yaml"
        path.write_text(json.dumps(recipe, indent=2))
        shutil.rmtree(self.ours, ignore_errors=True)
        if cold:
            shutil.rmtree(self.deltas, ignore_errors=True)
            (self.cache / "channel-merging" / "digests.json").unlink(missing_ok=True)
        self.settle()
        measured = self.our_program("run", path, "--json", "--cluster", self.cluster)
        return measured, dict(json.loads(measured.output))

    def export(self) -> Path:
        """Our K=1 model as a plain checkpoint; every expert is the same one."""
        shutil.rmtree(self.exported, ignore_errors=True)
        expert = next(iter(self.family.experts))
        self.our_program("export", self.ours, expert, self.exported)
        return self.exported

    def clear(self) -> None:
        """Remove what was merged."""
        for folder in (self.theirs, self.ours, self.deltas, self.exported):
            shutil.rmtree(folder, ignore_errors=True)


def compare(bench: Bench, name: str) -> dict[str, Any]:
    """Our K=1 model against mergekit's."""
    ours = bench.export()
    if name == "dare":
        return spreads(bench.family.base, bench.theirs, ours)
    return differences(bench.theirs, ours, bench.family, DENSITY if name == "ties" else None)


def compile_kernels(bench: Bench, names: Sequence[str], small: Family) -> None:
    """Run everything of ours on a small family, so that no measured run compiles what is compiled once per installation."""
    rehearsal = copy(bench)
    rehearsal.family = small
    for name in names:
        for groups in RUNS:
            note(f"{name}: not measured, K={groups} on a small family")
            with suppress(RunError):  # the measured run will say it
                rehearsal.run_ours(name, groups, cold=True)


def one_round(bench: Bench, name: str, found: Found) -> None:
    """One run of mergekit, then every run of ours; the results are compared once. A failure is noted and leaves a gap."""
    if bench.mergekit:
        note(f"{name}: {THEIRS}")
        try:
            found.runs.setdefault(THEIRS, []).append(bench.run_mergekit(bench.mergekit, METHODS[name]))
        except RunError as error:
            note(f"failed: {error}")
    for groups, runs in RUNS.items():
        try:
            for run, cold in runs.items():
                note(f"{name}: {run}")
                measured, printed = bench.run_ours(name, groups, cold)
                found.runs.setdefault(run, []).append(measured)
                found.stages.setdefault(run, []).append(printed["seconds"])
            if groups == 1 and found.difference is None and found.runs.get(THEIRS):
                found.difference = compare(bench, name)
        except RunError as error:
            note(f"failed: {error}")


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(map(_row, [headings, ["---"] * len(headings), *rows]))


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _memory_cell(found: Found, run: str) -> str:
    resident, anonymous = found.median(run, "resident"), found.median(run, "anonymous")
    return "-" if resident is None or anonymous is None else f"{resident / 1e9:.1f} ({anonymous / 1e9:.1f})"


def results_table(results: Mapping[str, Found]) -> str:
    """Seconds, ratio and peak memory."""
    remembered = (THEIRS, "K=1 cold", "K=2 cold")
    headings = ["method", f"{THEIRS} s", *(f"ours {run} s" for run in OURS), f"{THEIRS} / ours K=1 cold"]
    headings += [f"peak GB {THEIRS}", *(f"peak GB ours {run}" for run in remembered[1:])]
    rows = []
    for name, found in results.items():
        times = [found.median(run, "seconds") for run in (THEIRS, *OURS)]
        ratio = f"{times[0] / times[1]:.2f}" if times[0] and times[1] else "-"
        rows.append([name, *map(_seconds, times), ratio, *(_memory_cell(found, run) for run in remembered)])
    return _table(headings, rows)


def stages_table(results: Mapping[str, Found]) -> str:
    """Where our time goes."""
    names = list(dict.fromkeys(s for found in results.values() for runs in found.stages.values() for one in runs for s in one))
    rows = []
    for name, found in results.items():
        for run, breakdowns in found.stages.items():
            spent = [statistics.median(one.get(stage, 0.0) for one in breakdowns) for stage in names]
            rest = (found.median(run, "seconds") or 0.0) - sum(spent)
            processor = found.median(run, "cpu_seconds")
            rows.append([f"{name}, {run}", *map(_seconds, [*spent, rest, processor])])
    return _table(["ours", *names, "rest", "CPU s"], rows)


def _difference_line(name: str, found: Mapping[str, Any]) -> str:
    if "sd" in found:
        (their_mean, our_mean), (their_sd, our_sd) = found["mean"], found["sd"]
        worst = max(abs(one["sd"][1] / one["sd"][0] - 1) for one in found["tensors"].values() if one["sd"][0])
        return (
            f"- {name}: merged delta, {THEIRS} / ours: mean {their_mean:.2e} / {our_mean:.2e}, standard deviation "
            f"{their_sd:.4e} / {our_sd:.4e}; largest relative difference of a tensor's standard deviation {100 * worst:.2f} %"
        )
    worst = max(found["tensors"], key=lambda tensor: found["tensors"][tensor]["differ"] / found["tensors"][tensor]["entries"])
    record, entries = found["tensors"][worst], found["entries"]
    line = (
        f"- {name}: {found['differ']:,.0f} of {entries:,.0f} entries differ ({100 * found['differ'] / entries:.4f} %), "
        f"{found['more_than_last_place']:,.0f} by more than one unit in the last place of bf16; largest difference "
        f"{found['largest']:.2e}; most in {worst}: {100 * record['differ'] / record['entries']:.4f} %"
    )
    if "not_at_threshold" in found:
        line += f"; {found['not_at_threshold']:,.0f} differ where no expert's |delta| equals its trimming threshold"
    return line


def report(results: Mapping[str, Found], family: Family, drop_caches: bool) -> str:
    """Everything that is printed."""
    cache = "dropped before every run" if drop_caches else "warm for both"
    headline = (
        f"{family.shape.parameters / 1e6:.1f} M parameters each, bf16, base + {len(family.experts)} experts; "
        f"{len(os.sched_getaffinity(0))} CPU cores; page cache {cache}. Peak memory: resident sets of all processes summed, "
        "sampled; in brackets what is not backed by files."
    )
    parts = [
        headline,
        results_table(results),
        "Ours per stage, seconds; rest: imports, hashing of sources, start and end of the cluster, publishing.",
        stages_table(results),
    ]
    lines = [_difference_line(name, found.difference) for name, found in results.items() if found.difference]
    if lines:
        parts.append("Results at K=1 against mergekit's:\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def as_json(results: Mapping[str, Found]) -> dict[str, Any]:
    """All figures, per repeat and per tensor."""
    return {
        name: {
            "runs": {run: [measured.figures() for measured in several] for run, several in found.runs.items()},
            "stages": found.stages,
            "difference": found.difference,
        }
        for name, found in results.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build" / "against-mergekit", help="family, mergekit, outputs: 7 GB"
    )
    parser.add_argument("--size", choices=SHAPES, default="full", help="270 M parameters each, or 8 M to try it out")
    parser.add_argument("--repeats", type=int, default=1, help="of every run, interleaved; medians are printed")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--cluster", default="none", help="ours: none, threads of one process as mergekit's; or local")
    parser.add_argument("--drop-caches", action="store_true", help="empty the page cache before every run (needs root)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    family = write_family(work, SHAPES[arguments.size], EXPERTS)
    bench = Bench(work, family, install_mergekit(work), arguments.drop_caches, arguments.cluster)
    results = {name: Found() for name in arguments.methods}
    compile_kernels(bench, arguments.methods, write_family(work, SHAPES["small"], EXPERTS))
    for _ in range(arguments.repeats):
        for name, found in results.items():
            one_round(bench, name, found)
    bench.clear()
    print(report(results, family, arguments.drop_caches))
    if arguments.json:
        arguments.json.write_text(json.dumps(as_json(results), indent=2))


if __name__ == "__main__":
    main()
