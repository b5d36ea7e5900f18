"""Publish: model card and manifest, then the staged folder becomes a version."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import jinja2

from pipeline.job import Job, package_versions
from pipeline.kernels.methods.byom import kept_per_row
from pipeline.stages.cluster import Grouping
from pipeline.stages.merge import MergeReceipt
from pipeline.stages.pack import Packed
from pipeline.stages.similarity import Measured
from storage.artifact import publish as publish_folder
from storage.digests import sha256_file
from storage.layout import ARTIFACT_FORMAT, CARD
from storage.manifest import ExpertRecord, FileRecord, Health, Manifest, ParameterCounts, version_of


def _expert_records(
    job: Job, health: Mapping[str, Health], grouping: Grouping, measured: Measured, receipts: Sequence[MergeReceipt]
) -> dict[str, ExpertRecord]:
    records = {}
    for position, (name, source) in enumerate(job.experts.items()):
        error = sum(receipt.error_squares[position] for receipt in receipts)
        norm = grouping.delta_squares[position]
        records[name] = ExpertRecord(
            source=job.recipe.experts[name].source,
            id=source.id,
            weight=job.recipe.experts[name].weight,
            files=dict(source.files),
            renamed=dict(job.plan.renamed[name]),
            health=health[name],
            tied=dict(job.plan.ties[name]),
            parameters=source.parameters,
            reconstruction_error=(error / norm) ** 0.5 if norm else None,
            trimmed_to=measured.kept.get(name),
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
    path = job.staged / name
    return FileRecord(bytes=path.stat().st_size, sha256=sha256_file(path))


def publish(
    job: Job,
    health: Mapping[str, Health],
    health_notes: Sequence[str],
    grouping: Grouping,
    measured: Measured,
    packed: Packed,
    receipts: Sequence[MergeReceipt],
    router: dict[str, Any] | None,
    seconds: Mapping[str, float],
    moved: Mapping[str, int],
) -> tuple[Manifest, bool]:
    """Write card and manifest and publish. Returns the manifest and whether the version is new."""
    job.check_sources()
    others = {p.relative_to(job.staged).as_posix() for p in job.staged.rglob("*") if p.is_file()} - packed.pool_files.keys()
    records = {**packed.pool_files, **{name: _file_record(job, name) for name in others}}
    manifest = Manifest(
        format=ARTIFACT_FORMAT,
        name=job.recipe.name,
        version=version_of(records),
        inputs=job.inputs,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        recipe=job.recipe.model_dump(mode="json"),
        base={"source": job.recipe.base, "id": job.base.id, "files": dict(job.base.files)},
        experts=_expert_records(job, health, grouping, measured, receipts),
        tensors=packed.tensors,
        files=records,
        parameters=_parameters(job, packed),
        router=router,
        seed=job.recipe.merge.seed,
        kernel=job.recipe.cluster.kernel,
        packages=package_versions(),
        seconds=dict(seconds),
        moved=dict(moved),
        notes=(*job.plan.notes, *health_notes, *grouping.notes),
    )
    policies: dict[str, int] = {}
    for tensor in packed.tensors.values():
        policies[tensor.policy] = policies.get(tensor.policy, 0) + 1
    (job.staged / CARD).write_text(_card(manifest, policies), "utf-8")
    manifest = manifest.model_copy(update={"files": {**records, CARD: _file_record(job, CARD)}})
    return manifest, publish_folder(job.staged, job.output, manifest)
