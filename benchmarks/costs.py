"""What a run needs on a cluster, as pure sums: over the tensors of a model, as a plan cuts them, times measured rates.

A run is modelled as the sequence of its stages, a worker as one process with one thread that reads, computes and writes by
turns. Time of a stage: the longest of what its busiest worker needs, of all bytes through the object store, and of all tasks
through the scheduler.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

from benchmarks.families import Shape
from pipeline import memory
from pipeline.plan import plan_blocks
from storage.deltas import BINS, DIGEST_BYTES
from storage.layout import CHUNK_ELEMENTS, SHARD_BYTES, as_rows, chunk_rows

BUDGET = 2 << 30
"""A recipe's default ``cluster.memory``."""
ENTRY_BYTES = 2
"""bf16."""
CALIBRATED = 4
"""Experts of the family that the rates were measured with."""
ARRAYS = 4
"""Of a tensor in the delta store: its differences, row digests, squares and counts by size."""
SPAN_BYTES = 200
"""Of one in the manifest: names of some experts, two numbers and a digest."""


@dataclass(frozen=True)
class Rates:
    """What was measured. Bytes a second of one core, of what a stage reads before compression, unless another unit is said."""

    ingest: float
    similarity: float
    """With four experts."""
    merge: float
    pack: float
    cluster: float
    """Channels a second of one core, with four experts."""
    partition: Mapping[int, float]
    """Experts -> channels a second of one core by the kernel of the clustering alone, K half of the experts."""
    gram: Mapping[int, float]
    """Experts -> the kernel of the similarity pass alone."""
    sha256: float
    compressed: float
    """Bytes of a delta in the store for each of its bytes before."""
    start_seconds: float
    """Imports, the cluster's start and end, and what else a run takes whose weights are nothing."""
    tasks_per_second: float
    """Of one Dask scheduler and client."""
    origin: str


@dataclass(frozen=True)
class Site:
    """Where a run takes place. Assumed, not measured."""

    worker_bytes: float
    """Bytes a second that one worker sends or receives."""
    store_bytes: float
    """Bytes a second of the object store, all workers together."""
    request_seconds: float
    """Of a request to the store before its first byte."""
    client_cores: int
    sources_local: bool
    """Whether checkpoints are files that the client hashes; else the base is copied into the delta store."""
    at_once: int = 1
    """Requests that a worker makes at once: a chunk's arrays are written together, experts' chunks read together."""


@dataclass(frozen=True)
class Scenario:
    """A family and the groups it is merged into."""

    name: str
    shape: Shape
    experts: int
    groups: int


@dataclass(frozen=True)
class Tensor:
    """What cutting a tensor into blocks and summing its memory need to know of it."""

    name: str
    rows: int
    width: int
    merged: bool
    matrix_rows: int = 0
    slab_bytes: int = 0

    @property
    def chunk_rows(self) -> int:
        return chunk_rows(self.rows, self.width)

    @property
    def entries(self) -> int:
        return self.rows * self.width

    @property
    def chunks(self) -> int:
        return -(-self.rows // self.chunk_rows)


def tensors_of(shape: Shape) -> list[Tensor]:
    """The tensors of a model; matrices of its layers are merged, all else is private."""
    return [Tensor(name, *as_rows(size), len(size) > 1 and ".layers." in name) for name, size in shape.tensors()]


@dataclass(frozen=True)
class Sums:
    """What a scenario comes to, whatever the cluster. Bytes, unless said."""

    parameters: int
    """Entries of one checkpoint."""
    merged: int
    """Entries of these that are merged."""
    channels: int
    """Output channels that are clustered."""
    checkpoints: int
    """Base and experts."""
    deltas: int
    """The experts' delta groups, compressed; of rows and counts beside the differences as if not compressed."""
    tables: int
    """Gram tables."""
    chunks: int
    """In the experts' delta groups, of differences and of the arrays beside them."""
    objects: int
    """These, and the description of every array."""
    artifact: int
    """The pool's rows."""
    pool_files: int
    spans: int
    """Runs of pool rows with the same users, each an entry of the manifest, were channels grouped at random."""
    ingest_tasks: int
    """For each expert."""
    merge_tasks: int
    similarity_tasks: int
    cluster_tasks: int
    task_peak: int
    """What a task's arrays take at most under the default budget."""


@cache
def partitions(count: int, groups: int) -> int:
    """Partitions of so many items into exactly so many groups: Stirling numbers of the second kind."""
    if groups in (0, count):
        return int(groups == count)
    return 0 if groups > count else groups * partitions(count - 1, groups) + partitions(count - 1, groups - 1)


def distinct_groups(count: int, groups: int, channels: int) -> float:
    """How many different groups are expected among channels that are each partitioned at random. Pure."""
    found = 0.0
    for size in range(1, count + 1):
        share = partitions(count - size, groups - 1) / partitions(count, groups)
        found += math.comb(count, size) * (1 - (1 - share) ** channels)
    return found


@cache
def sums(scenario: Scenario, compressed: float) -> Sums:
    """The sums of a scenario. Pure."""
    tensors, count, groups = tensors_of(scenario.shape), scenario.experts, scenario.groups
    merged = [tensor for tensor in tensors if tensor.merged]
    entries, merged_entries = sum(t.entries for t in tensors), sum(t.entries for t in merged)
    beside = sum(t.rows * (DIGEST_BYTES + 8) + t.chunks * BINS * 4 for t in tensors)
    pool = groups * merged_entries + count * (entries - merged_entries)
    channels = sum(t.rows for t in merged)
    together = memory.block_elements(BUDGET, count)
    return Sums(
        parameters=entries,
        merged=merged_entries,
        channels=channels,
        checkpoints=(count + 1) * entries * ENTRY_BYTES,
        deltas=round(count * (entries * ENTRY_BYTES * compressed + beside)),
        tables=channels * count * count * 8,
        chunks=count * ARRAYS * sum(t.chunks for t in tensors),
        objects=count * ARRAYS * sum(t.chunks + 1 for t in tensors),
        artifact=pool * ENTRY_BYTES,
        pool_files=-(-pool * ENTRY_BYTES // SHARD_BYTES),
        spans=round(sum(distinct_groups(count, groups, t.rows) for t in merged)) + count * (len(tensors) - len(merged)),
        ingest_tasks=len(plan_blocks(tensors, memory.block_elements(BUDGET, 1))),
        merge_tasks=len(plan_blocks(tensors, together)),
        similarity_tasks=len(plan_blocks(merged, together)),
        cluster_tasks=scenario.shape.layers + 1,
        task_peak=max(memory.peak(BUDGET, tensor, count) for tensor in tensors),
    )


@dataclass(frozen=True)
class Work:
    """One stage, or one of its passes, before it is dealt to workers."""

    stage: str
    core_seconds: float
    """Of all tasks together."""
    tasks: int
    moved: float
    """Bytes to and from the store."""
    requests: float


def passes(scenario: Scenario, rates: Rates, site: Site, *, stored: bool = False) -> list[Work]:
    """All work of a run, in its order: of a first one, or of one whose deltas and tables are ``stored``. Pure.

    Experts are ingested one after the other, each with all workers. What a task reads of the delta store is compressed.
    """
    found = sums(scenario, rates.compressed)
    count, weights = scenario.experts, found.parameters * ENTRY_BYTES
    group, chunks = found.deltas / count, found.chunks / count  # of one expert
    base = float(weights) if site.sources_local else group
    work = []
    if not stored:
        if not site.sources_local:  # the base goes into the store as differences to nothing
            work.append(Work("base", weights / rates.ingest, found.ingest_tasks, weights + group, chunks + chunks / ARRAYS))
        moved = weights + base + group
        work += [Work("ingest", 2 * weights / rates.ingest, found.ingest_tasks, moved, chunks + 2 * chunks / ARRAYS)] * count
    share = found.merged / found.parameters
    read, asked = found.deltas + base, (count + 1) * chunks / ARRAYS  # by a pass over all base rows and differences
    if 1 < scenario.groups < count:
        if not stored:
            raw = (count + 1) * found.merged * ENTRY_BYTES
            seconds = raw / rates.similarity + raw * slower(rates.gram, count)
            moved = read * share + found.tables
            work.append(Work("similarity", seconds, found.similarity_tasks, moved, asked * share))
        seconds = found.channels / rates.cluster + found.channels * slower(rates.partition, count)
        work.append(Work("cluster", seconds, found.cluster_tasks, found.tables, found.chunks * 2 / ARRAYS))
    raw = (count + 1) * weights
    asked += found.artifact / (CHUNK_ELEMENTS * ENTRY_BYTES)  # parts of the pool, as large as a chunk
    work.append(Work("merge", raw / rates.merge, found.merge_tasks, read + found.artifact, asked))
    hashed = 2.0 * found.artifact
    work.append(Work("pack", hashed / rates.pack, 2 * found.pool_files, hashed, 2.0 * found.pool_files))
    return work


def nearest(known: Mapping[int, float], count: int) -> float:
    """What was measured with so many experts, or with the fewest above; of more than any, scaled by pairs."""
    above = [key for key in sorted(known) if key >= count]
    if above:
        return known[above[0]]
    largest = max(known)
    return known[largest] * (largest / count) ** 2


def slower(kernel: Mapping[int, float], count: int) -> float:
    """Seconds that a kernel takes longer for each of its units than with the family that was measured. Pure."""
    return max(0.0, 1 / nearest(kernel, count) - 1 / nearest(kernel, CALIBRATED))


@dataclass(frozen=True)
class Timed:
    """A stage on a cluster."""

    stage: str
    seconds: float
    bound: str
    """What takes the longest in it: cores, network, requests, store, scheduler, client."""


def timed(work: Work, workers: int, rates: Rates, site: Site) -> Timed:
    """The time of a pass: tasks of equal size, dealt in rounds. Pure."""
    share = math.ceil(work.tasks / workers) / work.tasks  # of all work, on the busiest worker
    parts = {
        "cores": work.core_seconds * share,
        "network": work.moved * share / site.worker_bytes,
        "requests": work.requests * share * site.request_seconds / site.at_once,
    }
    limits = {
        max(parts, key=lambda part: parts[part]): sum(parts.values()),
        "store": work.moved / site.store_bytes,
        "scheduler": work.tasks / rates.tasks_per_second,
    }
    bound = max(limits, key=lambda limit: limits[limit])
    return Timed(work.stage, limits[bound], bound)


def hashing_seconds(scenario: Scenario, rates: Rates, cores: int) -> float:
    """Seconds in which the client hashes checkpoints that are local files, each on one core. Pure."""
    return sums(scenario, rates.compressed).checkpoints / rates.sha256 / min(cores, scenario.experts + 1)


def run_times(scenario: Scenario, workers: int, rates: Rates, site: Site, *, stored: bool = False) -> list[Timed]:
    """Every stage of a run once, in order; digests of local checkpoints are cached when deltas are ``stored``. Pure."""
    start = rates.start_seconds
    if site.sources_local and not stored:
        start += hashing_seconds(scenario, rates, site.client_cores)
    found = {"start": Timed("start", start, "client")}
    for work in passes(scenario, rates, site, stored=stored):
        one = timed(work, workers, rates, site)
        before = found.get(one.stage)
        found[one.stage] = replace(one, seconds=one.seconds + before.seconds) if before else one
    return list(found.values())


def total(times: Iterable[Timed]) -> float:
    """Seconds of the whole run."""
    return sum(one.seconds for one in times)


def moved_bytes(scenario: Scenario, rates: Rates, site: Site, *, stored: bool = False) -> float:
    """Bytes that a run moves to and from the store. Pure."""
    return sum(work.moved for work in passes(scenario, rates, site, stored=stored))


def useful_workers(scenario: Scenario, rates: Rates, site: Site) -> int:
    """The number of workers, a power of two, whose doubling no longer takes a quarter off a first run. Pure."""
    counts = [1 << power for power in range(16)]
    times = [total(run_times(scenario, workers, rates, site)) for workers in counts]
    for workers, (now, doubled) in zip(counts, pairwise(times), strict=False):
        if doubled > 0.75 * now:
            return workers
    return counts[-1]
