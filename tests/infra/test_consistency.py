"""Names that several files and the code share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from flows.deployed import places
from pipeline.recipe import load_recipe
from tests.infra.files import (
    INFRA,
    POOLS,
    ROOT,
    compose,
    deployments,
    document,
    image_settings,
    pods,
    service,
    template,
    version,
)

POOL = "channel-merging"


def environments() -> dict[str, set[str]]:
    """Names of variables that something in infra/ sets, by where."""
    found = {f"compose: {name}": set(one.get("environment", {})) for name, one in compose()["services"].items()}
    found["kubernetes"] = set(document("ConfigMap", "environment")["data"])
    found |= {f"work pool {pool}": set(template(pool)["variables"]["properties"]["env"]["default"]) for pool in POOLS}
    return found | {"image": set(image_settings())}


def code() -> str:
    """The project's own Python code."""
    folders = ("flows", "pipeline", "router_training", "serving", "storage")
    return "".join(path.read_text("utf-8") for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))


def test_every_variable_of_ours_is_read_by_the_code_or_the_registration() -> None:
    own = {name for names in environments().values() for name in names if name.startswith("CHANNEL_MERGING_")}
    assert {places.STORE, places.CLUSTER, places.LINKS} <= own
    read = code() + (INFRA / "register.sh").read_text()
    assert [name for name in sorted(own) if name not in read] == []


def test_runs_know_store_and_cluster_whatever_starts_them() -> None:
    """A process by its worker, a container by its pool's template, a job by the ConfigMap and the Secret."""
    found = environments()
    needed = {places.STORE, places.CLUSTER, "AWS_REGION"}
    assert needed | {places.LINKS, "AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "HF_TOKEN"} <= found["compose: worker"]
    assert needed | {"AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "HF_TOKEN"} <= found["work pool docker"]
    assert needed | {places.LINKS, "PREFECT_API_URL"} <= found["kubernetes"]
    secret = (INFRA / "kubernetes" / "secret.example.yaml").read_text()
    assert all(f"  {name}:" in secret for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN"))


def test_dask_workers_reach_the_same_store_as_runs() -> None:
    names = {"AWS_ENDPOINT_URL", "AWS_REGION", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN"}
    run, worker = service("worker")["environment"], service("dask-worker")["environment"]
    assert {name: worker[name] for name in names} == {name: run[name] for name in names}
    (container,) = pods()["DaskCluster/merge/worker"]["containers"]
    assert container["envFrom"] == pods()["Deployment/prefect-worker"]["containers"][0]["envFrom"]


@pytest.mark.parametrize("recipe", places.known_recipes())
def test_store_and_cluster_make_a_sound_recipe(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = document("ConfigMap", "environment")["data"]
    for environment in (service("worker")["environment"], data):
        monkeypatch.setenv(places.STORE, environment[places.STORE])
        monkeypatch.setenv(places.CLUSTER, environment[places.CLUSTER])
        monkeypatch.setenv(places.LINKS, environment[places.LINKS])
        read = places.read(recipe, {})
        assert read.deltas == f"{environment[places.STORE]}/deltas"
        assert read.output.startswith(f"{environment[places.STORE]}/artifacts/")
        assert read.cluster.where == environment[places.CLUSTER]
        assert places.link(read.output, "report").endswith(f"`{read.output}`")  # no links without an address for browsers


def test_one_work_pool() -> None:
    assert {one["work_pool"]["name"] for one in deployments()} == {POOL}
    for words in (service("worker")["command"], pods()["Deployment/prefect-worker"]["containers"][0]["args"]):
        assert words[:3] == ["prefect", "worker", "start"]
        assert words[words.index("--pool") + 1] == POOL
    kinds = [service("worker")["command"], pods()["Deployment/prefect-worker"]["containers"][0]["args"]]
    assert [words[words.index("--type") + 1] for words in kinds] == ["process", "kubernetes"]
    assert f"prefect work-pool create {POOL} " in (INFRA / "register.sh").read_text()
    assert service("register")["environment"]["CHANNEL_MERGING_WORK_POOL"] == "process"
    (container,) = pods()["Job/register"]["containers"]
    assert {"name": "CHANNEL_MERGING_WORK_POOL", "value": "kubernetes"} in container["env"]
    assert container["args"] == service("register")["command"]


def test_limits_are_those_that_the_flows_ask_for() -> None:
    script = (INFRA / "register.sh").read_text()
    assert re.findall(r"\|\| prefect gcl create ([\w-]+)", script) == ["merge-cluster", "download"]
    for name in ("merge-cluster", "download"):
        assert f'"{name}"' in code()


def test_the_scheduler_is_where_runs_look_for_it() -> None:
    command = service("scheduler")["command"]
    assert service("worker")["environment"][places.CLUSTER] == f"tcp://scheduler:{command[command.index('--port') + 1]}"
    cluster = document("DaskCluster", "merge")
    port = {one["name"]: one["port"] for one in cluster["spec"]["scheduler"]["service"]["ports"]}["tcp-comm"]
    address = f"tcp://{cluster['metadata']['name']}-scheduler:{port}"  # the operator's name for the service
    assert document("ConfigMap", "environment")["data"][places.CLUSTER] == address
    assert document("DaskAutoscaler", "merge")["spec"]["cluster"] == cluster["metadata"]["name"]


def test_the_store_is_where_all_look_for_it() -> None:
    command = service("store")["command"]
    (port,) = (word.partition("=")[2] for word in command if word.startswith("-s3.port="))
    endpoint = service("worker")["environment"]["AWS_ENDPOINT_URL"]
    assert endpoint == f"http://store:{port}"
    assert f":{port}/" in service("store")["healthcheck"]["test"][1]
    bucket = service("worker")["environment"][places.STORE].removeprefix("s3://")
    assert f"-name {bucket} " in service("bucket")["entrypoint"][2]
    assert f"grep -qw {bucket}\n" in service("bucket")["entrypoint"][2].replace(" ||", "\n||")


def test_keys_of_the_store_are_one_pair() -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        values = {one["environment"][name] for one in compose()["services"].values() if name in one.get("environment", {})}
        assert len(values) == 1


def test_prefect_is_asked_with_the_password_it_expects() -> None:
    server = service("prefect-server")["environment"]
    for name in ("register", "worker"):
        assert service(name)["environment"]["PREFECT_API_AUTH_STRING"] == server["PREFECT_SERVER_API_AUTH_STRING"]
        assert service(name)["environment"]["PREFECT_API_URL"] == "http://prefect-server:4200/api"
    assert (
        f":{service('database')['environment']['POSTGRES_PASSWORD']}@database:5432/prefect"
        in server["PREFECT_SERVER_DATABASE_CONNECTION_URL"]
    )


def test_all_roles_have_one_image() -> None:
    images = {container["image"] for pod in pods().values() for container in pod["containers"]}
    images |= {one["image"] for one in compose()["services"].values() if "build" in one}
    images |= {document("ConfigMap", "environment")["data"]["CHANNEL_MERGING_IMAGE"]}
    images |= {template(pool)["variables"]["properties"]["image"]["default"] for pool in ("docker", "kubernetes")}
    assert images == {f"channel-merging:{version()}"}


def tables(text: str) -> Any:
    return re.findall(r"`(infra/[\w./-]+|tests/infra/[\w.]+)`", text)


def test_files_and_commands_of_the_runbook_exist(tmp_path: Path) -> None:
    from flows.cli import app

    text = (INFRA / "RUNBOOK.md").read_text("utf-8")
    assert len(named := tables(text)) > 8
    assert [name for name in named if not (ROOT / name).exists() and name != "infra/.env"] == []
    verbs = {found.callback.__name__.rstrip("_") for found in app.registered_commands if found.callback}
    assert set(re.findall(r"channel-merge (\w+) ", text)) <= verbs
    services = set(re.findall(r"docker compose (?:exec|logs|restart|run)(?: --?[\w-]+)* ([\w-]+)", text))
    assert services <= set(compose()["services"])
    mentioned = set(re.findall(r"deployment run (\w[\w-]*/[\w-]+)", text))
    assert mentioned
    assert {name.split("/")[1] for name in mentioned} <= {one["name"] for one in deployments()}
    recipe = re.search(r"```yaml\n(name: .*?)```", text, flags=re.DOTALL)
    if recipe:
        (tmp_path / "recipe.yaml").write_text(recipe[1])
        load_recipe(tmp_path / "recipe.yaml")
