"""A run whose object store answers badly all the time, and comes to the same version."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import moto.s3.models
import pytest

from flows.run import run_recipe
from pipeline import plan
from pipeline.engine import Silent
from pipeline.recipe import load_recipe
from storage import buckets, leases, object_store
from storage.artifact import Artifact
from storage.stores import open_store
from tests.fault.runs import CONSTANTS, Undisturbed
from tests.support.store_gateway import Gateway, Step, empty_bucket, moto_server

BUCKET = "outputs"
PLACE = f"s3://{BUCKET}/team"
BURSTS: tuple[list[Step], ...] = (["503 SlowDown"] * 3, [500], ["hang up"], [503, "hang up"])
LOST: tuple[list[Step], ...] = (["lost"],)
FAULTS: dict[str, tuple[int, tuple[list[Step], ...]]] = {
    "GET": (8, (*BURSTS, ["cut"], ["short"], ["short", "cut"])),
    "HEAD": (8, BURSTS),
    "PUT": (8, (*BURSTS, *LOST)),
    "CreateMultipartUpload": (1, (["503 SlowDown", 500], ["hang up"])),
    "UploadPart": (3, (*BURSTS, *LOST)),
    "CompleteMultipartUpload": (1, (["hang up"], ["503 SlowDown", 500], *LOST)),
    "CopyObject": (2, (*BURSTS, *LOST)),
    "DeleteObjects": (1, (*BURSTS, *LOST)),
}
"""Per operation the bursts that come, in turn, and how many requests pass before each."""


def script(operation: str) -> list[Step]:
    passing, bursts = FAULTS[operation]
    return [step for _ in range(50) for burst in bursts for step in [*["pass"] * passing, *burst]]


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    retries = buckets.RETRIES["max_retries"]
    monkeypatch.setattr(moto.s3.models, "S3_UPLOAD_PART_MIN_SIZE", 1)
    monkeypatch.setattr(object_store, "LEAST_PART_BYTES", 1024)
    monkeypatch.setattr(leases, "LEASE_BEAT_S", 0.5)
    monkeypatch.setattr(plan, "LEAST_WAVE_BYTES", CONSTANTS["pipeline.plan.LEAST_WAVE_BYTES"])
    monkeypatch.setattr(logging.getLogger("werkzeug"), "disabled", True)  # of thousands of requests
    with moto_server() as url, empty_bucket(url, BUCKET, monkeypatch) as gateway:
        monkeypatch.setitem(buckets.RETRIES, "max_retries", retries)  # as many as ever; only the pauses are short
        yield gateway


def test_a_run_sits_out_what_a_store_does_to_it(recipe: Path, bucket: Gateway, undisturbed: Undisturbed) -> None:
    scripts = {operation: script(operation) for operation in FAULTS}
    bucket.scripts.update({operation: [*steps] for operation, steps in scripts.items()})
    places = {"output": f"{PLACE}/output", "deltas": f"{PLACE}/deltas", "cluster.memory": "40KB"}
    outcome = run_recipe(load_recipe(recipe, places), Silent())
    met = {name: steps[: len(steps) - len(bucket.scripts[name])] for name, steps in scripts.items()}
    bucket.scripts.clear()
    assert (outcome.version, outcome.new) == (undisturbed.version, True)
    for operation, (_, bursts) in FAULTS.items():
        assert {str(step) for burst in bursts for step in burst} <= {str(step) for step in met[operation]}, operation
    output = open_store(places["output"])
    assert output.children() == sorted([outcome.version, ".work", "latest.json"])
    assert output.children(".work") == [f"{outcome.manifest.inputs}.{outcome.version}.version"]
    assert Artifact(places["output"]).verify() == []
    assert bucket.uploads(BUCKET) == 0
