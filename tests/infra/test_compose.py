"""The stack on one host: what docker-compose makes of it, what is open, what waits for what, and that no password is in it."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

import pytest

from tests.infra.files import FILLED, INFRA, STACKS, WRITABLE, compose, composed, example, image_settings, service

ONCE = {"bucket", "register"}
"""Services that do their work and end."""
OWN = {"prefect-server", "register", "scheduler", "dask-worker", "worker"}
"""Services of this project's image."""


def test_nothing_runs_without_passwords_and_each_is_named() -> None:
    assert composed("cpu", FILLED, "--quiet").returncode == 0
    for name in FILLED:
        done = composed("cpu", {key: value for key, value in FILLED.items() if key != name}, "--quiet")
        assert done.returncode != 0
        assert f"required variable {name} is missing a value" in done.stderr
        assert example()[name] == "", "the example holds a value that someone would keep"


def test_every_setting_is_in_the_example_and_the_other_way_round() -> None:
    text = "".join((INFRA / name).read_text("utf-8") for name in ("compose.yaml", "compose.gpu.yaml"))
    assert set(re.findall(r"\$\{([A-Z0-9_]+)", text)) == set(example())
    defaults = dict(re.findall(r"\$\{([A-Z0-9_]+):-([^}]+)\}", text))
    shown = {name: value.split("@sha256:")[0] for name, value in example().items()}
    assert {name: shown[name] for name in defaults} == defaults


def test_only_loopback_is_opened() -> None:
    opened = [port for one in compose()["services"].values() for port in one.get("ports", [])]
    assert {port["host_ip"] for port in opened} == {"127.0.0.1"}
    assert sorted(int(port["published"]) for port in opened) == [4200, 8333, 8787]
    assert compose()["networks"]["database"]["internal"] is True
    assert list(service("database")["networks"]) == ["database"]


@pytest.mark.parametrize("kind", STACKS)
def test_everything_that_stays_is_watched_and_waited_for(kind: str) -> None:
    services = compose(kind)["services"]
    assert {name for name, one in services.items() if "healthcheck" not in one} == ONCE
    for name, one in services.items():
        for other, condition in one.get("depends_on", {}).items():
            wanted = "service_completed_successfully" if other in ONCE else "service_healthy"
            assert condition["condition"] == wanted, (name, other)
        assert one["restart"] == ("on-failure:5" if name in ONCE else "unless-stopped")


def test_hosts_that_are_named_are_services_that_are_waited_for() -> None:
    """By the environment or the command line; directly or through another service."""
    services = compose()["services"]

    def before(name: str) -> set[str]:
        direct = set(services[name].get("depends_on", {}))
        return direct.union(*(before(other) for other in direct)) if direct else set()

    seen = set()
    for name, one in services.items():
        words = [*map(str, one.get("environment", {}).values()), *(one.get("command") or [])]
        hosts = {host for word in words if re.match(r"[a-z0-9+]+://", word) and (host := urlsplit(word).hostname)}
        named = hosts - {"127.0.0.1", "models"}
        assert named <= before(name), name
        seen |= named
    assert seen == {"database", "prefect-server", "scheduler", "store"}


@pytest.mark.parametrize("kind", STACKS)
def test_own_containers_write_to_their_volumes_alone(kind: str) -> None:
    for name in OWN:
        one = service(name, kind)
        assert one["read_only"] is True
        assert one["cap_drop"] == ["ALL"]
        assert one["security_opt"] == ["no-new-privileges:true"]
        assert one["init"] is True
        assert "user" not in one, "the image's own"
        volumes = {volume["target"] for volume in one.get("volumes", [])}
        assert volumes | set(one["tmpfs"]) == WRITABLE
    assert image_settings()["HOME"] in WRITABLE


def test_what_must_outlive_a_container_has_a_volume() -> None:
    kept = {name: {volume["target"] for volume in service(name)["volumes"]} for name in ("database", "store")}
    assert kept == {"database": {"/var/lib/postgresql/data"}, "store": {"/data"}}
    assert set(compose()["volumes"]) == {"database", "store", "dask-scratch", "worker-scratch"}


def test_images_are_pinned() -> None:
    for name, one in compose()["services"].items():
        assert re.search(r":\d+[\w.-]*$", one["image"]), name
        assert (one.get("build") is not None) == (name in OWN)


def test_memory_limits_leave_dask_its_room() -> None:
    command = service("dask-worker")["command"]
    limit = command[command.index("--memory-limit") + 1]
    allowed = int(service("dask-worker")["deploy"]["resources"]["limits"]["memory"])
    assert limit.endswith("GiB")
    assert int(limit[:-3]) * 2**30 < allowed


def test_workers_with_gpus_are_those_of_the_readme() -> None:
    one = service("dask-worker", "gpu")
    (device,) = one["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert device["device_ids"] == ["0"], "a process computes on the first GPU it sees"
    assert one["build"]["args"]["TORCH"] == "cuda"
    assert "--nthreads 1 --resources GPU=1" in " ".join(one["command"])
    assert one["environment"] == service("dask-worker")["environment"]
