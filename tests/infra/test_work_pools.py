"""Base job templates of the work pool, loaded by the workers' own classes."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import re
import stat
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.workers.base import BaseJobConfiguration
from prefect.workers.process import ProcessJobConfiguration, ProcessWorker
from prefect_docker.worker import DockerWorker, DockerWorkerJobConfiguration  # type: ignore[import-untyped]
from prefect_kubernetes.worker import KubernetesWorker, KubernetesWorkerJobConfiguration  # type: ignore[import-untyped]

from tests.infra.files import INFRA, POOLS, UID, WRITABLE, compose, document, program, service, template, version

WORKERS: dict[str, Any] = {"process": ProcessWorker, "docker": DockerWorker, "kubernetes": KubernetesWorker}
CONFIGURATIONS: dict[str, type[BaseJobConfiguration]] = {
    "process": ProcessJobConfiguration,
    "docker": DockerWorkerJobConfiguration,
    "kubernetes": KubernetesWorkerJobConfiguration,
}


class Blocks:
    """Stands for a Prefect server that holds Secret blocks."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    async def read_block_document_by_name(self, name: str, block_type_slug: str, **_: Any) -> Any:
        self.asked.append((block_type_slug, name))
        return SimpleNamespace(data={"value": f"the {name}"}, block_type_name="Secret", block_document_references={})

    async def read_variables(self, *_: Any, **__: Any) -> list[Any]:
        return []


def configured(pool: str, values: dict[str, Any] | None = None, blocks: Blocks | None = None) -> Any:
    """The configuration of a flow run in a pool, as its worker makes it."""
    kind, client = CONFIGURATIONS[pool], blocks or Blocks()
    made: Any = asyncio.run(kind.from_template_and_values(template(pool), values or {}, client=client))  # type: ignore[arg-type]
    made.prepare_for_flow_run(FlowRun(id=uuid4(), name="quick-otter", flow_id=uuid4()))
    return made


@pytest.mark.parametrize("pool", POOLS)
def test_templates_are_prefects_with_other_defaults(pool: str) -> None:
    """So that a newer Prefect's variables are not missed: descriptions and defaults are ours, the rest is as it comes."""
    ours, theirs = template(pool), WORKERS[pool].get_default_base_job_template()
    assert ours.keys() == theirs.keys()
    properties = theirs["variables"]["properties"]
    changed = set()
    for name, described in ours["variables"]["properties"].items():
        known = properties.pop(name)
        for one in (described, known):
            one.pop("description", None)
        if described.pop("default", None) != known.pop("default", None):
            changed.add(name)
        assert described == known, name
    assert properties == {}
    assert "env" in changed
    if pool != "kubernetes":
        assert ours["job_configuration"] == theirs["job_configuration"]


def test_a_process_takes_the_environment_of_its_worker() -> None:
    made = configured("process")
    assert made.env["DO_NOT_TRACK"] == "1"
    assert made.command == "python -m prefect.flow_engine" or "prefect" in made.command
    assert not any(name.startswith(("CHANNEL_MERGING", "AWS_", "HF_")) for name in template("process")["variables"])


def test_a_container_gets_its_secrets_from_blocks() -> None:
    blocks = Blocks()
    made = configured("docker", blocks=blocks)
    named = {"AWS_ACCESS_KEY_ID": "access-key", "AWS_SECRET_ACCESS_KEY": "secret-key", "HF_TOKEN": "hf-token"}
    for variable, block in named.items():
        assert made.env[variable] == f"the channel-merging-{block}"
    assert sorted(blocks.asked) == sorted(("secret", f"channel-merging-{block}") for block in named.values())
    assert made.image == f"channel-merging:{version()}"


def test_a_container_lives_in_the_stack() -> None:
    made = configured("docker")
    assert made.networks == [compose()["networks"]["default"]["name"]]
    volume, target = made.volumes[0].split(":")
    assert volume == f"{compose()['name']}_worker-scratch"
    assert target == "/scratch"
    kept = {"CHANNEL_MERGING_STORE", "CHANNEL_MERGING_CLUSTER", "AWS_ENDPOINT_URL", "AWS_REGION"}
    assert {name: made.env[name] for name in kept} == {name: service("worker")["environment"][name] for name in kept}
    engine = SimpleNamespace(version=lambda: {"Version": "28.0.0"})
    settings = DockerWorker("channel-merging")._build_container_settings(engine, made)
    assert settings["read_only"] is True
    assert settings["cap_drop"] == ["ALL"]
    assert settings["user"] == f"{UID}:{UID}"
    assert {target, *settings["tmpfs"]} == WRITABLE


@pytest.mark.parametrize(
    "values", [{}, {"image": "other:1", "memory_limit": "32Gi", "env": {"CHANNEL_MERGING_CLUSTER": "none"}}]
)
def test_the_job_of_a_run_is_one_that_kubernetes_takes(values: dict[str, Any]) -> None:
    made = configured("kubernetes", values)
    job = copy.deepcopy(made.job_manifest)
    pod = job["spec"]["template"]["spec"]
    assert (pod.pop("parallelism"), pod.pop("completions")) == (1, 1)  # prefect asks for them here, where nobody reads them
    kubernetes_validate.validate(job, "1.34", strict=True)
    assert job["metadata"]["namespace"] == document("Namespace", "channel-merging")["metadata"]["name"]
    assert job["spec"]["template"]["metadata"]["labels"].keys() >= {"prefect.io/flow-run-id"}  # what policies know runs by
    (container,) = pod["containers"]
    assert container["image"] == values.get("image", f"channel-merging:{version()}")
    assert container["args"][0] in ("prefect", "python")
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert environment.get("CHANNEL_MERGING_CLUSTER") == values.get("env", {}).get("CHANNEL_MERGING_CLUSTER")
    assert environment["DO_NOT_TRACK"] == "1"


def test_the_job_of_a_run_reads_what_the_manifests_make() -> None:
    pod = configured("kubernetes").job_manifest["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert document("ServiceAccount", pod["serviceAccountName"])
    config, secret = (entry for source in container["envFrom"] for entry in source.values())
    assert document("ConfigMap", config["name"])
    worker = document("Deployment", "prefect-worker")["spec"]["template"]["spec"]["containers"][0]
    assert container["envFrom"] == worker["envFrom"]
    assert f"name: {secret['name']}" in (INFRA / "kubernetes" / "secret.example.yaml").read_text()


@pytest.fixture
def prefect(tmp_path: Path) -> Path:
    """A folder with a prefect that notes how it was called, and keeps the template; the limits are not there yet."""
    stub = tmp_path / "prefect"
    stub.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\ncase "$1 $2" in\n'
        f'"work-pool create") cat "$7" > {tmp_path}/template.json;;\n'
        '"work-pool inspect") echo "{\\"type\\": \\"$FOUND\\"}";;\n'
        "*inspect) exit 1;;\nesac\n"
    )
    stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
    return tmp_path


def register(folder: Path, kind: str, image: str = "", found: str = "") -> subprocess.CompletedProcess[str]:
    known = {"CHANNEL_MERGING_WORK_POOL": kind, "CHANNEL_MERGING_IMAGE": image, "FOUND": found or kind}
    environment = {
        **os.environ,
        **known,
        "PATH": os.pathsep.join([str(folder), str(Path(program("python")).parent), os.environ["PATH"]]),
        "TMPDIR": str(folder),
    }
    script = str(INFRA / "register.sh")
    return subprocess.run([script], env=environment, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("pool", POOLS)
def test_registering_makes_pool_limits_and_deployments(prefect: Path, pool: str) -> None:
    done = register(prefect, pool, image="registry/merging:7")
    assert done.returncode == 0, done.stderr
    calls = (prefect / "calls").read_text().splitlines()
    assert calls[0].startswith(f"work-pool create channel-merging --type {pool} --base-job-template ")
    wanted = {"gcl create merge-cluster --limit 1", "gcl create download --limit 4", "--no-prompt deploy --all"}
    assert wanted <= set(calls)
    assert calls[-1] == "--no-prompt deploy --all"
    given, ours = (prefect / "template.json").read_text(), template(pool)
    if pool != "process":
        ours["variables"]["properties"]["image"]["default"] = "registry/merging:7"
    assert re.sub(r"\s", "", given) == re.sub(r"\s", "", json.dumps(ours))
    assert [path.name for path in prefect.iterdir() if path.name.startswith("tmp")] == []


def test_a_pool_of_another_type_is_refused(prefect: Path) -> None:
    done = register(prefect, "kubernetes", found="process")
    assert done.returncode == 1
    assert "expected type kubernetes, found process. Delete it" in done.stderr
    assert "deploy" not in (prefect / "calls").read_text()
