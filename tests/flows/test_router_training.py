"""Whole runs with a BERT router: by the command line, on a cluster one of whose workers says that it has a GPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.retrain import retrain
from pipeline.engine import Silent
from pipeline.recipe import load_recipe
from serving.router import artifact_router
from storage.artifact import Artifact
from storage.stores import Store
from tests.pipeline.test_invariants import router_of
from tests.support import dask_processes
from tests.support.encoders import write_encoder
from tests.support.running import command
from tests.support.tiny_experts import Family


@pytest.fixture
def scheduler(tmp_path: Path, output: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Of two workers, whose environment leads to the output."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with dask_processes.scheduler() as (address, _):
        folders = [tmp_path / name for name in ("first", "second")]
        for folder in folders:
            folder.mkdir()
        with (
            dask_processes.worker(address, folder=folders[0]),
            dask_processes.worker(address, "--nthreads", "1", "--resources", "GPU=1", folder=folders[1]),
        ):
            yield address


def said(stderr: str, text: str) -> list[str]:
    return [line for line in stderr.splitlines() if text in line]


def test_a_bert_router_is_trained_where_a_gpu_is(
    family: Family, scheduler: str, output: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a run, and then anew for what it has published."""
    router = router_of(family)
    lines = [line for path in sorted(Path(family.folder).glob("*.jsonl")) for line in path.read_text().splitlines()]
    write_encoder(tmp_path / "encoder", lines)
    bert: dict[str, Any] = {"kind": "bert", "encoder": str(tmp_path / "encoder"), "batch": 16, "learning_rate": 3e-3}
    recipe = family.recipe(
        router=router | bert | {"epochs": 2, "max_length": 64}, output=output.place, cluster={"address": scheduler}
    )
    ran = command("run", recipe, "--json")
    assert ran.returncode == 0, ran.stderr
    assert len(said(ran.stderr, "note: the router is trained on worker tcp://127.0.0.1:")) == 1
    assert said(ran.stderr, "note: update ")
    found = json.loads(ran.stdout)
    artifact = Artifact(output.under(found["version"]))
    assert artifact.verify() == []
    assert (artifact.manifest.router or {})["kind"] == "bert"
    assert {"queries", "router"} < artifact.manifest.seconds.keys()
    config = json.loads(output.get(f"{found['version']}/router/router.json"))
    assert config["kind"] == "bert"
    assert sorted(config["experts"]) == sorted(family.experts)
    assert [name for name in output.children(".work") if not name.endswith(".version")] == []
    noted: list[str] = []
    reporter = Silent()
    monkeypatch.setattr(reporter, "note", noted.append)
    anew = retrain(load_recipe(recipe, {"router.epochs": 1}), None, reporter)
    assert anew.new
    assert noted[0].startswith("the router is trained on worker tcp://127.0.0.1:")
    assert Artifact(output.under(anew.version)).verify() == []
    (chosen,) = artifact_router(Artifact(output.under(anew.version))).route(["math question number 3 about htam 21"])
    assert sum(chosen.values()) == pytest.approx(1)
