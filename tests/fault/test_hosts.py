"""Scheduler, workers and client on hosts of their own: what they share is an object store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from storage.artifact import Artifact, latest
from storage.stores import open_store
from tests.fault.runs import FEW_BLOCKS, PATIENCE_S, Undisturbed, has_namespaces
from tests.support.dask_processes import SCHEDULER, end
from tests.support.faulty import START, Faults, begun, kept
from tests.support.store_gateway import Gateway, empty_bucket, moto_server

BUCKET = "outputs"
PLACE = f"s3://{BUCKET}/team"
DASK = str(Path(sys.executable).parent / "dask")
INHERITED = ("PATH", "NUMBA_CACHE_DIR", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "AWS_ENDPOINT_URL")
"""Of the environment: installed programs, and the object store."""
ALONE = ("unshare", "--map-root-user", "--mount", "sh", "-c", 'mount --bind . "$0" && cd "$0" && exec "$@"')


@dataclass(frozen=True)
class Host:
    """A folder with everything that a process keeps on a disk; where ``is_alone``, the process sees it in place of them all."""

    folder: Path
    is_alone: bool

    @property
    def seen(self) -> Path:
        """The folder as the host's own processes name it."""
        return self.folder.parent if self.is_alone else self.folder

    @property
    def faults(self) -> Faults:
        return Faults(self.folder / "faults")

    def environment(self) -> dict[str, str]:
        constants, _ = FEW_BLOCKS
        own = {"HOME": "home", "TMPDIR": "scratch", "XDG_CACHE_HOME": "cache"}
        told = Faults(self.seen / "faults").environment(constants, self.folder.parent)
        places = {name: str(self.seen / folder) for name, folder in own.items()}
        return {name: os.environ[name] for name in INHERITED} | told | places

    @contextmanager
    def running(self, *line: str) -> Iterator[subprocess.Popen[str]]:
        for name in ("home", "scratch", "cache"):
            (self.folder / name).mkdir(parents=True)
        self.faults.script()
        before = (*ALONE, str(self.folder.parent)) if self.is_alone else ()
        with (self.folder / "said").open("w") as said:
            process = subprocess.Popen(
                [*before, *line], stdout=subprocess.PIPE, stderr=said, text=True, cwd=self.folder, env=self.environment(),
                start_new_session=True,
            )  # fmt: skip
        try:
            yield process
        finally:
            end(process)
            Faults(self.seen / "faults").end()


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    with moto_server() as url, empty_bucket(url, BUCKET, monkeypatch) as gateway:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        yield gateway


def uploaded(recipe: Path, bucket: Gateway) -> str:
    """The recipe, of sources in the bucket."""
    for path in recipe.parent.glob("*/*"):
        bucket.put(f"{BUCKET}/sources/{path.parent.name}/{path.name}", path.read_bytes())
    fields = yaml.safe_load(recipe.read_text())
    fields["base"] = f"s3://{BUCKET}/sources/base"
    fields["experts"] = {name: f"s3://{BUCKET}/sources/{name}" for name in fields["experts"]}
    return yaml.safe_dump({**fields, "output": f"{PLACE}/output", "deltas": f"{PLACE}/deltas"})


def merged(hosts: Sequence[Host], recipe: str) -> str:
    """The version that hosts make: scheduler, client, and workers."""
    scheduling, leading, *working = hosts
    with ExitStack() as stack:
        scheduler = stack.enter_context(scheduling.running(sys.executable, "-c", SCHEDULER))
        assert scheduler.stdout is not None
        address = scheduler.stdout.readline().strip()
        for host in working:
            options = ("--host", "127.0.0.1", "--no-dashboard", "--nthreads", "1", "--memory-limit", "0")
            stack.enter_context(host.running(DASK, "worker", address, *options))
        line = [*START, "run", "recipe.yaml", "--json", "--cluster", address, "--set", f"cluster.memory={FEW_BLOCKS[1]}"]
        leading.folder.mkdir(parents=True)
        (leading.folder / "recipe.yaml").write_text(recipe)
        client = stack.enter_context(leading.running(*line))
        out, _ = client.communicate(timeout=PATIENCE_S)
        assert client.returncode == 0, (leading.folder / "said").read_text()
        return str(json.loads(out)["version"])


disks = pytest.mark.skipif(not has_namespaces(), reason="disks of their own need user and mount namespaces; refused here")


@pytest.mark.parametrize("is_alone", [False, pytest.param(True, marks=disks)], ids=["folders", "disks"])
def test_hosts_share_nothing_but_the_store(
    recipe: Path, bucket: Gateway, undisturbed_few: Undisturbed, tmp_path: Path, is_alone: bool
) -> None:
    hosts = [Host(tmp_path / "hosts" / name, is_alone) for name in ("scheduler", "client", "one", "two")]
    assert merged(hosts, uploaded(recipe, bucket)) == undisturbed_few.version
    for host in hosts[1:]:
        touched = host.faults.paths()
        assert [path for path in touched if path != host.seen.parent and not path.is_relative_to(host.seen)] == []
        assert any(path.is_relative_to(host.seen / "scratch") for path in touched) or host is hosts[1]
    _, leading, *working = hosts
    assert leading.faults.events() == []
    assert all(begun(host.faults.events()) for host in working)
    work = {work for host in working for work in kept(host.faults.events())}
    assert work >= undisturbed_few.work
    assert {(stage, source) for stage, source, _, _ in work - undisturbed_few.work} == {("ingest", "base")}
    place = f"{PLACE}/output"
    output = open_store(place)
    assert output.children() == sorted([undisturbed_few.version, ".work", "latest.json"])
    assert latest(output)["version"] == undisturbed_few.version
    assert Artifact(place).verify() == []
