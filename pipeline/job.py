"""A job: a resolved recipe with its plan and the identities of everything that goes into it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.drafting import make_plan, open_sources
from pipeline.opening import Opened
from pipeline.plan import MergePlan, TensorPlan
from pipeline.recipe import Recipe
from pipeline.router_inputs import RouterInputs, identify_router
from pipeline.vocabulary import compare_vocabularies
from storage.artifact import WORK
from storage.checkpoint import Checkpoint
from storage.deltas import StoredRows, base_group
from storage.digests import digest_of, short_id
from storage.errors import ChangedError, ChannelMergingError, OutputExistsError, together
from storage.files import Folder
from storage.layout import ARTIFACT_FORMAT, DTYPES, is_transposed
from storage.places import scheme_of
from storage.publishing import check_output
from storage.stores import Store, open_store
from storage.tensors import TensorInfo

COMPUTING_PACKAGES = ("numpy", "numba", "torch", "scikit-learn", "scipy", "dask-ml")
"""Packages whose arithmetic the result depends on; their major versions are part of a job's inputs."""
STAGED = "staged"
RECORDED_PACKAGES = (*COMPUTING_PACKAGES, "zarr", "safetensors", "dask", "distributed")


@dataclass(frozen=True)
class Source:
    """A checkpoint and what identifies its content."""

    folder: Folder
    id: str
    files: Mapping[str, str]
    """What identifies every file used, by name: its sha256 where that is known."""
    stamps: Mapping[str, Any]
    """What a change of a file would show in, taken before it was identified."""
    side: Mapping[str, Path]
    """Local copies of configuration and tokenizer; an adapter has its base's where it has none of its own."""
    parameters: int
    is_adapter: bool
    copies: tuple[tuple[TensorInfo, TensorInfo], ...]
    """Stored tensors that its config ties to others, and these: they are left out, so they must be equal."""


def check_unchanged(label: str, source: Source) -> None:
    """CheckpointError when a file of the source is no longer what was identified: its rows must not go by its id."""
    changed = source.folder.changed(source.stamps, source.files)
    if changed:
        raise ChangedError(f"{label}: {source.folder.place}: {', '.join(changed)} changed while the run read it. Run again.")


@dataclass(frozen=True)
class Job:
    """Everything a stage needs; small, and it pickles."""

    recipe: Recipe
    plan: MergePlan
    base: Source
    stored_base: Mapping[str, TensorInfo]
    """The base's tensors that are copied into the delta store, where the plan reads them: array -> where they come from."""
    experts: Mapping[str, Source]
    """In order of name."""
    router: RouterInputs
    """What the router is made from."""
    inputs: str
    """Digest of all that determines the result."""

    def check_sources(self) -> None:
        """CheckpointError or QueryDataError when anything the job read is no longer what was identified."""
        check_unchanged("base", self.base)
        for name, source in self.experts.items():
            check_unchanged(f"expert {name}", source)
        self.router.check()

    @property
    def deltas(self) -> Store:
        return open_store(self.recipe.deltas)

    @property
    def output(self) -> Store:
        return open_store(self.recipe.output)

    @property
    def place_of_work(self) -> str:
        """Where below the output this job's unfinished work lies; never readable as an artifact."""
        return f"{WORK}/{self.inputs[:40]}"

    @property
    def work(self) -> Store:
        """This job's unfinished work."""
        return self.output.under(self.place_of_work)

    @property
    def receipts(self) -> Store:
        """Receipts for files as they are now: what was read while one was another says nothing, be it the old one again."""
        seen = digest_of([dict(source.stamps) for source in (self.base, *self.experts.values())])[:16]
        return self.work.under(f"receipts/{seen}")

    @property
    def staged(self) -> Store:
        """What becomes the version."""
        return self.work.under(STAGED)

    @property
    def place_of_staged(self) -> str:
        """Where below the output that lies."""
        return f"{self.place_of_work}/{STAGED}"


def package_versions() -> dict[str, str]:
    return {name: version(name) for name in RECORDED_PACKAGES}


def _inputs(recipe: Recipe, base: Source, experts: Mapping[str, Source], router: RouterInputs) -> str:
    """Digest of what determines the result: not paths, cluster or display name."""
    covered: dict[str, Any] = {
        "format": ARTIFACT_FORMAT,
        "kernel": recipe.cluster.kernel,
        "merge": recipe.merge.model_dump(mode="json"),
        "router": router.covered,
        "base": dict(base.files),
        "experts": {name: [dict(source.files), recipe.experts[name].weight] for name, source in experts.items()},
        "packages": {name: version(name).split(".")[0] for name in COMPUTING_PACKAGES},
    }
    return digest_of(covered)


def check_places(recipe: Recipe) -> None:
    """OutputExistsError when delta store or output would be written into something that is not ours."""
    check_output(recipe.output)
    deltas = Path(recipe.deltas)
    if not scheme_of(recipe.deltas) and deltas.exists() and not deltas.is_dir():
        raise OutputExistsError(f"deltas {deltas} is a file, not a folder. Choose another place for the delta store.")


def _identified(base: Source | None, checkpoint: Checkpoint, ties: Mapping[str, str]) -> Source:
    """A checkpoint's content by its digests."""
    folder = checkpoint.folder
    stamps = folder.stamps(checkpoint.files)
    files = folder.identities(checkpoint.files)
    side = folder.local(checkpoint.side_files)
    if checkpoint.is_adapter and base is not None:
        side = {**base.side, **side}
    entries = sum(info.rows * info.width for info in checkpoint.tensors.values())
    copies = () if checkpoint.is_adapter else stored_copies(checkpoint, ties)
    return Source(folder, folder.id or short_id(files), files, stamps, side, entries, checkpoint.is_adapter, copies)


def stored_copies(checkpoint: Checkpoint, ties: Mapping[str, str]) -> tuple[tuple[TensorInfo, TensorInfo], ...]:
    """The tensors that a checkpoint stores although its config ties them to others, and these."""
    held = checkpoint.tensors
    return tuple((held[name], held[partner]) for name, partner in ties.items() if name in held)


def stored_base(base: Checkpoint) -> dict[str, TensorInfo]:
    """The base's tensors that are copied into the store: all of a remote one, those stored (in, out) of a local one.

    Whatever a recipe uses of them, and whether the Hub's are read from its client's cache: runs of one base share the copy.
    """
    at_hand = base.folder.is_local and base.folder.id is None
    return {
        name: info
        for name, info in base.tensors.items()
        if info.dtype in DTYPES and 0 not in info.shape and (not at_hand or is_transposed(info.shape, info.channel_axis))
    }


def _with_stored_base(recipe: Recipe, plan: MergePlan, opened: Opened, base: Source) -> tuple[MergePlan, dict[str, TensorInfo]]:
    """The plan with the base's tensors read from the delta store where they are not rows of a local file.

    Every expert, the similarity pass and the merge read them: they are fetched, or transposed, once.
    """
    names = {info.data: name for name, info in opened.base.tensors.items()}
    group = base_group(open_store(recipe.deltas), base.id)
    stored = stored_base(opened.base)
    tensors: dict[str, TensorPlan] = {}
    for name, tensor in plan.tensors.items():
        own = tensor.base
        array = "" if own is None else names[own.data]  # of a tied tensor, its partner
        kept = own is not None and array in stored
        tensors[name] = replace(tensor, base=replace(own, data=StoredRows(group, array))) if own and kept else tensor
    return replace(plan, tensors=tensors), stored


def _pinned(recipe: Recipe, opened: Opened, router: RouterInputs) -> Recipe:
    """The recipe with the sources that were opened: revisions as commits."""
    experts = {
        name: recipe.experts[name].model_copy(update={"source": checkpoint.folder.place})
        for name, checkpoint in opened.experts.items()
    }
    return recipe.model_copy(update={"base": opened.base.folder.place, "experts": experts, "router": router.section})


def _checked(recipe: Recipe, checks: Iterable[Callable[[Recipe], object]]) -> list[Any]:
    """What the checks return; one error for all that they raise."""
    found, errors = [], []
    for check in checks:
        try:
            found.append(check(recipe))
        except ChannelMergingError as error:
            errors.append(error)
    if errors:
        raise together(errors)
    return found


def plan_recipe(recipe: Recipe) -> MergePlan:
    """The plan of a recipe from configs and headers alone."""
    return make_plan(recipe, open_sources(recipe))


def _identified_router(recipe: Recipe) -> RouterInputs:
    return identify_router(recipe.router)


def _opened_and_planned(recipe: Recipe) -> tuple[Opened, MergePlan]:
    opened = open_sources(recipe)
    return opened, make_plan(recipe, opened)


def resolve(recipe: Recipe, *more_checks: Callable[[Recipe], object]) -> Job:
    """Plan a recipe and identify its sources. Every problem that can be seen without reading weights is raised here.

    ``more_checks`` are the caller's own; what they raise is listed with the rest.
    """
    *_, router, (opened, plan) = _checked(recipe, (check_places, *more_checks, _identified_router, _opened_and_planned))
    recipe = _pinned(recipe, opened, router)
    base = _identified(None, opened.base, {})
    with ThreadPoolExecutor(len(opened.experts)) as pool:
        found = pool.map(lambda name: _identified(base, opened.experts[name], plan.ties[name]), opened.experts)
        sources = dict(zip(opened.experts, found, strict=True))
    mutable = any(source.stamps for source in (base, *sources.values()))
    if mutable and open_sources(recipe) != opened:  # headers were read before the stamps were taken
        raise ChangedError("a checkpoint changed while its headers were read. Run again.")
    plan, stored = _with_stored_base(recipe, plan, opened, base)
    plan = replace(plan, notes=(*plan.notes, *compare_vocabularies(plan, base.side, {n: s.side for n, s in sources.items()})))
    return Job(recipe, plan, base, stored, sources, router, _inputs(recipe, base, sources, router))
