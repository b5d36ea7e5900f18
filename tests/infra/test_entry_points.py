"""The commands of the images, read from the files that start them and run as plain processes on loopback."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import prefect.cli
import pytest
from distributed import Client
from prefect.cli._app import _app

from tests.infra.files import INFRA, ROOT, dockerfile, document, image_settings, pods, program, service
from tests.support.dask_processes import end

PATIENCE_S = 60.0
"""How long a process may take to answer: the machine may be busy."""


def free_port() -> int:
    """A port of loopback, with the one 10000 above it, where weed listens for its own kind."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            if port < 50_000:
                try:
                    second.bind(("127.0.0.1", port + 10_000))
                except OSError:
                    continue
                return port


def answers(url: str) -> int:
    """The status of an answer, once there is one."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def here(words: list[str], changes: dict[str, str]) -> list[str]:
    """A command line with addresses, ports and folders of containers replaced by those of this machine.

    Every change must apply: what is run here is what the files say.
    """
    line = "\n".join(words)
    for old, new in changes.items():
        assert old in line, f"{words} has no {old}"
        line = line.replace(old, new)
    first, *rest = line.split("\n")
    return [first if first.startswith("/") else program(first), *rest]


@contextmanager
def running(words: list[str], environment: dict[str, str], folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process in a group of its own, with nothing of this one's environment but where programs and the project are."""
    path = os.pathsep.join([str(Path(program("python")).parent), os.environ["PATH"]])
    base = {"PATH": path, "PYTHONPATH": str(ROOT), "HOME": str(folder), "TMPDIR": str(folder)}
    with (folder / f"{Path(words[0]).name}-{words[1].strip('-/')[:9]}.log").open("w") as log:
        process = subprocess.Popen(
            words, env={**base, **environment}, cwd=folder, stdout=log, stderr=log, text=True, start_new_session=True
        )
        try:
            yield process
        finally:
            end(process)


def probed(name: str, changes: dict[str, str]) -> int:
    """The exit status of a service's health check, as soon as it is good."""
    _, python, *words = service(name)["healthcheck"]["test"]
    deadline = time.monotonic() + PATIENCE_S
    while (status := subprocess.run(here([python, *words], changes), capture_output=True, check=False).returncode) != 0:
        if time.monotonic() > deadline:
            break
        time.sleep(0.2)
    return status


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Store, bucket, scheduler and worker by the commands of compose.yaml; yields the their environment."""
    folder = tmp_path_factory.mktemp("stack")
    s3, master, comm, board, worker_board = (free_port() for _ in range(5))
    ports = {f"-{server}.port": str(free_port()) for server in ("volume", "filer")} | {"-master.port": str(master)}
    changes = {"/data": str(folder), "0.0.0.0": "127.0.0.1", "-s3.port=8333": f"-s3.port={s3}"}
    keys = service("store")["environment"]
    known = {name: str(value) for name, value in service("worker")["environment"].items() if not name.startswith("PREFECT")}
    known |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3}", "CHANNEL_MERGING_CLUSTER": f"tcp://127.0.0.1:{comm}"}
    shared = {"NUMBA_CACHE_DIR": os.environ["NUMBA_CACHE_DIR"], "HF_HUB_OFFLINE": "1"}
    scratch = folder / "scratch"
    with ExitStack() as processes:
        more = [f"{option}={port}" for option, port in ports.items()]
        weed = here(["weed", *service("store")["command"], *more], changes)
        processes.enter_context(running(weed, keys, folder))
        dask = here(service("scheduler")["command"], {"8786": str(comm), ":8787": f"127.0.0.1:{board}"})
        processes.enter_context(running([*dask, "--host", "127.0.0.1"], {}, folder))
        line = {"scheduler:8786": f"127.0.0.1:{comm}", "/scratch": str(scratch), ":8788": f"127.0.0.1:{worker_board}"}
        worker = here(service("dask-worker")["command"], line)
        processes.enter_context(running([*worker, "--host", "127.0.0.1"], known | shared, folder))
        assert (
            answers(re.sub(r".*(http://\S+).*", r"\1", service("store")["healthcheck"]["test"][1]).replace("8333", str(s3)))
            == 200
        )
        for _ in range(2):  # a bucket that is there stays
            (shell, *words), shared_master = service("bucket")["entrypoint"], f"127.0.0.1:{master}"
            made = here([shell, *words], {"127.0.0.1:9333": shared_master, "weed ": f"{program('weed')} "})
            done = subprocess.run(made, cwd=folder, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
        assert probed("scheduler", {"8787": str(board)}) == 0
        assert probed("dask-worker", {"8788": str(worker_board)}) == 0
        yield known | shared


def test_a_client_computes_on_the_stacks_workers(stack: dict[str, str]) -> None:
    with Client(stack["CHANNEL_MERGING_CLUSTER"], timeout=PATIENCE_S) as client:
        client.wait_for_workers(1, timeout=PATIENCE_S)
        assert client.submit(sum, [20, 22]).result(timeout=PATIENCE_S) == 42
        (worker,) = client.scheduler_info()["workers"].values()
    command = service("dask-worker")["command"]
    assert worker["nthreads"] == int(command[command.index("--nthreads") + 1])
    assert worker["memory_limit"] == 5 * 2**30


def test_the_stack_merges_into_its_bucket(stack: dict[str, str], tmp_path: Path) -> None:
    """With what flow runs are told in their environment; then nothing is left to do, and every byte is right."""
    store = stack["CHANNEL_MERGING_STORE"]
    places = ["--deltas", f"{store}/deltas", "--output", f"{store}/artifacts/tiny"]
    recipe = str(ROOT / "examples" / "tiny-mistral" / "recipe.yaml")
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), **stack}
    for words, said in (
        (["run", recipe, *places, "--cluster", stack["CHANNEL_MERGING_CLUSTER"]], "published version"),
        (["run", recipe, *places, "--cluster", "none"], "nothing changed"),
        (["verify", f"{store}/artifacts/tiny"], "ok: "),
    ):
        line = [program("channel-merge"), *words]
        done = subprocess.run(line, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert said in done.stdout + done.stderr


def test_strangers_do_not_read_the_bucket(stack: dict[str, str]) -> None:
    assert answers(f"{stack['AWS_ENDPOINT_URL']}/models/") == 403


def test_the_pods_of_the_dask_cluster_start(tmp_path: Path) -> None:
    """By the manifests' commands, with what the operator sets; the operator's questions are answered."""
    (scheduler,) = pods()["DaskCluster/merge/scheduler"]["containers"]
    (worker,) = pods("gpu")["DaskCluster/merge/worker"]["containers"]
    comm, board, work, nanny, worker_board = (str(free_port()) for _ in range(5))
    routes = {entry["name"]: entry["value"] for entry in scheduler["env"]}
    told = {"DASK_SCHEDULER_ADDRESS": f"tcp://127.0.0.1:{comm}"}
    own = {"$(DASK_WORKER_NAME)": "merge-default-1", "/scratch": str(tmp_path / "scratch")}
    ports = {"9000": work, "9001": nanny, ":8788": f"127.0.0.1:{worker_board}"}
    first = here(scheduler["args"], {"8786": comm, ":8787": f"127.0.0.1:{board}"})
    second = here(worker["args"], own | ports)
    with (
        running([*first, "--host", "127.0.0.1"], routes, tmp_path),
        running([*second, "--host", "127.0.0.1"], told, tmp_path),
    ):
        for container, port in ((scheduler, board), (worker, worker_board)):
            assert answers(f"http://127.0.0.1:{port}{container['livenessProbe']['httpGet']['path']}") == 200
        with urllib.request.urlopen(f"http://127.0.0.1:{board}/api/v1/adaptive_target", timeout=30) as answer:
            assert json.load(answer)["workers"] >= 0
        with Client(told["DASK_SCHEDULER_ADDRESS"], timeout=PATIENCE_S) as client:
            client.wait_for_workers(1, timeout=PATIENCE_S)
            (found,) = client.scheduler_info()["workers"].values()
            assert (found["name"], found["resources"], found["nthreads"]) == ("merge-default-1", {"GPU": 1.0}, 1)
            assert found["memory_limit"] == 14 * 2**30


def test_without_a_command_the_image_says_what_it_can() -> None:
    (command,) = (json.loads(line.removeprefix("CMD ")) for line in dockerfile() if line.startswith("CMD "))
    done = subprocess.run([program(command[0]), *command[1:]], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "Channel Merging" in done.stdout


def prefect_commands() -> list[list[str]]:
    """All that is asked of Prefect's command line: services, containers, and the registration."""
    found = [one["command"] for one in map(service, ("prefect-server", "worker"))]
    found.append(pods()["Deployment/prefect-worker"]["containers"][0]["args"])
    script = (INFRA / "register.sh").read_text()
    script = re.sub(r"\$\w+|\"\$\w+\"", "x", re.sub(r"#.*|'[^']*'", "", script))
    found += [shlex.split(line) for line in re.findall(r"prefect [a-z-][^|>\n]*", script)]
    return found


def test_prefect_knows_all_commands_and_options() -> None:
    assert prefect.cli.app is not None  # registers the commands
    lines = prefect_commands()
    assert len(lines) == 10
    for line in lines:
        assert line[0] == "prefect"
        words = [word for word in line[1:] if word != "--no-prompt"]
        command, bound, _ = _app.parse_args(words, exit_on_error=False, print_error=False)
        assert bound.arguments or command.__name__ == "ls", words
    with pytest.raises(Exception, match="Unknown option"):
        _app.parse_args(["worker", "start", "--pol", "x"], exit_on_error=False, print_error=False)


def test_settings_of_prefect_are_known_to_it() -> None:
    """A misspelt setting would be ignored without a word."""
    from prefect.settings import Settings
    from prefect.settings.legacy import _get_settings_fields
    from prefect_kubernetes.settings import KubernetesSettings  # type: ignore[import-untyped]

    known = set(_get_settings_fields(Settings)) | {"PREFECT_HOME"}
    own = KubernetesSettings.model_fields
    named: set[str] = set(image_settings()) | set(document("ConfigMap", "environment")["data"])
    for name in ("prefect-server", "register", "worker"):
        named |= set(service(name)["environment"])
    integration = {entry["name"] for entry in pods()["Deployment/prefect-worker"]["containers"][0]["env"]}
    assert {name for name in named if name.startswith("PREFECT_")} <= known
    for name in integration:
        section, _, key = name.removeprefix("PREFECT_INTEGRATIONS_KUBERNETES_").lower().partition("_")
        settings: Any = own[section].annotation
        assert key in settings.model_fields, name
