"""One run, stage by stage. The command line calls the stages in turn; the Prefect flow wraps each as a task."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from pipeline.engine import Engine, Reporter, open_engine
from pipeline.job import Job, resolve
from pipeline.recipe import Recipe, load_recipe
from router_training.data import load_queries
from storage.artifact import WORK, find_by_inputs, make_latest
from storage.errors import RecipeError, StoreBusyError
from storage.manifest import Manifest

Result = TypeVar("Result")


@dataclass
class Run:
    """A job under way and what its stages have found so far: ids and small receipts, never tensors."""

    job: Job
    health: Any = None
    health_notes: tuple[str, ...] = ()
    measured: Any = None
    grouping: Any = None
    pool: Any = None
    merged: Sequence[Any] = ()
    packed: Any = None
    router: dict[str, Any] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    moved: dict[str, int] = field(default_factory=dict)
    manifest: Manifest | None = None
    new: bool = False

    def count(self, stage: str, read: int, written: int) -> None:
        """Record the bytes a stage moved."""
        self.moved |= {f"{stage} read": read, f"{stage} written": written}


@dataclass(frozen=True)
class Outcome:
    """What a run came to."""

    version: str
    path: Path
    new: bool
    """False when the version, or one of the same inputs, was there already."""
    manifest: Manifest


def ingest(run: Run, engine: Engine) -> None:
    """Bring every expert's deltas into the store."""
    from pipeline.stages import health as before
    from pipeline.stages import ingest as stage

    before.probe(run.job)
    result = stage.ingest(run.job, engine)
    run.count("ingest", result.bytes_read, result.bytes_written)


def health(run: Run, engine: Engine) -> None:
    """See how far every expert is from its base, and refuse those that are none of it."""
    from pipeline.stages import health as stage

    run.health, run.health_notes = stage.health(run.job)
    for note in run.health_notes:
        engine.reporter.note(note)


def similarity(run: Run, engine: Engine) -> None:
    """Bring the Gram table into the store."""
    from pipeline.stages import similarity as stage

    result, run.measured = stage.similarity(run.job, engine)
    run.count("similarity", result.bytes_read, result.bytes_written)


def cluster(run: Run, engine: Engine) -> None:
    """Group the experts of every channel."""
    from pipeline.stages import cluster as stage

    run.grouping = stage.cluster(run.job, engine)
    for note in run.grouping.notes:
        engine.reporter.note(note)


def merge(run: Run, engine: Engine) -> None:
    """Fill the row pool."""
    from pipeline.stages import merge as stage

    run.pool = stage.lay_out(run.job, run.grouping.rows)
    run.merged = stage.merge(run.job, engine, run.pool, run.measured)
    run.count("merge", sum(r.bytes_read for r in run.merged), sum(r.bytes_written for r in run.merged))


def pack(run: Run, engine: Engine) -> None:
    """Digests, row indices and side files."""
    from pipeline.stages import pack as stage

    run.packed = stage.pack(run.job, engine, run.pool)
    run.count("pack", run.packed.bytes_read, 0)


def router(run: Run, engine: Engine) -> None:
    """Train the router inside the staged artifact."""
    section = run.job.recipe.router
    if section.kind == "none":
        return
    from router_training.linear import train_router

    engine.reporter.start("router", 1)
    sources = {name: Path(place) for name, place in section.queries.items()}
    run.router = train_router(sources, dict(run.job.queries), run.job.recipe.merge.seed, run.job.staged / "router")
    engine.reporter.advance("router", "linear")


def publish(run: Run, engine: Engine) -> None:
    """Make the staged folder a version, and the latest."""
    from pipeline.stages import publish as stage

    run.manifest, run.new = stage.publish(
        run.job,
        run.health,
        run.health_notes,
        run.grouping,
        run.measured,
        run.packed,
        run.merged,
        run.router,
        run.seconds,
        run.moved,
    )


STAGES: tuple[Callable[[Run, Engine], None], ...] = (ingest, health, similarity, cluster, merge, pack, router, publish)


def execute(stage: Callable[[Run, Engine], None], run: Run, engine: Engine) -> None:
    """Run one stage and record how long it took."""
    started = time.monotonic()
    stage(run, engine)
    run.seconds[stage.__name__] = round(time.monotonic() - started, 3)


def read_recipe(
    path: Path,
    settings: Mapping[str, Any] | None = None,
    output: str | None = None,
    deltas: str | None = None,
    cluster_at: str | None = None,
) -> Recipe:
    """The recipe with overrides of its keys; relative paths of output and deltas count from the current folder."""
    overrides = dict(settings or {})
    for key, place in (("output", output), ("deltas", deltas)):
        if place is not None:
            overrides[key] = place if "://" in place else str(Path(place).absolute())
    if cluster_at is not None:
        known = cluster_at in ("local", "none")
        if not known and "://" not in cluster_at:
            raise RecipeError(f"--cluster: expected local, none or tcp://host:port, got {cluster_at!r}")
        overrides |= {"cluster.kind": cluster_at if known else None, "cluster.address": None if known else cluster_at}
    return load_recipe(path, overrides)


def unchanged(job: Job) -> Outcome | None:
    """The version already made from the same inputs, now the latest again; None when there is work to do."""
    manifest = find_by_inputs(job.output, job.inputs) if job.output.exists() else None
    if manifest is None:
        return None
    make_latest(job.output, manifest.version)
    return Outcome(manifest.version, job.output / manifest.version, False, manifest)


def _clear_abandoned(work: Path) -> None:
    """Remove what killed runs left: folders whose run no longer holds its lock."""
    for folder in work.iterdir():
        if folder.is_dir():
            with suppress(Timeout), FileLock(work / f"{folder.name}.lock", timeout=0):
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def workplace(job: Job) -> Iterator[None]:
    """The job's folder for unfinished work, empty, and this run's alone; gone afterwards."""
    (job.output / WORK).mkdir(parents=True, exist_ok=True)
    _clear_abandoned(job.output / WORK)
    lock = FileLock(job.output / WORK / f"{job.work.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise StoreBusyError(f"another run of the same inputs is writing {job.work}. Wait for it to end.") from None
    try:
        shutil.rmtree(job.work, ignore_errors=True)
        job.work.mkdir()
        yield
    finally:
        shutil.rmtree(job.work, ignore_errors=True)
        lock.release()


def outcome(run: Run) -> Outcome:
    """What a run came to, once all stages are done."""
    if run.manifest is None:
        raise AssertionError("the run has not been published")
    return Outcome(run.manifest.version, run.job.output / run.manifest.version, run.new, run.manifest)


def prepare(recipe: Recipe) -> Job:
    """Resolve a recipe; the router's queries are read too, so that a bad line is not met after the merge."""
    return resolve(recipe, check_queries)


def check_queries(recipe: Recipe) -> None:
    """QueryDataError when the router could not be trained on the recipe's queries."""
    if recipe.router.kind != "none":
        load_queries({name: Path(place) for name, place in recipe.router.queries.items()})


def directly(name: str, body: Callable[[], Result]) -> Result:
    """Run a step as it is."""
    return body()


def run_recipe(recipe: Recipe, reporter: Reporter, step: Callable[[str, Callable[[], Any]], Any] = directly) -> Outcome:
    """Resolve a recipe and run every stage; do nothing when the same inputs have been published.

    ``step(name, body)`` runs one step and returns what the body returns: a flow makes a task run of each.
    """
    reporter.start("resolve", 1)
    job: Job = step("resolve", lambda: prepare(recipe))
    reporter.advance("resolve", f"{len(job.plan.tensors)} tensors")
    for note in job.plan.notes:
        reporter.note(note)
    if found := unchanged(job):
        return found
    run = Run(job)
    with workplace(job), open_engine(recipe.cluster, reporter) as engine:
        for stage in STAGES:
            step(stage.__name__, partial(execute, stage, run, engine))
    return outcome(run)
