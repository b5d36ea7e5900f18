"""Whole runs beside the floor of moving the same bytes: python -m benchmarks.pipeline --shape full.

A base and its experts are generated, and ``flows.cli run`` is measured from outside, as a program with all its workers.

``first``: no delta store, no output, no digest of a source in the cache. Its floor reads every checkpoint once and writes
the delta store and the artifact once. ``second``: another K into another output; delta store and digests are the first
run's. Its floor reads the base and the delta store once and writes the artifact once. ``again``: the second recipe once
more, where nothing is to be done. Both sides start with an empty page cache, or with all they read in it (``--page-cache
warm``), and end with a sync; they take turns. An empty page cache holds no library of Python's either.

Code that is compiled once per installation is compiled before, by runs over a small family.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from benchmarks import floor
from benchmarks.families import SHAPES, Family, write_family
from benchmarks.processes import PROGRAM, WORKER, measure

ROOT = Path(__file__).resolve().parent.parent
DENSITY = 0.7
SAMPLE_SECONDS = 0.1
"""Between two looks at the processes: the system keeps each one's peak, and every look takes time from two cores."""
FIRST, SECOND, AGAIN = "first", "second", "again"
TARGETS = {FIRST: 4.0, SECOND: 2.5}
"""Times the floor, at most, on two cores and a local disk."""
STAGES = ("ingest", "health", "similarity", "cluster", "merge", "pack", "router", "publish")
"""Their order in a table; manifests list them by name."""


PAGE_CACHE = {
    "dropped": "dropped (drop_caches)",
    "advised": "given up file by file (posix_fadvise)",
    "warm": "warm: all that is read is in it",
}
"""How the system's memory of files is before both sides."""


def note(text: str) -> None:
    """Progress, apart from the tables."""
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Taken:
    """One run of ours."""

    seconds: float
    """Of the whole program, and of the sync after it."""
    sync_seconds: float
    """Of the sync alone."""
    cpu_seconds: float
    largest: Mapping[str, int]
    """Kind of process -> the largest resident set of one of them, in bytes."""
    resident: int
    """Peak of all processes together, in bytes."""
    stages: Mapping[str, float]
    """Seconds of every stage, as the manifest has them; stages may overlap."""
    moved: Mapping[str, int]
    """Bytes read and written per stage, before compression, as the manifest has them."""
    device_read: int | None
    """Bytes that came from the disk meanwhile, for whatever process."""
    device_written: int | None
    new: bool


@dataclass(frozen=True)
class Floor:
    """Moving the bytes of a run once."""

    read_bytes: int
    written_bytes: int
    read_seconds: float
    write_seconds: float

    @property
    def seconds(self) -> float:
        return self.read_seconds + self.write_seconds


class Bench:
    """The folders and programs of one benchmark."""

    def __init__(self, work: Path, family: Family, options: argparse.Namespace) -> None:
        self.work, self.family, self.options = work, family, options
        self.deltas, self.cache, self.copies = work / "deltas", work / "cache", work / "copies"
        self.outputs = {FIRST: work / "artifact-first", SECOND: work / "artifact-second", AGAIN: work / "artifact-second"}
        hidden = {"PYTHONPATH", "CUDA_VISIBLE_DEVICES"}
        kept = {k: v for k, v in os.environ.items() if k not in hidden}
        quiet = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
        self.environment = {"NUMBA_CACHE_DIR": str(user_cache_path("channel-merging")), **kept, **quiet}
        self.environment |= {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(self.cache)}  # of digests; compiled code stays

    def recipe(self, groups: int) -> Path:
        """A recipe over the family; only pruning methods get a density."""
        method = self.options.method
        content = {
            "name": "pipeline",
            "base": str(self.family.base),
            "experts": {name: str(folder) for name, folder in self.family.experts.items()},
            "merge": {"groups": groups, "method": method, **({} if method == "task_arithmetic" else {"density": DENSITY})},
            "cluster": {"kind": self.options.cluster},
        }
        path = self.work / f"recipe-{groups}.yaml"
        path.write_text(json.dumps(content, indent=2))  # JSON is YAML
        return path

    def run(self, name: str) -> Taken:
        """One run by the command line, with an empty page cache before and a sync after."""
        output = self.outputs[name]
        if name == FIRST:
            for folder in (self.deltas, self.cache, *self.outputs.values()):
                shutil.rmtree(folder, ignore_errors=True)
        elif name == SECOND:
            shutil.rmtree(output, ignore_errors=True)
        recipe = self.recipe(self.options.groups if name == FIRST else other_groups(self.options))
        self.settle(self.read_by(name))
        before = floor.device_traffic(self.work)
        program = [sys.executable, "-m", "flows.cli", "run"]
        arguments: list[str | Path] = [recipe, "--json", "--output", output, "--deltas", self.deltas]
        measured = measure([*program, *arguments], self.environment, ROOT, SAMPLE_SECONDS)
        started = time.monotonic()
        subprocess.run(["sync", "-f", str(self.work)], check=True)
        synced = time.monotonic() - started
        after = floor.device_traffic(self.work)
        read, written = (None, None) if before is None or after is None else (after[0] - before[0], after[1] - before[1])
        told = json.loads(measured.output)
        manifest = self.manifest(output)
        return Taken(
            measured.seconds + synced, synced, measured.cpu_seconds, measured.largest, measured.resident,
            manifest["seconds"], manifest["moved"], read, written, bool(told["new"]),
        )  # fmt: skip

    def read_by(self, name: str) -> tuple[Path, ...]:
        """What a run has to read."""
        return self.family.checkpoints if name == FIRST else (self.family.base, self.deltas)

    def settle(self, places: Sequence[Path]) -> None:
        """The same page cache before both sides."""
        if self.options.page_cache == "warm":
            os.sync()
            floor.read_into_cache(floor.files_below(*places))
        else:
            floor.drop_page_cache(self.work)

    def manifest(self, output: Path) -> dict[str, Any]:
        """What ``inspect`` tells of an artifact."""
        program = [sys.executable, "-m", "flows.cli", "inspect", str(output), "--json"]
        done = subprocess.run(program, env=self.environment, cwd=ROOT, capture_output=True, text=True, check=True)
        return dict(json.loads(done.stdout))

    def floor(self, name: str) -> Floor:
        """The floor of a run whose outputs are there."""
        read = floor.files_below(*self.read_by(name))
        written = floor.files_below(*((self.deltas,) if name == FIRST else ()), self.outputs[name])
        self.settle(self.read_by(name))
        reading = floor.seconds_to_read(read)
        writing = floor.seconds_to_write(self.work, written, self.copies)
        return Floor(floor.bytes_of(read), floor.bytes_of(written), reading, writing)

    def sizes(self) -> dict[str, int]:
        """Bytes of the checkpoints, of the delta store with its tables, and of the two artifacts."""
        places = {"checkpoints": self.family.checkpoints, "deltas": (self.deltas,)}
        places |= {f"artifact {name}": (self.outputs[name],) for name in (FIRST, SECOND)}
        return {name: floor.bytes_of(floor.files_below(*folders)) for name, folders in places.items()}

    def clear(self) -> None:
        """Remove all but the family."""
        for folder in (self.deltas, self.copies, self.cache, *self.outputs.values()):
            shutil.rmtree(folder, ignore_errors=True)
        for path in self.work.glob("recipe-*.yaml"):
            path.unlink()


def other_groups(options: argparse.Namespace) -> int:
    """Another number of groups than the first run's, so that there is something to do."""
    groups, experts = int(options.groups), int(options.experts)
    return groups + 1 if groups < experts else max(1, groups - 1)


def measure_all(bench: Bench, repeats: int) -> tuple[dict[str, list[Taken]], dict[str, list[Floor]]]:
    """All runs and floors, the two sides by turns; which of them goes first changes from round to round."""
    runs: dict[str, list[Taken]] = {FIRST: [], SECOND: [], AGAIN: []}
    floors: dict[str, list[Floor]] = {FIRST: [], SECOND: []}
    for turn in range(repeats):
        # a floor copies what the run wrote: it can go before it only where an earlier round has left that
        turns = [(FIRST, True), (FIRST, False)] if turn % 2 else [(FIRST, False), (FIRST, True)]
        for name, is_floor in (*turns, (SECOND, False), (SECOND, True), (AGAIN, False)):
            note(f"round {turn + 1}: {'floor of the ' if is_floor else ''}{name} run")
            if is_floor:
                floors[name].append(bench.floor(name))
            else:
                runs[name].append(bench.run(name))
    return runs, floors


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(runs: Sequence[Taken], floors: Sequence[Floor]) -> list[float]:
    """Of every round, its run to its floor."""
    return [run.seconds / least.seconds for run, least in zip(runs, floors, strict=True)]


def document(
    bench: Bench, runs: Mapping[str, Sequence[Taken]], floors: Mapping[str, Sequence[Floor]], date: str
) -> dict[str, Any]:
    """Every figure, for a script."""
    options = bench.options
    return {
        "date": date,
        "cores": len(os.sched_getaffinity(0)),
        "shape": options.shape,
        "parameters": bench.family.shape.parameters,
        "experts": options.experts,
        "groups": {FIRST: options.groups, SECOND: other_groups(options)},
        "method": options.method,
        "cluster": options.cluster,
        "page_cache": options.page_cache if options.page_cache == "warm" or floor.can_drop() else "advised",
        "bytes": bench.sizes(),
        "runs": {name: [asdict(run) for run in several] for name, several in runs.items()},
        "floors": {name: [{**asdict(one), "seconds": one.seconds} for one in several] for name, several in floors.items()},
        "ratios": {name: spread(ratios(runs[name], floors[name])) for name in floors},
        "targets": TARGETS,
    }


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headings, ["---"] * len(headings), *rows))


def _range(values: Sequence[float], digits: int = 1) -> str:
    found = spread(values)
    return f"{found['median']:.{digits}f} ({found['min']:.{digits}f} to {found['max']:.{digits}f})"


def _gigabytes(count: float | None) -> str:
    return "-" if count is None else f"{count / 1e9:.2f}"


def times_table(found: Mapping[str, Any]) -> str:
    """Every run beside its floor."""
    rows = []
    for name, runs in found["runs"].items():
        least = found["floors"].get(name)
        seconds = [run["seconds"] for run in runs]
        cells = [name, _range(seconds), _range([run["cpu_seconds"] for run in runs])]
        if least is None:
            rows.append([*cells, "-", "-", "-", "-", "-"])
            continue
        each = [run["seconds"] / one["seconds"] for run, one in zip(runs, least, strict=True)]
        moved = f"{_gigabytes(least[0]['read_bytes'])} + {_gigabytes(least[0]['written_bytes'])}"
        cells += [moved, _range([one["read_seconds"] for one in least]), _range([one["write_seconds"] for one in least])]
        rows.append([*cells, _range(each, 2), f"{found['targets'][name]:.1f}"])
    headings = ["run", "wall s", "CPU s", "floor: GB read + written", "floor: reading s", "floor: writing s", "run / floor"]
    return _table([*headings, "target"], rows)


def stages_table(found: Mapping[str, Any]) -> str:
    """Seconds and bytes of every stage, medians."""
    rows = []
    for name in (FIRST, SECOND):
        runs = found["runs"][name]
        told = dict.fromkeys(stage for run in runs for stage in run["stages"])
        for stage in [*(known for known in STAGES if known in told), *(other for other in told if other not in STAGES)]:
            seconds = statistics.median(run["stages"].get(stage, 0.0) for run in runs)
            read, written = (runs[-1]["moved"].get(f"{stage} {way}") for way in ("read", "written"))
            rows.append([name, stage, f"{seconds:.1f}", _gigabytes(read), _gigabytes(written)])
        outside = [
            _gigabytes(statistics.median(run[way] for run in runs)) if runs[0][way] is not None else "-" for way in DEVICE
        ]
        rows.append([name, "disk, all processes", "", *outside])
    return _table(["run", "stage", "s", "GB read", "GB written"], rows)


DEVICE = ("device_read", "device_written")


def memory_table(found: Mapping[str, Any]) -> str:
    """Largest resident set of one process of each kind."""
    rows = []
    for name, runs in found["runs"].items():
        kinds = [max((run["largest"].get(kind, 0) for run in runs), default=0) for kind in (PROGRAM, WORKER)]
        together = max(run["resident"] for run in runs)
        rows.append([name, *(f"{size / 2**20:.0f}" if size else "-" for size in (*kinds, together))])
    return _table(["run", "program MiB", "worker MiB", "all processes MiB"], rows)


def report(found: Mapping[str, Any]) -> str:
    """Everything that is printed."""
    cache = PAGE_CACHE[found["page_cache"]]
    groups = found["groups"]
    headline = (
        f"{found['date']}, shape {found['shape']}: base + {found['experts']} experts of {found['parameters'] / 1e6:.1f} M "
        f"parameters each, bf16; {found['method']}, K={groups[FIRST]}, then K={groups[SECOND]}; --cluster {found['cluster']}; "
        f"{found['cores']} CPU cores; page cache before both sides {cache}. Medians of {len(found['runs'][FIRST])}, "
        "in brackets the range."
    )
    parts = [
        headline, times_table(found), "Stages, from the manifest; they may overlap, and then add up to more than the run.",
        stages_table(found), "Largest resident set of one process (VmHWM), files it has mapped included:", memory_table(found),
    ]  # fmt: skip
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="full")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--groups", type=int, default=2, help="K of the first run")
    parser.add_argument("--method", choices=("task_arithmetic", "dare", "ties"), default="task_arithmetic")
    parser.add_argument("--cluster", choices=("local", "none"), default="local")
    parser.add_argument("--page-cache", choices=("dropped", "warm"), default="dropped", help="before both sides")
    parser.add_argument("--work", type=Path, help="keep the family there, for a later call; else all is removed")
    parser.add_argument("--repeat", type=int, default=3, metavar="N")
    parser.add_argument("--json", action="store_true", help="print every figure as JSON")
    options = parser.parse_args()
    if options.experts < 2 or not 1 <= options.groups <= options.experts or options.repeat < 1:
        parser.error("there must be two experts, 1 to that many groups, and one repeat at least")
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    with tempfile.TemporaryDirectory(prefix="pipeline-") as place:
        work = (options.work or Path(place)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        note("writing the families")
        small = Bench(work, write_family(work, SHAPES["tiny"], options.experts), options)
        bench = Bench(work, write_family(work, SHAPES[options.shape], options.experts), options)
        try:
            for name in (FIRST, SECOND):
                note(f"not measured: {name} run over a small family, which compiles the kernels")
                small.run(name)
            found = document(bench, *measure_all(bench, options.repeat), date)
        finally:
            bench.clear()
    print(json.dumps(found, indent=2) if options.json else report(found))


if __name__ == "__main__":
    main()
