"""A Prefect server and a process worker on loopback, set up by the command lines that an operator types."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[2]
POOL = "channel-merging"
PATIENCE_S = 120.0
"""After which what should happen is taken not to."""
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
QUICK = {
    "PREFECT_WORKER_QUERY_SECONDS": "0.5",
    "PREFECT_SERVER_SERVICES_REPOSSESSOR_LOOP_SECONDS": "1",
    "PREFECT_DEPLOYMENT_CONCURRENCY_SLOT_WAIT_SECONDS": "1",
}
"""Polls that are seconds apart by default; nothing else differs from a server and a worker as they come."""

Document = dict[str, Any]


def programs() -> Path:
    """Where the programs of this environment lie."""
    return Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@dataclass
class Prefect:
    """A server, what it knows, and its worker, as tests see them."""

    folder: Path
    port: int = field(default_factory=free_port)
    variables: dict[str, str] = field(default_factory=dict)
    """Of the worker and of its runs."""
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def api(self) -> str:
        return f"http://127.0.0.1:{self.port}/api"

    @property
    def store(self) -> Path:
        """CHANNEL_MERGING_STORE of the worker."""
        return self.folder / "store"

    def environment(self) -> dict[str, str]:
        """Of all processes: nothing of the user's own Prefect is read or written."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        own = {
            "PREFECT_HOME": str(self.folder / "home"),
            "PREFECT_API_URL": self.api,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{self.folder}/home/prefect.db",
            "CHANNEL_MERGING_STORE": str(self.store),
            "XDG_CACHE_HOME": str(self.folder / "cache"),
            "PATH": f"{programs()}{os.pathsep}{os.environ['PATH']}",
        }
        return kept | QUICK | own | self.variables

    # the command line

    def start(self, name: str, *line: str) -> None:
        """Begin a process that stays, in a group of its own; ``<name>.log`` has what it prints."""
        folder = self.folder / name
        folder.mkdir()
        with (self.folder / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                line, stdout=log, stderr=log, cwd=folder, env=self.environment(), start_new_session=True
            )

    def command(self, *line: str | Path, cwd: Path = ROOT) -> str:
        """What a command prints that succeeds."""
        words, environment = [str(word) for word in line], self.environment()
        done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=cwd, env=environment, timeout=120)
        assert done.returncode == 0, f"{line}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def run(self, deployment: str, variables: Mapping[str, str] | None = None, **parameters: Any) -> str:
        """Ask for a run by ``prefect deployment run``; its id. ``variables``: of the environment of this run alone."""
        options = [word for name, value in parameters.items() for word in ("--param", f"{name}={json.dumps(value)}")]
        if variables is not None:
            options += ["--job-variable", f"env={json.dumps(dict(variables))}"]
        said = self.command("prefect", "deployment", "run", deployment, *options)
        found = re.search(r"/flow-run/([0-9a-f-]{36})", said.replace("\n", ""))
        assert found, said
        return found[1]

    def tail(self, name: str, lines: int = 60) -> str:
        return "\n".join((self.folder / f"{name}.log").read_text(errors="replace").splitlines()[-lines:])

    # the API

    def ask(self, path: str, **body: Any) -> Any:
        """What a POST answers."""
        response = httpx.post(f"{self.api}{path}", json=body, timeout=30)
        assert response.is_success, (path, response.text)
        return response.json()

    def flow_run(self, run: str) -> Document:
        response = httpx.get(f"{self.api}/flow_runs/{run}", timeout=30)
        assert response.is_success, response.text
        found: Document = response.json()
        return found

    def wait(self, run: str, state: str = "Completed") -> Document:
        """The flow run when it has ended, which must be in this state."""
        until(lambda: self.flow_run(run)["state_type"] in ENDED, lambda: f"{state}\n{self.told(run)}")
        found = self.flow_run(run)
        assert found["state_name"] == state, f"{found['state']}\n{self.told(run)}"
        return found

    def task_runs(self, run: str) -> dict[str, Document]:
        """Name -> task run."""
        found: list[Document] = self.ask("/task_runs/filter", flow_runs={"id": {"any_": [run]}})
        names = [one["name"] for one in found]
        assert len(names) == len(set(names)), names
        return {one["name"]: one for one in found}

    def artifacts(self, run: str) -> dict[str, Document]:
        """Key -> artifact."""
        return {one["key"]: one for one in self.ask("/artifacts/filter", artifacts={"flow_run_id": {"any_": [run]}})}

    def logs(self, run: str, task: str | None = None) -> list[str]:
        """Messages of a flow run and its task runs, or of one task run."""
        chosen = {"flow_run_id": {"any_": [run]}} | ({"task_run_id": {"any_": [task]}} if task else {})
        return [line["message"] for line in self.ask("/logs/filter", logs=chosen, sort="TIMESTAMP_ASC")]

    def logged(self, run: str, line: str) -> None:
        """Wait until the log has a line that begins so: a run's last ones arrive after its last state."""
        until(lambda: any(one.startswith(line) for one in self.logs(run)), lambda: f"{line!r}\n{self.told(run)}")

    def runs_of(self, deployment: str) -> list[Document]:
        """The latest first."""
        flow, _, name = deployment.partition("/")
        chosen = {"flows": {"name": {"any_": [flow]}}, "deployments": {"name": {"any_": [name]}}}
        found: list[Document] = self.ask("/flow_runs/filter", sort="EXPECTED_START_TIME_DESC", **chosen)
        return found

    def told(self, run: str) -> str:
        """All that is known of a run, for people."""
        found = self.flow_run(run)
        return "\n".join([f"{found['name']}: {found['state']}", *self.logs(run), "", "worker:", self.tail("worker")])


def until(condition: Any, what: Any) -> None:
    """Wait until something is so. This finds hangs; nothing is measured."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < PATIENCE_S, f"waited in vain: {what()}"
        time.sleep(0.1)


def _is_up(prefect: Prefect) -> bool:
    code = prefect.processes["server"].poll()
    assert code is None, f"the server ended with {code}\n{prefect.tail('server')}"
    with suppress(httpx.HTTPError):
        return httpx.get(f"{prefect.api}/health", timeout=5).is_success
    return False


def _has_worker(prefect: Prefect) -> bool:
    code = prefect.processes["worker"].poll()
    assert code is None, f"the worker ended with {code}\n{prefect.tail('worker')}"
    return any(one["status"] == "ONLINE" for one in prefect.ask(f"/work_pools/{POOL}/workers/filter"))


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Politely, then not; nothing of its group is left."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(20)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def prefect_in(folder: Path, prepare: Callable[[Prefect], None], **variables: str) -> Iterator[Prefect]:
    """A server that knows pool, limits and deployments by ``infra/register.sh``, and a worker of the pool.

    One expert at a time is fetched: the least that the limit of downloads can be. ``prepare``: called before the worker
    starts. ``variables``: of the environment of the worker and its runs.
    """
    found = Prefect(folder, variables=variables)
    (folder / "home").mkdir(parents=True)
    try:
        found.start("server", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(found.port), "--no-ui")
        until(lambda: _is_up(found), lambda: f"the server\n{found.tail('server')}")
        found.command("prefect", "gcl", "create", "download", "--limit", "1")
        found.command("sh", ROOT / "infra" / "register.sh", cwd=folder)
        prepare(found)
        found.start("worker", "prefect", "worker", "start", "--pool", POOL, "--type", "process")
        until(lambda: _has_worker(found), lambda: f"the worker\n{found.tail('worker')}")
        yield found
    finally:
        for process in reversed(found.processes.values()):
            _stop(process)
