"""One run, from a recipe to a published version. The command line runs its steps as they are, the Prefect flow as tasks."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import copy_context
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from flows.training import router_training
from pipeline.engine import Cancelled, Engine, Reporter, Waiting, open_engine
from pipeline.job import Job, resolve
from pipeline.recipe import Recipe, load_recipe
from pipeline.router_inputs import ENCODER
from serving.documents import with_documents
from storage.atomic import canonical_json
from storage.deltas import JOB, run_record
from storage.errors import ChannelMergingError, IncompleteStoreError, RecipeError, together
from storage.manifest import Manifest
from storage.publishing import find_by_inputs, is_published, make_latest
from storage.stores import Store, open_store

WRONG_INPUT = RecipeError.exit_code
REPAIRS = 5
"""Damaged chunks of the delta store that one run makes anew."""

INGEST = "ingest "
"""Begins the name of a step that brings one expert."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Outcome:
    """What a run came to."""

    version: str
    place: str
    """Where the version lies: a path or a URL."""
    new: bool
    """False when the version, or one of the same inputs, was there already, and the run that made it has said so."""
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


def job_record(name: str, output: Store, base: str, experts: Iterable[str]) -> bytes:
    """``job.json``: whose unfinished work it is, and what it needs."""
    return canonical_json(
        {
            "name": name,
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "host": platform.node(),
            "output": output.place,
            "base": base,
            "experts": sorted(experts),
        }
    )


def is_unfinished(work: Store) -> bool:
    """Whether a run works there, or died there. By a file: object stores may list folders that are empty."""
    return work.tagged(JOB) is not None


@contextmanager
def holding(output: Store, place: str, record: bytes, reporter: Reporter) -> Iterator[bool]:
    """A place for unfinished work, this run's alone; kept when the run fails, as the next one goes on from there.

    Whether an earlier run has left something there.
    """
    work = output.under(place)
    waiting = Waiting(reporter, f"waiting for another run of the same inputs that writes {work.place}")
    with output.lock(place, waiting):
        is_left = is_unfinished(work)
        work.put(JOB, record)
        try:
            yield is_left
        except ChannelMergingError as error:
            if is_wrong_input(error):  # these inputs will not be run again
                work.clear("")
            raise
        work.clear("")


@contextmanager
def workplace(job: Job, reporter: Reporter) -> Iterator[bool]:
    """The job's place for unfinished work, and whether an earlier run has left some."""
    record = job_record(job.recipe.name, job.output, job.base.id, (source.id for source in job.experts.values()))
    with holding(job.output, job.place_of_work, record, reporter) as is_left:
        job.deltas.put(run_record(job.base.id, job.inputs), record)
        yield is_left


def prepare(recipe: Recipe) -> Job:
    """Resolve a recipe; the router's queries are read too, so that a bad line is not met after the merge."""
    return resolve(recipe, check_queries)


def check_queries(recipe: Recipe) -> None:
    """QueryDataError or CheckpointError when the router could not be trained on the recipe's queries or from its encoder."""
    if recipe.router.kind == "none":
        return
    from router_training.data import check

    errors: list[ChannelMergingError] = []
    checks: list[Callable[[], object]] = [partial(check, recipe.router)]
    if recipe.router.kind == "bert":
        from router_training.encoders import check_encoder

        checks.append(partial(check_encoder, ENCODER, recipe.router.encoder))
    for one in checks:
        try:
            one()
        except ChannelMergingError as error:
            errors.append(error)
    if errors:
        raise together(errors)


class Conductor:
    """How the steps of a run are carried out: here, as they are. A flow makes a task run of each."""

    def step(self, name: str, body: Callable[[], Result], check: Callable[[], None] = lambda: None) -> Result:
        """Run one step and return what its body returns. Called from several threads at once.

        ``check`` raises when the run is given up: who lets a step wait asks it now and then.
        """
        return body()

    def cluster(self) -> AbstractContextManager[None]:
        """Holds what computes, while blocks are computed."""
        return nullcontext()

    def planned(self, job: Job) -> None:
        """Called within the step that plans."""


def _at_once(engine: Engine, conductor: Conductor, bodies: Mapping[str, Callable[[], None]]) -> None:
    """Run steps that wait for each other's waves. When one fails all end, and its error is raised.

    When what an expert brings is wrong, the others are looked at too: all that is wrong is one error.
    """
    with ThreadPoolExecutor(len(bodies), thread_name_prefix="step") as pool:
        steps = {
            name: pool.submit(copy_context().run, conductor.step, name, body, engine.check) for name, body in bodies.items()
        }
        incoming = [future for name, future in steps.items() if name.startswith(INGEST)]
        try:
            wait(steps.values(), return_when=FIRST_EXCEPTION)
            if any(future.done() and is_wrong_input(future.exception()) for future in incoming):
                wait(incoming)
        finally:
            if not all(future.done() for future in steps.values()):  # one has failed, or the run was interrupted
                engine.cancel()
    errors = [error for future in steps.values() if (error := future.exception()) is not None]
    if wrong := [error for error in errors if isinstance(error, ChannelMergingError) and is_wrong_input(error)]:
        raise together(wrong)
    for error in sorted(errors, key=lambda error: isinstance(error, Cancelled)):
        raise error


def is_wrong_input(error: BaseException | None) -> bool:
    """Whether a run failed for what it was given, so that the same run fails again."""
    return isinstance(error, ChannelMergingError) and error.exit_code == WRONG_INPUT


def _make(job: Job, engine: Engine, conductor: Conductor) -> Outcome:
    """Everything from the sources to the published version."""
    from pipeline.stages import publish
    from pipeline.stages.waves import Waves

    seed, reporter = job.recipe.merge.seed, engine.reporter
    with router_training(job.router, seed, job.staged, job.work, reporter, engine.check) as training:
        with Waves(job, engine) as waves:
            ingests = {f"{INGEST}{expert}": partial(waves.ingest, expert) for expert in waves.incoming}
            stages = {"similarity": waves.group, "merge": waves.merge, "pack": waves.pack}
            _at_once(engine, conductor, {**ingests, **training.steps, **stages})
        router = conductor.step("router", training.train)
    waves.seconds |= training.seconds
    manifest = conductor.step("report", lambda: with_documents(job.staged, publish.describe(waves, router)))
    waiting = Waiting(engine.reporter, f"waiting for another run that publishes in {job.output.place}", engine.check)
    is_new = not is_published(job.output, manifest.version)  # before: a second attempt finds what the first one did
    conductor.step("publish", lambda: publish.publish(job, manifest, waiting))
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


def _plan(job: Job, conductor: Conductor) -> None:
    """Look at the plan, and at samples of the experts, before anything is fetched."""
    from pipeline.stages import health

    health.probe(job)
    conductor.planned(job)


def run_recipe(recipe: Recipe, reporter: Reporter, conductor: Conductor | None = None) -> Outcome:
    """Resolve a recipe and make its artifact; do nothing when the same inputs have been published.

    Goes on where an earlier run of the same inputs ended. What is damaged in the delta store is made anew.
    """
    conductor = conductor or Conductor()
    reporter.start("resolve", 1)
    job = conductor.step("resolve", lambda: prepare(recipe))
    reporter.advance("resolve", f"{len(job.plan.tensors)} tensors")
    reporter.done("resolve")
    for note in job.plan.notes:
        reporter.note(note)
    if (found := unchanged(job)) and not is_unfinished(job.work):
        return found
    with workplace(job, reporter) as is_left:
        if found := unchanged(job):  # by a run that this one has waited for, or by one that died before it could say so
            return replace(found, new=is_left)
        conductor.step("plan", lambda: _plan(job, conductor))
        with conductor.cluster():
            return _made(job, reporter, conductor)


def _made(job: Job, reporter: Reporter, conductor: Conductor) -> Outcome:
    for left in reversed(range(REPAIRS + 1)):
        try:
            with open_engine(job.recipe.cluster, reporter) as engine:
                engine.check_places(*_local_places(job))
                return _make(job, engine, conductor)
        except IncompleteStoreError as error:
            if error.damaged is None or not left:
                raise
            _discard(error.damaged, reporter)
    raise AssertionError("the last attempt returns or raises")
