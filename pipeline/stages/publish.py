"""Publish: model card and manifest, then the staged folder becomes a version."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import jinja2

from pipeline.job import KERNEL, Job, package_versions
from pipeline.stages.merge import MergeReceipt
from pipeline.stages.pack import Packed
from storage.artifact import publish as publish_folder
from storage.digests import sha256_file
from storage.layout import ARTIFACT_FORMAT, CARD
from storage.manifest import ExpertRecord, FileRecord, Manifest, ParameterCounts, version_of


def _expert_records(job: Job, receipts: Sequence[MergeReceipt]) -> dict[str, ExpertRecord]:
    records = {}
    for position, (name, source) in enumerate(job.experts.items()):
        error = sum(receipt.error_squares[position] for receipt in receipts)
        norm = sum(receipt.delta_squares[position] for receipt in receipts)
        records[name] = ExpertRecord(
            source=job.recipe.experts[name].source,
            id=source.id,
            weight=job.recipe.experts[name].weight,
            files=dict(source.files),
            tied=dict(job.plan.ties[name]),
            parameters=source.parameters,
            reconstruction_error=(error / norm) ** 0.5 if norm else None,
        )
    return records


def _parameters(job: Job, packed: Packed) -> ParameterCounts:
    pool = sum(record.rows * job.plan.tensors[name].width for name, record in packed.tensors.items())
    experts = sum(source.parameters for source in job.experts.values())
    return ParameterCounts(pool=pool, experts=experts, ratio=pool / experts)


def _card(manifest: Manifest, unchanged: Mapping[str, int]) -> str:
    template = files("pipeline.stages").joinpath("card.md.j2").read_text("utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)  # noqa: S701 - Markdown, not HTML
    return environment.from_string(template).render(m=manifest, policies=unchanged)


def _file_record(job: Job, name: str) -> FileRecord:
    path = job.staged / name
    return FileRecord(bytes=path.stat().st_size, sha256=sha256_file(path))


def publish(
    job: Job,
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
        experts=_expert_records(job, receipts),
        tensors=packed.tensors,
        files=records,
        parameters=_parameters(job, packed),
        router=router,
        seed=job.recipe.merge.seed,
        kernel=KERNEL,
        packages=package_versions(),
        seconds=dict(seconds),
        moved=dict(moved),
    )
    policies: dict[str, int] = {}
    for tensor in packed.tensors.values():
        policies[tensor.policy] = policies.get(tensor.policy, 0) + 1
    (job.staged / CARD).write_text(_card(manifest, policies), "utf-8")
    manifest = manifest.model_copy(update={"files": {**records, CARD: _file_record(job, CARD)}})
    return manifest, publish_folder(job.staged, job.output, manifest)
