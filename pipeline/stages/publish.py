"""Publish: the manifest of what is staged, and how the staged folder becomes a version."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Callable
from typing import Any

from pipeline.job import Job, package_versions
from pipeline.kernels.methods.byom import kept_per_row
from pipeline.stages.pack import Packed
from pipeline.stages.waves import Waves
from storage.layout import ARTIFACT_FORMAT, DOCUMENTS
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


def _file_record(job: Job, name: str) -> FileRecord:
    content = job.staged.get(name)
    return FileRecord(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def describe(waves: Waves, router: dict[str, Any] | None) -> Manifest:
    """The manifest of what is staged, without the documents that are made from it."""
    job, packed = waves.job, waves.packed
    if packed is None:
        raise AssertionError("nothing is packed")
    job.check_sources()
    others = staged_files(job.output, job.place_of_staged).keys() - packed.files.keys() - set(DOCUMENTS)
    records = {**packed.files, **{name: _file_record(job, name) for name in sorted(others)}}
    notes = [note for name in job.experts for note in waves.health_notes[name]]
    return Manifest(
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
        notes=(*job.plan.notes, *notes, *waves.grouping.notes),
    )


def publish(job: Job, manifest: Manifest, waiting: Callable[[], None]) -> bool:
    """Make the staged folder the version of its manifest; False when it was there. What the job read must not have changed."""
    job.check_sources()
    return publish_staged(job.output, job.place_of_staged, manifest, waiting)
