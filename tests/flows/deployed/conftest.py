"""One Prefect server, one worker and one set of deployments for all tests of this folder."""

from __future__ import annotations

import json
import threading
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

from flows.deployed import tasks
from tests.flows.deployed import interrupt
from tests.support.faulty import Faults, Work
from tests.support.prefect_server import POOL, ROOT, Prefect, prefect_in

LINKS = "https://files.example"
"""Stands before the store in links; runs are told by a secret."""
BLOCKS = """
import sys
from prefect.blocks.system import Secret
from prefect.blocks.webhook import Webhook
Secret(value=sys.argv[1]).save("links")
Webhook(url=sys.argv[2]).save("channel-merging")
"""


class Receiver(ThreadingHTTPServer):
    """What a team's chat would be: keeps what is posted to it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Post)
        self.posted: list[dict[str, Any]] = []


class _Post(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        self.server.posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def receiving() -> Iterator[Receiver]:
    with Receiver() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="package")
def chat() -> Iterator[Receiver]:
    with receiving() as found:
        yield found


def _prepare(prefect: Prefect, chat: Receiver) -> None:
    """Blocks, a pool whose runs get a variable from one of them, and the automations."""
    prefect.command("python", "-c", BLOCKS, LINKS, f"http://127.0.0.1:{chat.server_port}/")
    template = json.loads((ROOT / "infra" / "work-pools" / "process.json").read_text())
    template["variables"]["properties"]["env"]["default"]["CHANNEL_MERGING_LINKS"] = "{{ prefect.blocks.secret.links }}"
    (prefect.folder / "pool.json").write_text(json.dumps(template))
    prefect.command("prefect", "work-pool", "update", POOL, "--base-job-template", prefect.folder / "pool.json")
    create = ROOT / "infra" / "automations" / "create.py"
    short = _with_short_texts(prefect.folder, create.parent / "evaluate-new-version.yaml")
    prefect.command("python", create, create.parent / "notify-on-failure.yaml", short)


def _with_short_texts(folder: Path, path: Path) -> Path:
    """The automation of a file, with texts that are measured in seconds."""
    document = yaml.safe_load(path.read_text())
    document["actions"][0]["parameters"]["texts"] = str(folder / "texts")
    (folder / "texts").mkdir()
    for text in (ROOT / "examples" / "tiny-mistral" / "texts").iterdir():
        (folder / "texts" / text.name).write_text(text.read_text("utf-8")[:1000], "utf-8")
    found = folder / path.name
    found.write_text(yaml.safe_dump(document))
    return found


@pytest.fixture(scope="package")
def prefect(tmp_path_factory: pytest.TempPathFactory, chat: Receiver) -> Iterator[Prefect]:
    """A server and a worker whose runs compute in their own process, unless they say otherwise."""
    folder = tmp_path_factory.mktemp("prefect")
    with prefect_in(folder, lambda found: _prepare(found, chat), CHANNEL_MERGING_CLUSTER="none") as found:
        yield found


@pytest.fixture(scope="package")
def first(prefect: Prefect) -> str:
    """The first run of ``merge/tiny``, which has ended well."""
    run = prefect.run("merge/tiny", groups=3, cluster="local")
    prefect.wait(run)
    return run


@dataclass(frozen=True)
class Interrupted:
    """A recipe that was run three times: cancelled, killed, and then left to itself."""

    faults: Faults
    name: str
    asked: Mapping[str, Any]
    """Parameters of the runs."""
    cancelled: str
    killed: str
    last: str
    finished: frozenset[Work]
    """What the first two had done."""


@pytest.fixture(scope="package")
def interrupted(prefect: Prefect) -> Iterator[Interrupted]:
    """The third run is under way: it has the cluster when the lease of the killed one is over, which takes a minute."""
    faults = Faults(prefect.folder / "faults")
    settings: dict[str, Any] = {"name": "interrupted", "router.kind": "none", "router.queries": {}, "cluster.workers": 1}
    asked: dict[str, Any] = {"groups": 3, "seed": 7, "cluster": "local", "settings": settings}
    try:
        cancelled, done = interrupt.cancelled(prefect, faults, asked)
        killed, more = interrupt.killed(prefect, faults, asked, done)
        faults.script()
        last = prefect.run("merge/tiny", faults.environment({}), **asked)
        yield Interrupted(faults, settings["name"], asked, cancelled, killed, last, frozenset(done | more))
    finally:
        faults.end()


@pytest.fixture
def here(prefect: Prefect, monkeypatch: pytest.MonkeyPatch) -> Iterator[Prefect]:
    """The same server, for flows that run in the process of the tests."""
    monkeypatch.setattr(tasks, "CLUSTER_LIMIT", "of-the-tests-process")  # other runs may hold the cluster
    monkeypatch.setattr(tasks, "DOWNLOAD", "fetch")  # and one download at a time takes its time
    with temporary_settings({PREFECT_API_URL: prefect.api, PREFECT_HOME: prefect.folder / "home"}):
        yield prefect
        for service in (APILogWorker, EventsWorker):  # while there is a server to tell
            service.drain_all(timeout=30)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show what server and worker said when a test failed."""
    report = yield
    found = getattr(item, "funcargs", {}).get("prefect")
    if report.failed and isinstance(found, Prefect):
        report.sections += [(f"Prefect's {name}", found.tail(name)) for name in found.processes]
    return report
