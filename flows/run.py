"""One run, from a recipe to a published version. The command line runs its steps as they are, the Prefect flow as tasks."""

from __future__ import annotations

import datetime
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from pipeline.engine import Cancelled, Engine, Reporter, Waiting, open_engine
from pipeline.job import Job, resolve
from pipeline.recipe import Recipe, load_recipe
from router_training.data import load_queries
from storage.atomic import canonical_json
from storage.deltas import JOB, run_record
from storage.errors import ChannelMergingError, IncompleteStoreError, RecipeError
from storage.manifest import Manifest
from storage.publishing import find_by_inputs, make_latest
from storage.stores import open_store

WRONG_INPUT = RecipeError.exit_code
REPAIRS = 5
"""Damaged chunks of the delta store that one run makes anew."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Outcome:
    """What a run came to."""

    version: str
    place: str
    """Where the version lies: a path or a URL."""
    new: bool
    """False when the version, or one of the same inputs, was there already."""
    manifest: Manifest

    @property
    def path(self) -> Path:
        """The version's folder, of a local output."""
        return Path(self.place)


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
        known = cluster_at in ("local", "none", "cuda")
        if not known and "://" not in cluster_at:
            raise RecipeError(f"--cluster: expected local, none, cuda or tcp://host:port, got {cluster_at!r}")
        overrides |= {"cluster.kind": cluster_at if known else None, "cluster.address": None if known else cluster_at}
    return load_recipe(path, overrides)


def unchanged(job: Job) -> Outcome | None:
    """The version already made from the same inputs, now the latest again; None when there is work to do."""
    manifest = find_by_inputs(job.output, job.inputs)
    if manifest is None:
        return None
    make_latest(job.output, manifest.version)
    return _outcome(job, manifest, is_new=False)


def _outcome(job: Job, manifest: Manifest, *, is_new: bool) -> Outcome:
    return Outcome(manifest.version, job.output.under(manifest.version).place, is_new, manifest)


@contextmanager
def workplace(job: Job, reporter: Reporter) -> Iterator[None]:
    """The job's place for unfinished work, this run's alone; kept when the run fails, as the next one goes on from there."""
    waiting = Waiting(reporter, f"waiting for another run of the same inputs that writes {job.work.place}")
    with job.output.lock(job.place_of_work, waiting):
        record = canonical_json(
            {
                "name": job.recipe.name,
                "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "host": platform.node(),
                "output": job.output.place,
                "base": job.base.id,
                "experts": sorted(source.id for source in job.experts.values()),
            }
        )
        job.work.put(JOB, record)
        job.deltas.put(run_record(job.base.id, job.inputs), record)
        try:
            yield
        except ChannelMergingError as error:
            if error.exit_code == WRONG_INPUT:  # these inputs will not be run again
                job.work.clear("")
            raise
        job.work.clear("")


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


Step = Callable[[str, Callable[[], Any]], Any]
"""``step(name, body)`` runs one step and returns what the body returns: a flow makes a task run of each."""


def _at_once(engine: Engine, step: Step, bodies: Mapping[str, Callable[[], None]]) -> None:
    """Run steps that wait for each other's waves. The first that fails ends all, and its error is raised."""
    with ThreadPoolExecutor(len(bodies), thread_name_prefix="step") as pool:
        steps = [pool.submit(copy_context().run, step, name, body) for name, body in bodies.items()]
        try:
            wait(steps, return_when=FIRST_EXCEPTION)
        finally:
            if not all(one.done() for one in steps):  # one has failed, or the run was interrupted
                engine.cancel()
    errors = [error for one in steps if (error := one.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, Cancelled)):
        raise error


def _train(job: Job, reporter: Reporter) -> dict[str, Any] | None:
    """Train the router into the staged artifact."""
    section = job.recipe.router
    if section.kind == "none":
        return None
    from router_training.linear import train_router

    reporter.start("router", 1)
    sources = {name: Path(place) for name, place in section.queries.items()}
    with TemporaryDirectory() as folder:
        card = train_router(sources, dict(job.queries), job.recipe.merge.seed, Path(folder) / "router")
        for path in sorted((Path(folder) / "router").iterdir()):
            job.staged.put(f"router/{path.name}", path.read_bytes())
    reporter.advance("router", "linear")
    reporter.done("router")
    return card


def _make(job: Job, engine: Engine, step: Step) -> Outcome:
    """Everything from the sources to the published version."""
    from pipeline.stages import publish
    from pipeline.stages.waves import Waves

    waves = Waves(job, engine)
    _at_once(engine, step, {"ingest": waves.ingest, "similarity": waves.group, "merge": waves.merge, "pack": waves.pack})
    started = time.monotonic()
    router = step("router", lambda: _train(job, engine.reporter))
    waves.seconds["router"] = round(time.monotonic() - started, 3)
    waiting = Waiting(engine.reporter, f"waiting for another run that publishes in {job.output.place}", engine.check)
    manifest, is_new = step("publish", lambda: publish.publish(waves, router, waiting))
    return _outcome(job, manifest, is_new=is_new)


def _local_places(job: Job) -> tuple[list[Path], list[Path]]:
    """Folders of this machine that workers write to, and files that they read."""
    written = [Path(store.place) for store in (job.deltas, job.output) if store.is_local]
    sources = (job.base, *job.experts.values())
    return written, [Path(s.folder.place) / name for s in sources if s.folder.is_local and not s.folder.id for name in s.files]


def _discard(damaged: tuple[str, str], reporter: Reporter) -> None:
    """Remove a chunk that cannot be read, so that it is made anew."""
    place, key = damaged
    reporter.note(f"{place}: chunk {key} is lost or damaged; it is made anew")
    open_store(place).delete([key])


def run_recipe(recipe: Recipe, reporter: Reporter, step: Step = directly) -> Outcome:
    """Resolve a recipe and make its artifact; do nothing when the same inputs have been published.

    Goes on where an earlier run of the same inputs ended. What is damaged in the delta store is made anew.
    """
    reporter.start("resolve", 1)
    job: Job = step("resolve", lambda: prepare(recipe))
    reporter.advance("resolve", f"{len(job.plan.tensors)} tensors")
    reporter.done("resolve")
    for note in job.plan.notes:
        reporter.note(note)
    if found := unchanged(job):
        return found
    with workplace(job, reporter):
        if found := unchanged(job):  # by a run that this one has waited for
            return found
        for left in reversed(range(REPAIRS + 1)):
            try:
                with open_engine(recipe.cluster, reporter) as engine:
                    engine.check_places(*_local_places(job))
                    return _make(job, engine, step)
            except IncompleteStoreError as error:
                if error.damaged is None or not left:
                    raise
                _discard(error.damaged, reporter)
    raise AssertionError("the last attempt returns or raises")
