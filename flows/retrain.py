"""A new router for an artifact that is there: another version with the same pool, rows and experts."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flows.run import Conductor, Outcome, check_queries, holding, is_unfinished, job_record
from flows.training import router_training
from pipeline.engine import Reporter, Waiting
from pipeline.job import package_versions
from pipeline.recipe import Recipe
from pipeline.router_inputs import RouterInputs, identify_router
from serving.documents import with_documents
from storage.artifact import WORK, Artifact
from storage.digests import digest_of
from storage.errors import ArtifactError, RecipeError
from storage.layout import ARTIFACT_FORMAT, DOCUMENTS
from storage.manifest import FileRecord, Manifest, version_of
from storage.publishing import find_by_inputs, inputs_of, is_published, make_latest, publish
from storage.stores import Store, open_store

INPUTS = "0" * 12
"""Begins the inputs of a version that was trained anew: no merge's digest will."""


def _kept(manifest: Manifest) -> dict[str, FileRecord]:
    """The files that do not depend on the router."""
    return {name: file for name, file in manifest.files.items() if not name.startswith("router/") and name not in DOCUMENTS}


def _check(recipe: Recipe, found: Artifact, output: Store) -> RouterInputs:
    """What the router is made from. RecipeError or ArtifactError when it cannot be one for this artifact."""
    if recipe.router.kind == "none":
        raise RecipeError(
            f"recipe {recipe.name}: router.kind is none: there is no router to train. Say linear or bert, and its queries."
        )
    manifest = found.manifest
    if manifest.parent is not None or found.store.place != output.under(manifest.version).place:
        raise ArtifactError(
            f"{found.place}: expected a published version in {output.place}, got a copy. Name one of its versions."
        )
    if manifest.format != ARTIFACT_FORMAT:
        raise ArtifactError(
            f"{found.place}: expected artifact format {ARTIFACT_FORMAT}, got {manifest.format}. Run the recipe: this release "
            "writes its own format."
        )
    experts = set(manifest.experts)
    if set(recipe.experts) != experts:
        raise RecipeError(
            f"recipe {recipe.name}: expected the experts of {found.place}, {', '.join(sorted(experts))}, got "
            f"{', '.join(sorted(recipe.experts))}. Use the recipe it was made from."
        )
    check_queries(recipe)
    return identify_router(recipe.router)


def _inputs(recipe: Recipe, manifest: Manifest, router: RouterInputs) -> str:
    versions = {name: version.split(".")[0] for name, version in package_versions().items()}
    packages = ["numpy", "scikit-learn", "scipy", "dask-ml", *(["torch"] if recipe.router.kind == "bert" else [])]
    covered: dict[str, Any] = {
        "files": {name: record.sha256 for name, record in _kept(manifest).items()},
        "router": {**router.covered, "seed": recipe.merge.seed},
        "packages": {name: versions[name] for name in packages},
    }
    return INPUTS + digest_of(covered)[len(INPUTS) :]


def _described(recipe: Recipe, old: Manifest, inputs: str, staged: Store, router: Any, seconds: dict[str, float]) -> Manifest:
    """The manifest of what is staged."""
    records = _kept(old)
    for name in sorted(staged.sizes("router")):
        content = staged.get(name)
        records[name] = FileRecord(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    return old.model_copy(
        update={
            "version": version_of(records), "inputs": inputs, "files": records, "router": router,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "recipe": {**old.recipe, "router": recipe.router.model_dump(mode="json")},
            "seconds": {**old.seconds, **seconds},
        }
    )  # fmt: skip


@contextmanager
def _cluster(recipe: Recipe, reporter: Reporter, conductor: Conductor) -> Iterator[None]:
    """The cluster that the recipe names by its address, where a BERT router may find the GPU that this process lacks."""
    from pipeline.dask_cluster import open_cluster
    from router_training.placement import has_gpu

    if recipe.router.kind != "bert" or "://" not in recipe.cluster.where or has_gpu():
        yield
        return
    with conductor.cluster(), open_cluster(recipe.cluster, reporter):
        yield


def retrain(recipe: Recipe, version: str | None, reporter: Reporter, conductor: Conductor | None = None) -> Outcome:
    """Train the recipe's router for a version in its output, the latest by default, and publish that as a version of its own.

    Pool, rows and experts are shared with the old version, not written again. Nothing is done when the same has been published
    before. The next run of a recipe that came to the old version is content with the new one while it is the latest.

    RecipeError, QueryDataError or ArtifactError for what cannot be trained on, or for.
    """
    conductor = conductor or Conductor()
    output = open_store(recipe.output)
    found = Artifact(output.under(version)) if version else Artifact(recipe.output)
    old = found.manifest
    made_from = conductor.step("resolve", lambda: _check(recipe, found, output))
    recipe = recipe.model_copy(update={"router": made_from.section})
    inputs = _inputs(recipe, old, made_from)
    place = f"{WORK}/{inputs[:40]}"
    record = job_record(recipe.name, output, str(old.base["id"]), (expert.id for expert in old.experts.values()))
    if (known := find_by_inputs(output, inputs)) is not None:
        make_latest(output, known.version)
        is_left = False
        if is_unfinished(output.under(place)):  # its run is at its end, or died there before it could say what it had published
            with holding(output, place, record, reporter) as is_left:
                pass
        return Outcome(known.version, output.under(known.version).place, new=is_left, manifest=known)
    if not is_published(output, old.version):
        raise ArtifactError(
            f"{found.place} is damaged, and a new version would share its files. Run its recipe again, which makes it anew, "
            "then train the router."
        )
    staged = f"{place}/staged"
    with holding(output, place, record, reporter):
        for name in _kept(old):
            output.share(f"{old.version}/{name}", f"{staged}/{name}")
        output.clear(f"{staged}/router")
        seed, files = recipe.merge.seed, output.under(staged)
        with router_training(made_from, seed, files, output.under(place), reporter) as training:
            for name, body in training.steps.items():
                conductor.step(name, body)
            with _cluster(recipe, reporter, conductor):
                router = conductor.step("router", training.train)
        made_from.check()
        manifest = conductor.step(
            "report", lambda: with_documents(files, _described(recipe, old, inputs, files, router, training.seconds))
        )
        waiting = Waiting(reporter, f"waiting for another run that publishes in {output.place}")
        merges = {old.inputs, *inputs_of(output, old.version)}
        replaced = sorted(one for one in merges if not one.startswith(INPUTS))
        is_new = not is_published(output, manifest.version)  # before: a second attempt finds what the first one did
        conductor.step("publish", lambda: publish(output, staged, manifest, waiting, replaced))
    return Outcome(manifest.version, output.under(manifest.version).place, is_new, manifest)
