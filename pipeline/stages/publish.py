"""Publish: model card and manifest, then the staged folder becomes a version."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any

import jinja2

from pipeline.job import STAGED, Job, package_versions
from pipeline.kernels.methods.byom import kept_per_row
from pipeline.stages.pack import Packed
from pipeline.stages.waves import Waves
from storage.layout import ARTIFACT_FORMAT, CARD
from storage.manifest import ExpertRecord, FileRecord, Manifest, ParameterCounts, version_of
from storage.publishing import publish as publish_staged
from storage.publishing import staged_files


def _expert_records(waves: Waves) -> dict[str, ExpertRecord]:
    job, norms = waves.job, waves.grouping.delta_squares
    records = {}
    for position, (name, source) in enumerate(job.experts.items()):
        error = sum(receipt.error_squares[position] for receipt in waves.merged)
        norm = norms[position]
        records[name] = ExpertRecord(
            source=job.recipe.experts[name].source,
            id=source.id,
            weight=job.recipe.experts[name].weight,
            files=dict(source.files),
            renamed=dict(job.plan.renamed[name]),
            health=waves.health[name],
            tied=dict(job.plan.ties[name]),
            parameters=source.parameters,
            reconstruction_error=(error / norm) ** 0.5 if norm else None,
            trimmed_to=waves.trimmed_to.get(name),
        )
    return records


def _parameters(job: Job, packed: Packed) -> ParameterCounts:
    pool = sum(record.rows * job.plan.tensors[name].width for name, record in packed.tensors.items())
    kept = {tensor.name: kept_per_row(job.recipe.merge.keep, tensor.width) * tensor.base_rows for tensor in job.plan.combined}
    residue = sum(kept.values()) * len(job.experts) if job.recipe.merge.method == "byom" else 0
    experts = sum(source.parameters for source in job.experts.values())
    return ParameterCounts(pool=pool, residue=residue, experts=experts, ratio=(pool + residue) / experts)


def _card(manifest: Manifest, unchanged: Mapping[str, int]) -> str:
    template = files("pipeline.stages").joinpath("card.md.j2").read_text("utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)  # noqa: S701 - Markdown, not HTML
    return environment.from_string(template).render(m=manifest, policies=unchanged)


def _file_record(job: Job, name: str) -> FileRecord:
    content = job.staged.get(name)
    return FileRecord(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def publish(waves: Waves, router: dict[str, Any] | None, waiting: Callable[[], None]) -> tuple[Manifest, bool]:
    """Write card and manifest and publish. Returns the manifest and whether the version is new."""
    job, packed = waves.job, waves.packed
    if packed is None:
        raise AssertionError("nothing is packed")
    job.check_sources()
    others = staged_files(job.output, f"{job.place_of_work}/{STAGED}").keys() - packed.files.keys() - {CARD}
    records = {**packed.files, **{name: _file_record(job, name) for name in sorted(others)}}
    manifest = Manifest(
        format=ARTIFACT_FORMAT,
        name=job.recipe.name,
        version=version_of(records),
        inputs=job.inputs,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        recipe=job.recipe.model_dump(mode="json"),
        base={"source": job.recipe.base, "id": job.base.id, "files": dict(job.base.files)},
        experts=_expert_records(waves),
        tensors=packed.tensors,
        files=records,
        parameters=_parameters(job, packed),
        router=router,
        seed=job.recipe.merge.seed,
        kernel=job.recipe.cluster.kernel,
        packages=package_versions(),
        seconds=waves.seconds,
        moved=waves.moved,
        notes=(*job.plan.notes, *waves.health_notes, *waves.grouping.notes),
    )
    policies: dict[str, int] = {}
    for tensor in packed.tensors.values():
        policies[tensor.policy] = policies.get(tensor.policy, 0) + 1
    job.staged.put(CARD, _card(manifest, policies).encode())
    manifest = manifest.model_copy(update={"files": {**records, CARD: _file_record(job, CARD)}})
    return manifest, publish_staged(job.output, f"{job.place_of_work}/{STAGED}", manifest, waiting)
