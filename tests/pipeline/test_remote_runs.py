"""Whole runs from a Hub and from an object store on loopback: the same version as from local folders, and no copies."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import obstore
import pytest
import torch
import yaml
from moto.server import ThreadedMotoServer
from obstore.store import S3Store
from safetensors.torch import load_file, save_file

from flows.planning import judge
from pipeline.recipe import load_recipe
from storage.artifact import Artifact
from storage.checkpoint import SIDE_FILES
from storage.errors import SourceError
from tests.pipeline.test_adapters import ADAPTERS
from tests.pipeline.test_adapters import write_family as write_adapters
from tests.pipeline.test_architectures import EXPERTS, model_of, noisy
from tests.pipeline.test_architectures import write_family as write_gpt2
from tests.support.hub_server import HubServer, hub_environment
from tests.support.running import command, merged
from tests.support.tiny_experts import NAMES, Family, read_checkpoint

SHARDS = r"cdn GET .*\.safetensors"


@pytest.fixture
def hub(family: Family) -> Iterator[HubServer]:
    """The family as repositories tiny/base, tiny/math, …"""
    with HubServer() as server:
        for name in ("base", *NAMES):
            server.add_repo(f"tiny/{name}", family.folder / name)
        yield server


def hub_recipe(family: Family, **changes: Any) -> Path:
    experts = {name: f"tiny/{name}" for name in NAMES}
    places = {"base": "tiny/base@main", "deltas": "../hub-deltas", "output": "../hub-output"}
    return family.recipe(**{**places, "experts": experts, **changes})


def run(recipe: Path, environment: dict[str, str]) -> dict[str, Any]:
    found = command("run", recipe, "--json", environment=environment)
    assert found.returncode == 0, found.stderr
    result: dict[str, Any] = json.loads(found.stdout)
    return result


def weights(folder: Path) -> list[Path]:
    """Whole weight files under a folder."""
    return [path for path in folder.rglob("*") if path.is_file() and path.name.endswith((".safetensors", ".incomplete"))]


def test_a_run_from_the_hub_makes_the_same_version_and_no_copies(family: Family, hub: HubServer, tmp_path: Path) -> None:
    environment = hub_environment(hub.url, tmp_path / "hf")
    found = run(hub_recipe(family), environment)
    assert found["version"] == merged(family.recipe()).version
    assert not weights(tmp_path / "hf")
    manifest = Artifact(found["path"]).manifest
    for name in NAMES:
        source = manifest.experts[name].source
        assert source == f"tiny/{name}@{manifest.experts[name].id}"
        assert len(manifest.experts[name].id) == 40
    assert manifest.recipe["base"] == f"tiny/base@{manifest.base['id']}"
    assert not hub.leaks


def test_what_is_in_the_store_is_not_fetched_again(family: Family, hub: HubServer, tmp_path: Path) -> None:
    environment = hub_environment(hub.url, tmp_path / "hf")
    run(hub_recipe(family), environment)
    largest = max(request.sent for request in hub.asked(SHARDS))
    assert largest > 0
    hub.requests.clear()
    recipe = hub_recipe(family, **{"merge.groups": 3})
    plan = json.loads(command("plan", recipe, "--json", environment=environment).stdout)
    beside = [path for name in ("base", *NAMES) for path in (family.folder / name).iterdir() if path.name in SIDE_FILES]
    assert plan["totals"]["fetch"] == sum(path.stat().st_size for path in beside)
    assert run(recipe, environment)["new"]
    assert all(request.range is not None for request in hub.asked(SHARDS))
    starts = [str(request.range).removeprefix("bytes=").partition("-")[0] for request in hub.asked(SHARDS)]
    assert set(starts) == {"0"}  # headers


def test_workers_of_a_cluster_fetch_for_themselves(family: Family, hub: HubServer, tmp_path: Path) -> None:
    environment = hub_environment(hub.url, tmp_path / "hf")
    recipe = hub_recipe(family, cluster={"kind": "local", "workers": 2})
    assert run(recipe, environment)["version"] == merged(family.recipe()).version


def test_recipes_of_one_base_share_its_copy(family: Family, hub: HubServer, tmp_path: Path) -> None:
    """Whatever tensors their experts use: the second neither fetches it again nor takes it from under the first."""
    for name in ("base", "math"):
        path = family.folder / name / "model.safetensors"
        save_file({**load_file(path), "classifier.weight": torch.ones(3, 16, dtype=torch.bfloat16)}, path)
    environment = hub_environment(hub.url, tmp_path / "hf")
    first = {"experts": {name: f"tiny/{name}" for name in ("math", "code")}}
    second = {"experts": {name: f"tiny/{name}" for name in ("code", "chinese")}, "output": "../second"}
    made = run(hub_recipe(family, **first), environment)["version"]
    (copy,) = (family.folder.parent / "hub-deltas").glob("*/base/complete.json")
    before = copy.read_bytes(), copy.stat().st_mtime_ns
    run(hub_recipe(family, **second), environment)
    assert (copy.read_bytes(), copy.stat().st_mtime_ns) == before
    shutil.rmtree(family.folder.parent / "hub-output")
    hub.forget()
    assert run(hub_recipe(family, **first), environment)["version"] == made
    assert {str(request.range).partition("-")[0] for request in hub.asked(SHARDS)} == {"bytes=0"}


def test_a_private_family_is_read_with_a_token_that_is_kept_nowhere(family: Family, tmp_path: Path) -> None:
    with HubServer() as server:
        for name in ("base", *NAMES):
            server.add_repo(f"tiny/{name}", family.folder / name, private=name != "base")
        environment = hub_environment(server.url, tmp_path / "hf")
        refused = command("run", hub_recipe(family), environment=environment)
        assert refused.returncode == 2
        assert refused.stderr.count("HF_TOKEN") == len(NAMES), refused.stderr
        assert not (family.folder.parent / "hub-output" / "latest.json").exists()
        found = run(hub_recipe(family), {**environment, "HF_TOKEN": server.token})
        assert not server.leaks
        kept = [
            path for path in family.folder.parent.rglob("*") if path.is_file() and server.token.encode() in path.read_bytes()
        ]
        assert kept == []
        assert found["new"]


def test_a_run_gets_over_faults_of_the_hub(family: Family, hub: HubServer, tmp_path: Path) -> None:
    hub.fail(r"hub GET /api/models/tiny/math", times=1, status=503, headers={"Retry-After": "0"})
    hub.fail(r"cdn GET /tiny/code/", times=2, cut=100)
    hub.fail(r"cdn GET /tiny/chinese/", times=1, status=429, headers={"Retry-After": "0"})
    found = run(hub_recipe(family), hub_environment(hub.url, tmp_path / "hf"))
    assert found["version"] == merged(family.recipe()).version


def test_a_hub_that_is_not_there_is_no_fault_of_the_recipe(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with HubServer() as server:
        url = server.url
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("storage.hub.WAIT_S", 0.01)
    with pytest.raises(SourceError, match="tiny/base") as caught:
        judge(load_recipe(hub_recipe(family)))
    assert caught.value.exit_code == 3
    assert len(caught.value.problems) == 1 + len(NAMES)


def test_the_plan_reads_headers_and_says_what_a_run_will_fetch(family: Family, hub: HubServer, tmp_path: Path) -> None:
    found = command("plan", hub_recipe(family), "--json", environment=hub_environment(hub.url, tmp_path / "hf"))
    assert found.returncode == 0, found.stderr
    told = json.loads(found.stdout)
    for source in told["sources"]:
        name = source["place"].partition("@")[0].partition("/")[2]
        tensors = read_checkpoint(family.folder / name)
        beside = sum(path.stat().st_size for path in (family.folder / name).iterdir() if path.name in SIDE_FILES)
        assert source["fetch"] == beside + sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        assert source["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert told["totals"]["fetch"] == sum(source["fetch"] for source in told["sources"])
    assert not (tmp_path / "hf" / "hub").exists() or not weights(tmp_path / "hf")


def test_an_adapter_on_the_hub_is_an_expert(tmp_path: Path) -> None:
    """Its factors alone are fetched, and what comes of it is what comes of local folders."""
    recipe = write_adapters(tmp_path / "family", torch.bfloat16)
    names = ("base", "full", *ADAPTERS)
    with HubServer() as server:
        for name in names:
            server.add_repo(f"tiny/{name}", tmp_path / "family" / name)
        places = {"base": "tiny/base", "deltas": "../hub-deltas", "output": "../hub-output"}
        remote = {**yaml.safe_load(recipe.read_text()), **places, "experts": {name: f"tiny/{name}" for name in names[1:]}}
        (tmp_path / "family" / "remote.yaml").write_text(yaml.safe_dump(remote))
        environment = hub_environment(server.url, tmp_path / "hf")
        told = json.loads(command("plan", tmp_path / "family" / "remote.yaml", "--json", environment=environment).stdout)
        found = run(tmp_path / "family" / "remote.yaml", environment)
    fetch = {source["label"]: source["fetch"] for source in told["sources"]}
    for name in ADAPTERS:
        factors = read_checkpoint(tmp_path / "family" / name)
        size = sum(tensor.numel() * tensor.element_size() for tensor in factors.values())
        whole = (tmp_path / "family" / name / "adapter_model.safetensors").stat().st_size
        assert size <= fetch[f"expert {name}"] <= whole + 2000, name
    assert found["version"] == merged(recipe).version


def test_offline_reads_what_was_downloaded(family: Family, hub: HubServer, tmp_path: Path) -> None:
    environment = hub_environment(hub.url, tmp_path / "hf")
    offline = {**environment, "HF_HUB_OFFLINE": "1"}
    refused = command("plan", hub_recipe(family), environment=offline)
    assert refused.returncode == 2
    assert "HF_HUB_OFFLINE" in refused.stderr
    script = "import sys, huggingface_hub as h; [h.snapshot_download(name) for name in sys.argv[1:]]"
    subprocess.run([sys.executable, "-c", script, *(f"tiny/{n}" for n in ("base", *NAMES))], env=environment, check=True)
    hub.requests.clear()
    found = run(hub_recipe(family), offline)
    assert hub.requests == []
    assert found["version"] == merged(family.recipe()).version


def test_a_run_without_network_leaves_the_copy_of_the_base_alone(tmp_path: Path) -> None:
    """Matrices stored (in, out), of which a base on a disk would have only these copied."""
    write_gpt2(tmp_path / "family", model_of("gpt2"), noisy)
    with HubServer() as server:
        for name in ("base", *EXPERTS):
            server.add_repo(f"tiny/{name}", tmp_path / "family" / name)
        fields = yaml.safe_load((tmp_path / "family" / "recipe.yaml").read_text())
        fields |= {"base": "tiny/base", "experts": {name: f"tiny/{name}" for name in EXPERTS}}
        (tmp_path / "family" / "remote.yaml").write_text(yaml.safe_dump(fields))
        environment = hub_environment(server.url, tmp_path / "hf")
        made = run(tmp_path / "family" / "remote.yaml", environment)
        script = "import sys, huggingface_hub as h; [h.snapshot_download(name) for name in sys.argv[1:]]"
        names = [f"tiny/{name}" for name in ("base", *EXPERTS)]
        subprocess.run([sys.executable, "-c", script, *names], env=environment, check=True)
        (copy,) = (tmp_path / "deltas").glob("*/base/complete.json")
        before = copy.read_bytes(), copy.stat().st_mtime_ns
        fields |= {"output": "../offline"}
        (tmp_path / "family" / "remote.yaml").write_text(yaml.safe_dump(fields))
        found = run(tmp_path / "family" / "remote.yaml", {**environment, "HF_HUB_OFFLINE": "1"})
    assert found["version"] == made["version"]
    assert (copy.read_bytes(), copy.stat().st_mtime_ns) == before


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    """The environment of a process that uses an object store on loopback."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"AWS_ACCESS_KEY_ID": "loopback", "AWS_SECRET_ACCESS_KEY": "loopback", "AWS_REGION": "us-east-1"}
    yield {**os.environ, **keys, "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ALLOW_HTTP": "true"}
    server.stop()


def test_a_run_from_an_object_store_makes_the_same_version(family: Family, s3: dict[str, str]) -> None:
    bucket = f"{s3['AWS_ENDPOINT_URL']}/experts"
    # with the form type that urllib sends by default moto waits for a form
    urllib.request.urlopen(urllib.request.Request(bucket, method="PUT", headers={"Content-Type": "text/plain"})).close()
    store = S3Store(
        "experts", endpoint=s3["AWS_ENDPOINT_URL"], access_key_id="loopback", secret_access_key="loopback", region="us-east-1",
        client_options={"allow_http": True},
    )  # fmt: skip
    for name in ("base", *NAMES):
        for path in (family.folder / name).iterdir():
            obstore.put(store, f"tiny/{name}/{path.name}", path)
    experts = {name: f"s3://experts/tiny/{name}" for name in NAMES}
    recipe = family.recipe(base="s3://experts/tiny/base/", experts=experts, deltas="../s3-deltas", output="../s3-output")
    found = run(recipe, s3)
    assert found["version"] == merged(family.recipe()).version
    manifest = Artifact(found["path"]).manifest
    assert manifest.experts["math"].source == "s3://experts/tiny/math"
    assert "loopback" not in (Path(found["path"]) / "manifest.json").read_text()
    missing = command("plan", family.recipe(base="s3://experts/nothing/here", experts=experts), environment=s3)
    assert missing.returncode == 2
    assert "s3://experts/nothing/here" in missing.stderr
