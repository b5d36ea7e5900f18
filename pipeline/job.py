"""A job: a resolved recipe with its plan and the identities of everything that goes into it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.plan import MergePlan, make_plan
from pipeline.recipe import Recipe
from storage.artifact import WORK, check_output
from storage.checkpoint import Checkpoint, open_checkpoint
from storage.digests import DigestCache, digest_of, sha256_file, short_id, stamp
from storage.errors import ChannelMergingError, CheckpointError, OutputExistsError, PlanError, QueryDataError
from storage.layout import ARTIFACT_FORMAT

COMPUTING_PACKAGES = ("numpy", "numba", "torch", "scikit-learn", "dask-ml", "mmh3")
"""Packages whose arithmetic the result depends on; their major versions are part of a job's inputs."""
RECORDED_PACKAGES = (*COMPUTING_PACKAGES, "zarr", "safetensors", "dask", "distributed")


@dataclass(frozen=True)
class Source:
    """A checkpoint and what identifies its content."""

    folder: Path
    id: str
    files: Mapping[str, str]
    """sha256 of every file used, by name."""
    stamps: Mapping[str, list[int]]
    """Size, times and inode of every file, taken before it was hashed."""
    parameters: int


def check_unchanged(label: str, source: Source) -> None:
    """CheckpointError when a file of the source is no longer what was hashed: its rows must not go by its id."""
    known = source.files
    changed = [name for name, seen in source.stamps.items() if not _is_same(source.folder / name, seen, known[name])]
    if changed:
        raise CheckpointError(f"{label}: {source.folder}: {', '.join(changed)} changed while the run read it. Run again.")


def _is_same(path: Path, seen: list[int], digest: str) -> bool:
    """Whether a file has its old stamp or, touched without a change, its old content."""
    try:
        return stamp(path.resolve()) == seen or sha256_file(path) == digest
    except OSError:
        return False


@dataclass(frozen=True)
class Job:
    """Everything a stage needs; small, and it pickles."""

    recipe: Recipe
    plan: MergePlan
    base: Source
    experts: Mapping[str, Source]
    """In order of name."""
    queries: Mapping[str, str]
    """sha256 of every file of queries, by expert."""
    query_stamps: Mapping[str, list[int]]
    inputs: str
    """Digest of all that determines the result."""

    def check_sources(self) -> None:
        """CheckpointError or QueryDataError when anything the job read is no longer what was hashed."""
        check_unchanged("base", self.base)
        for name, source in self.experts.items():
            check_unchanged(f"expert {name}", source)
        for name, seen in self.query_stamps.items():
            if not _is_same(Path(self.recipe.router.queries[name]), seen, self.queries[name]):
                raise QueryDataError(f"router.queries.{name}: the file changed while the run read it. Run again.")

    @property
    def deltas(self) -> Path:
        return Path(self.recipe.deltas)

    @property
    def output(self) -> Path:
        return Path(self.recipe.output)

    @property
    def work(self) -> Path:
        """Where this job's unfinished work lies; never readable as an artifact."""
        return self.output / WORK / self.inputs[:40]

    @property
    def staged(self) -> Path:
        """The folder that becomes the version."""
        return self.work / "staged"


def _open_all(recipe: Recipe) -> tuple[Checkpoint, dict[str, Checkpoint]]:
    """Base and experts; one error for all that cannot be opened."""
    places = [("base", recipe.base)] + [(f"expert {name}", recipe.experts[name].source) for name in recipe.expert_names]
    opened: list[Checkpoint] = []
    problems: list[str] = []
    for label, place in places:
        try:
            opened.append(open_checkpoint(label, Path(place)))
        except CheckpointError as error:
            problems += [f"{label}: {problem}" for problem in error.problems] or [str(error)]
    if problems:
        raise CheckpointError.listing("checkpoints cannot be read", problems)
    return opened[0], dict(zip(recipe.expert_names, opened[1:], strict=True))


def plan_recipe(recipe: Recipe) -> tuple[MergePlan, Checkpoint, dict[str, Checkpoint]]:
    """The plan of a recipe from configs and headers alone."""
    base, experts = _open_all(recipe)
    return make_plan(recipe, base, experts), base, experts


def package_versions() -> dict[str, str]:
    return {name: version(name) for name in RECORDED_PACKAGES}


def _inputs(recipe: Recipe, base: Source, experts: Mapping[str, Source], queries: Mapping[str, str]) -> str:
    """Digest of what determines the result: not paths, cluster or display name."""
    covered: dict[str, Any] = {
        "format": ARTIFACT_FORMAT,
        "kernel": recipe.cluster.kernel,
        "merge": recipe.merge.model_dump(mode="json"),
        "router": {"kind": recipe.router.kind, "queries": dict(queries)},
        "base": dict(base.files),
        "experts": {name: [dict(source.files), recipe.experts[name].weight] for name, source in experts.items()},
        "packages": {name: version(name).split(".")[0] for name in COMPUTING_PACKAGES},
    }
    return digest_of(covered)


def _check_places(recipe: Recipe) -> None:
    check_output(Path(recipe.output))
    deltas = Path(recipe.deltas)
    if deltas.exists() and not deltas.is_dir():
        raise OutputExistsError(f"deltas {deltas} is a file, not a folder. Choose another place for the delta store.")


def resolve(recipe: Recipe, *more_checks: Callable[[Recipe], object]) -> Job:
    """Plan a recipe and identify its sources. Every problem that can be seen without reading weights is raised here.

    ``more_checks`` are the caller's own; what they raise is listed with the rest.
    """
    errors: list[ChannelMergingError] = []
    for check in (_check_places, *more_checks, plan_recipe):
        try:
            check(recipe)
        except ChannelMergingError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise PlanError.listing("the recipe cannot be run", [p for error in errors for p in error.problems or (str(error),)])
    plan, base, experts = plan_recipe(recipe)
    paths = [c.folder / name for c in (base, *experts.values()) for name in c.files]
    asked = recipe.router.queries if recipe.router.kind != "none" else {}
    paths += map(Path, asked.values())
    stamps = {path: stamp(path.resolve()) for path in paths}
    known = DigestCache().sha256(paths)
    if plan_recipe(recipe)[0] != plan:  # headers were read before the stamps were taken
        raise CheckpointError("a checkpoint changed while its headers were read. Run again.")

    def source(checkpoint: Checkpoint) -> Source:
        files = {name: known[checkpoint.folder / name] for name in checkpoint.files}
        entries = sum(info.rows * info.width for info in checkpoint.tensors.values())
        seen = {name: stamps[checkpoint.folder / name] for name in checkpoint.files}
        return Source(checkpoint.folder, short_id(files), files, seen, entries)

    base_source = source(base)
    sources = {name: source(checkpoint) for name, checkpoint in experts.items()}
    queries = {name: known[Path(place)] for name, place in sorted(asked.items())}
    seen = {name: stamps[Path(place)] for name, place in sorted(asked.items())}
    return Job(recipe, plan, base_source, sources, queries, seen, _inputs(recipe, base_source, sources, queries))
