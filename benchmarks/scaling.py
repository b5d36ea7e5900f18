"""What families of other sizes need on other clusters: python -m benchmarks.scaling [--measured FILE] [--page FILE].

``benchmarks.costs`` holds the model. Its rates are those that this project's own stages were measured at; what these cannot
tell, networks and latencies, is assumed and printed with the rest. ``--measured`` takes the rates from what ``python -m
benchmarks.pipeline --json`` printed; ``--page`` writes the tables between the markers of a document.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.costs import (
    ENTRY_BYTES,
    SPAN_BYTES,
    Rates,
    Scenario,
    Site,
    hashing_seconds,
    moved_bytes,
    passes,
    run_times,
    sums,
    total,
    useful_workers,
)  # fmt: skip
from benchmarks.families import SHAPES, Shape

BEGIN, END = "<!-- printed by benchmarks.scaling -->", "<!-- end -->"

MEASURED = Rates(
    ingest=0.53e9, similarity=1.38e9, merge=0.864e9, pack=1.40e9, cluster=1.98e5,
    partition={4: 1.1e6, 8: 2.7e5, 16: 7.2e4}, gram={4: 7.75e9, 8: 5.45e9, 16: 3.44e9}, sha256=1.97e9,
    compressed=0.691, start_seconds=3.0, tasks_per_second=300.0,
    origin="benchmarks.pipeline --shape full, 2026-11-22, 4 x 0.27 B, 2 cores",
)  # fmt: skip
"""Of ``--measured FILE --constants``; kernels, sha256 and tasks were timed for themselves on the same day and machine."""

LOCAL = Site(math.inf, math.inf, 0.0, 2, sources_local=True)
"""Files on the disk of the machine: what reading and writing them takes is in the rates."""
CLOUD = Site(1.25e9, 12.5e9, 0.03, 8, sources_local=False, at_once=4)
"""10 Gbit/s for every worker, 100 Gbit/s in total, 30 ms for a request, four at once."""

SCENARIOS = (
    Scenario("4 x 7 B", Shape(4096, 14336, 32, 32, 8, 32000), 4, 2),
    Scenario("8 x 70 B", Shape(8192, 28672, 80, 64, 8, 128256), 8, 4),
    Scenario("16 x 405 B", Shape(16384, 53248, 126, 128, 8, 128256), 16, 8),
)
"""Mistral-7B's, Llama-3-70B's and Llama-3.1-405B's shapes; half as many groups as experts."""
WORKERS = (1, 8, 64)


@dataclass(frozen=True)
class Observed:
    """A run that was measured, to hold the model against."""

    scenario: Scenario
    workers: int
    first_seconds: float
    second_seconds: float
    deltas: int
    """Bytes of the delta store, tables included."""
    artifact: int
    worker_peak: int
    """Largest resident set of a worker, in bytes."""


OBSERVED: tuple[Observed, ...] = (
    Observed(Scenario("4 x 0.27 B", SHAPES["full"], 4, 2), 2, 11.5, 6.94, 1_611_160_539, 1_346_539_656, 483_995_648),
    Observed(Scenario("4 x 1.1 B", SHAPES["1b"], 4, 2), 2, 28.8, 16.8, 6_506_627_892, 4_932_917_584, 485_249_024),
)
"""2026-11-22, two cores, local disk: medians of four rounds with the stages one after the other, as the rates were measured,
and of two with the stages at once, as they are now."""


def median(runs: Sequence[Mapping[str, Any]], figure: str) -> float:
    """Of one figure over all rounds."""
    return float(statistics.median(run[figure] for run in runs))


def scenario_of(found: Mapping[str, Any]) -> Scenario:
    """The family of a document that ``benchmarks.pipeline --json`` printed."""
    size = f"{found['parameters'] / 1e9:.2g} B"
    return Scenario(f"{found['experts']} x {size}", SHAPES[found["shape"]], found["experts"], found["groups"]["first"])


def rates_of(found: Mapping[str, Any], known: Rates) -> Rates:
    """The rates of a document; of what it does not tell, those that are known. Pure.

    Stages that overlapped take part of the run's time each, in proportion to their seconds.
    """
    scenario, cores, runs = scenario_of(found), int(found["cores"]), found["runs"]["first"]
    planned = sums(scenario, 1.0)
    wall = median(runs, "seconds") - hashing_seconds(scenario, known, cores)
    stages = {stage: float(statistics.median(run["stages"][stage] for run in runs)) for stage in runs[0]["stages"]}
    whole = sum(stages.values())
    shrunk = min(1.0, wall / whole)

    def rate(stage: str) -> float:
        return float(runs[0]["moved"][f"{stage} read"]) / (stages[stage] * shrunk * cores)

    beside = planned.deltas - scenario.experts * planned.parameters * ENTRY_BYTES
    differences = found["bytes"]["deltas"] - planned.tables - beside
    return replace(
        known,
        ingest=rate("ingest"),
        similarity=rate("similarity"),
        merge=rate("merge"),
        pack=rate("pack"),
        cluster=planned.channels / (stages["cluster"] * shrunk * cores),
        compressed=differences / (scenario.experts * planned.parameters * ENTRY_BYTES),
        start_seconds=max(0.0, wall - whole * shrunk),
        origin=f"benchmarks.pipeline, {found['date']}, {scenario.name}, {cores} cores",
    )


def observed_of(found: Mapping[str, Any]) -> Observed:
    """What a document measured. Pure."""
    runs, sizes = found["runs"], found["bytes"]
    peak = max(run["largest"].get("worker", 0) for several in runs.values() for run in several)
    first, second = (median(runs[name], "seconds") for name in ("first", "second"))
    return Observed(scenario_of(found), int(found["cores"]), first, second, sizes["deltas"], sizes["artifact first"], peak)


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headings, ["---", *["---:"] * (len(headings) - 1)], *rows))


def size(count: float) -> str:
    """Bytes with three digits, or whole ones above: 1.23 GB, 12.3 TB."""
    for unit, amount in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= amount:
            value = count / amount
            return f"{value:,.{max(0, 2 - int(math.log10(value)))}f} {unit}"
    return f"{count:.0f} bytes"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours with about two digits."""
    for unit, amount in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * amount:
            value = seconds / amount
            return f"{value:.0f} {unit}" if value >= 10 else f"{value:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def sizes_table(rates: Rates) -> str:
    """What every scenario comes to on any cluster."""
    rows = []
    for scenario in SCENARIOS:
        found = sums(scenario, rates.compressed)
        tasks = sum(work.tasks for work in passes(scenario, rates, CLOUD))
        hashing = hashing_seconds(scenario, rates, CLOUD.client_cores)
        rows.append(
            [
                f"{scenario.name}, K={scenario.groups}", size(found.checkpoints), size(found.deltas), size(found.tables),
                f"{found.objects:,}", size(found.artifact), f"{found.pool_files:,}", size(found.spans * SPAN_BYTES),
                f"{tasks:,}", f"{found.task_peak / 2**30:.2f} GiB", duration(hashing),
            ]
        )  # fmt: skip
    headings = [
        "family",
        "checkpoints",
        "delta store",
        "tables",
        "objects in it",
        "artifact",
        "pool files",
        "spans in manifest",
    ]
    return _table([*headings, "tasks", "arrays of a task", f"hashing of local files, {CLOUD.client_cores} cores"], rows)


def times_table(rates: Rates, site: Site = CLOUD) -> str:
    """First and second runs of every scenario."""
    rows = []
    for scenario in SCENARIOS:
        for workers in WORKERS:
            first = run_times(scenario, workers, rates, site)
            second = run_times(scenario, workers, rates, site, stored=True)
            longest = max(first, key=lambda one: one.seconds)
            moved = [moved_bytes(scenario, rates, site, stored=stored) for stored in (False, True)]
            rows.append(
                [
                    scenario.name, str(workers), duration(total(first)), size(moved[0]),
                    f"{longest.stage} ({longest.bound}), {100 * longest.seconds / total(first):.0f} %",
                    duration(total(second)), size(moved[1]), str(useful_workers(scenario, rates, site)),
                ]
            )  # fmt: skip
    headings = ["family", "workers", "first run", "moved", "longest stage (bound by)", "second run", "moved"]
    return _table([*headings, "workers worth having"], rows)


def stages_table(rates: Rates, workers: int = WORKERS[-1], site: Site = CLOUD) -> str:
    """Every stage of first runs on the most workers."""
    timed_stages = {scenario.name: run_times(scenario, workers, rates, site) for scenario in SCENARIOS}
    rows = []
    for position, stage in enumerate(next(iter(timed_stages.values()))):
        each = [times[position] for times in timed_stages.values()]
        rows.append([stage.stage, *(f"{duration(one.seconds)} ({one.bound})" for one in each)])
    return _table([f"stage, {workers} workers", *timed_stages], rows)


def check_table(rates: Rates, observed: Sequence[Observed]) -> str:
    """The model beside what was measured."""
    rows = []
    for one in observed:
        site = replace(LOCAL, client_cores=one.workers)
        first, second = (total(run_times(one.scenario, one.workers, rates, site, stored=stored)) for stored in (False, True))
        found = sums(one.scenario, rates.compressed)
        pairs = [
            (first, one.first_seconds, duration), (second, one.second_seconds, duration),
            (found.deltas + found.tables, one.deltas, size), (found.artifact, one.artifact, size),
        ]  # fmt: skip
        peak = f"{found.task_peak / 2**20:.0f} MiB / {one.worker_peak / 2**20:.0f} MiB"
        rows.append([one.scenario.name, *(f"{told(model)} / {told(seen)}" for model, seen, told in pairs), peak])
    headings = ["model / measured", "first run", "second run", "delta store and tables", "artifact"]
    return _table([*headings, "arrays of a task / resident set of a worker"], rows)


SPEEDS = ("ingest", "similarity", "merge", "pack", "sha256")


def report(rates: Rates, observed: Sequence[Observed]) -> str:
    """Everything that is printed, as Markdown."""
    clusters = ", ".join(f"{count:,.0f} of {n} experts" for n, count in rates.partition.items())
    speeds = ", ".join(
        f"{stage} {size(getattr(rates, stage))}" for stage in ("ingest", "similarity", "merge", "pack", "sha256")
    )
    measured = (
        f"Measured ({rates.origin}), a second and core: {speeds}; {rates.cluster:,.0f} channels clustered, "
        f"by the search alone {clusters}. Deltas compressed to "
        f"{100 * rates.compressed:.0f} %; {rates.start_seconds:.1f} s to start; {rates.tasks_per_second:,.0f} tasks a second."
    )
    assumed = (
        f"Assumed of the cluster: {size(CLOUD.worker_bytes)} a second for a worker, {size(CLOUD.store_bytes)} for the store in "
        f"total, {1000 * CLOUD.request_seconds:.0f} ms for a request, {CLOUD.at_once} at once for a worker; sources "
        "in an object store."
    )
    tables = [check_table(rates, observed), assumed, sizes_table(rates), times_table(rates), stages_table(rates)]
    return "\n\n".join([measured, *tables])


def between_markers(page: str, content: str) -> str:
    """The page with this content between its markers. ValueError when it has none."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{content}\n\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=Path, metavar="FILE", help="rates from what benchmarks.pipeline --json printed")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write into this document instead of printing")
    parser.add_argument("--constants", action="store_true", help="print the rates and the run of FILE instead, to record them")
    options = parser.parse_args()
    rates, observed = MEASURED, OBSERVED
    if options.measured:
        found = json.loads(options.measured.read_text())
        rates, observed = rates_of(found, MEASURED), (observed_of(found), *OBSERVED)
    if options.constants:
        print(rates, observed[0], sep="\n")
    elif options.page:
        options.page.write_text(between_markers(options.page.read_text("utf-8"), report(rates, observed)), "utf-8")
    else:
        print(report(rates, observed))


if __name__ == "__main__":
    main()
