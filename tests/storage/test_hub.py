"""Repositories on a Hub: listings, ranges, copies in the cache, and none without network."""

from __future__ import annotations

import hashlib
import os
import pickle
import pty
import struct
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import close_session, constants, get_session, snapshot_download

import storage.hub
from storage.errors import CheckpointError, SourceError
from storage.files import Folder
from storage.hub import FETCHED_BYTES, HEAD_BYTES, open_hub
from storage.hub_errors import RETRIES
from tests.support.hub_repository import (
    REPO,
    SIZE,
    TOKEN,
    WEIGHTS,
    caught,
    files_under,
    opened,
    ranges,
    read,
    weights,
    write_repo,
)
from tests.support.hub_server import HubServer, hub_environment

# listing


def test_one_request_lists_the_files_of_a_pinned_commit(hub: HubServer, source: Path) -> None:
    folder = opened()
    commit = hub.repos[REPO].revisions["main"]
    assert folder.place == f"{REPO}@{commit}"
    assert folder.id == commit
    assert not folder.is_local
    assert folder.names == {WEIGHTS, "config.json", "tokenizer.json", "empty.txt"}
    assert {name: folder.file(name).size for name in folder.names} == {
        name: (source / name).stat().st_size for name in folder.names
    }
    assert folder.file(WEIGHTS).place == f"{REPO}@{commit}/{WEIGHTS}"
    assert [(request.method, request.path) for request in hub.requests] == [("GET", f"/api/models/{REPO}?blobs=true")]
    assert (folder.stamps([WEIGHTS]), folder.changed({}, {})) == ({}, [])


def test_branches_tags_commits_and_pull_requests_are_revisions(hub: HubServer, tmp_path: Path) -> None:
    folders = {
        name: write_repo(tmp_path / name.replace("/", "-"), seed) for seed, name in enumerate(("v1.0", "a/branch", "refs/pr/1"))
    }
    main = hub.add_repo(REPO, tmp_path / "hub" / REPO, revisions=folders)
    for name, path in folders.items():
        folder = opened(name)
        assert folder.commit == hub.repos[REPO].revisions[name]
        assert read(folder.file(WEIGHTS), 1000, 500_000) == (path / WEIGHTS).read_bytes()[1000:501_000]
        assert opened(folder.commit) == folder
        assert opened(folder.commit[:10]) == folder
    assert opened("main").commit == opened().commit == main


def test_endpoints_that_list_no_sizes_are_asked_once_more(hub: HubServer) -> None:
    whole = opened()
    hub.sizes = False
    hub.forget()
    assert opened() == whole
    assert [request.path.partition("?")[0] for request in hub.requests] == [
        f"/api/models/{REPO}",
        f"/api/models/{REPO}/tree/{whole.commit}",
    ]


def test_names_that_could_lead_elsewhere_are_left_out(hub: HubServer, source: Path) -> None:
    (source / "..\\evil.json").write_text("{}")
    assert "config.json" in opened().names
    assert not [name for name in opened().names if "evil" in name]


def test_a_file_that_is_not_listed_is_named(hub: HubServer) -> None:
    assert "has no file model-00002.safetensors" in caught(CheckpointError, lambda: opened().file("model-00002.safetensors"))


# ranges


@pytest.mark.parametrize(
    ("offset", "count"),
    [
        (0, 8),
        (8, 5000),
        (HEAD_BYTES - 8, 8),
        (HEAD_BYTES - 7, 8),
        (HEAD_BYTES, 1),
        (700_001, 300_000),
        (0, SIZE),
        (SIZE - 10, 10),
        (SIZE - 10, 20),
        (SIZE, 5),
        (SIZE + 100, 5),
        (3, 0),
    ],
)
def test_a_range_is_the_files_bytes(hub: HubServer, source: Path, cache: Path, offset: int, count: int) -> None:
    assert read(weights(), offset, count) == (source / WEIGHTS).read_bytes()[offset : offset + count]
    assert files_under(cache) == []


def test_only_the_asked_bytes_are_sent(hub: HubServer) -> None:
    read(weights(), 700_001, 300_000)
    assert ranges(hub) == ["bytes=700001-1000000"]
    assert sum(request.sent for request in hub.asked("cdn")) == 300_000


def test_prefix_and_header_are_one_request(hub: HubServer, source: Path) -> None:
    file = weights()
    content = (source / WEIGHTS).read_bytes()
    assert read(file, 0, 8) + read(file, 8, 40_000) == content[:40_008]
    assert ranges(hub) == [f"bytes=0-{HEAD_BYTES - 1}"]
    assert read(file, 8, HEAD_BYTES) == content[8 : HEAD_BYTES + 8]
    assert ranges(hub)[1:] == [f"bytes=8-{HEAD_BYTES + 7}"]


def test_files_outside_lfs_come_from_the_hub_itself(hub: HubServer, source: Path) -> None:
    content = (source / "config.json").read_bytes()
    assert read(opened().file("config.json"), 0, 1000) == content
    assert ranges(hub, "hub .* /org/expert/resolve") == [None, f"bytes=0-{len(content) - 1}"]
    assert read(opened().file("empty.txt"), 0, 10) == b""
    assert hub.asked("empty") == hub.asked("cdn") == []


def test_many_threads_share_the_session(hub: HubServer, source: Path) -> None:
    file, content = weights(), (source / WEIGHTS).read_bytes()
    offsets = range(HEAD_BYTES, SIZE, 50_000)
    with ThreadPoolExecutor(8) as pool:
        assert b"".join(pool.map(lambda offset: read(file, offset, 50_000), offsets)) == content[HEAD_BYTES:]


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # a session closed while it connects leaks a socket
def test_reads_survive_that_the_shared_session_is_closed(hub: HubServer, source: Path) -> None:
    """As the client does by itself, for all threads, when one of them cannot connect."""
    file, content = weights(), (source / WEIGHTS).read_bytes()
    with ThreadPoolExecutor(4) as pool:
        reads = [pool.submit(read, file, HEAD_BYTES, SIZE) for _ in range(20)]
        for _ in range(RETRIES):
            close_session()
            read(file, SIZE - 1000, 1000)
    assert all(done.result() == content[HEAD_BYTES:] for done in reads)


def test_a_session_that_was_closed_under_a_read_is_replaced(
    hub: HubServer, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = weights()
    get_session().close()
    monkeypatch.setattr("storage.hub.time", SimpleNamespace(sleep=lambda _: close_session()))
    assert read(file, 200_000, 10) == (source / WEIGHTS).read_bytes()[200_000:200_010]


# the cache


def test_cached_files_are_not_asked_for(hub: HubServer, source: Path) -> None:
    folder = opened()
    snapshot_download(REPO, endpoint=hub.url)
    hub.forget()
    assert read(folder.file(WEIGHTS), 0, SIZE) == (source / WEIGHTS).read_bytes()
    assert {name: path.read_bytes() for name, path in folder.local(folder.names).items()} == {
        name: (source / name).read_bytes() for name in folder.names
    }
    assert hub.requests == []


def test_a_torn_copy_in_the_cache_is_not_read(hub: HubServer, source: Path) -> None:
    file = weights()
    os.truncate(file.download().resolve(), 1000)
    assert read(file, 500, 1000) == (source / WEIGHTS).read_bytes()[500:1500]
    assert "has 1000. Delete it and run again" in caught(CheckpointError, file.download)


def test_local_copies_are_fetched_once(hub: HubServer, source: Path, cache: Path) -> None:
    folder = opened()
    names = ["config.json", "tokenizer.json"]
    found = folder.local(names)
    assert {name: path.read_bytes() for name, path in found.items()} == {name: (source / name).read_bytes() for name in names}
    assert all(path.is_relative_to(cache) and path.name == name for name, path in found.items())
    hub.forget()
    assert folder.local(names) == found
    assert folder.local([]) == {}
    assert hub.requests == []


@pytest.mark.parametrize("fault", [{"status": 503}, {"status": 429}, {"reset": True}, {"cut": 10}, {"cut": 10, "reset": True}])
@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_local_copies_survive_faults(hub: HubServer, source: Path, method: str, fault: dict[str, int]) -> None:
    folder = opened()
    hub.fail(f"{method} .*tokenizer", times=2, **fault)
    assert folder.local(["tokenizer.json"])["tokenizer.json"].read_bytes() == (source / "tokenizer.json").read_bytes()


def test_local_copies_are_given_up(hub: HubServer) -> None:
    folder = opened()
    hub.fail("GET .*tokenizer", times=100, status=503)
    message = caught(SourceError, lambda: folder.local(["config.json", "tokenizer.json"]))
    assert message == f"{folder.place}/tokenizer.json: {hub.url} answered 503 (scripted fault) 6 times. Run again later."


def test_identities_are_sha256_or_git_blobs(hub: HubServer, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = opened()
    hub.forget()
    expected = {name: hashlib.sha256((source / name).read_bytes()).hexdigest() for name in folder.names}
    assert folder.identities([WEIGHTS]) == {WEIGHTS: expected[WEIGHTS]}
    assert hub.requests == []
    monkeypatch.setattr(storage.hub, "FETCHED_BYTES", 500)
    blob = subprocess.run(["git", "hash-object", source / "tokenizer.json"], capture_output=True, text=True, check=True).stdout
    assert folder.identities(folder.names) == expected | {"tokenizer.json": f"git:{blob.strip()}"}
    assert hub.asked("tokenizer") == hub.asked("cdn") == []
    monkeypatch.setattr(storage.hub, "FETCHED_BYTES", FETCHED_BYTES)
    assert folder.identities(folder.names) == expected


# offline


@pytest.mark.parametrize("revision", [None, "main", "commit"])
def test_offline_the_cache_is_the_source(
    hub: HubServer, source: Path, monkeypatch: pytest.MonkeyPatch, revision: str | None
) -> None:
    online = opened()
    snapshot_download(REPO, endpoint=hub.url)
    hub.forget()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder: Folder = open_hub("expert math", REPO, online.commit if revision == "commit" else revision)
    assert (folder.id, folder.place, folder.is_local) == (online.id, online.place, True)
    assert folder.names == online.names
    assert read(folder.file(WEIGHTS), 0, SIZE) == (source / WEIGHTS).read_bytes()
    assert folder.identities(online.names) == {
        name: hashlib.sha256((source / name).read_bytes()).hexdigest() for name in online.names
    }
    assert folder.changed(folder.stamps(online.names), folder.identities(online.names)) == []
    assert pickle.loads(pickle.dumps(folder)) == folder
    assert hub.requests == []


def test_offline_a_part_of_a_repository_may_do(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot_download(REPO, endpoint=hub.url, allow_patterns=["*.json", "*.safetensors"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert {"config.json", WEIGHTS} <= open_hub("expert math", REPO, None).names


def test_offline_without_a_copy(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    file = weights()
    hub.forget()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert caught(CheckpointError, lambda: opened("v1")) == (
        f"expert math: {REPO}@v1: HF_HUB_OFFLINE is set and the cache has no {REPO} at v1. "
        f"Unset it, or before download it: hf download {REPO} --revision v1"
    )
    for action in (lambda: read(file, 0, 8), lambda: read(file, 200_000, 10), file.download):
        assert f"{file.place}: HF_HUB_OFFLINE is set and the cache has no {REPO} at {file.commit}" in caught(
            CheckpointError, action
        )
    assert hub.requests == []


# other processes


def test_a_worker_asks_the_endpoint_that_was_opened(hub: HubServer, source: Path, tmp_path: Path) -> None:
    """A process that has the token but another endpoint, and a terminal on which nothing may appear."""
    hub.repos[REPO].private = True
    script = """
        import pathlib, pickle, sys
        folder = pickle.loads(bytes.fromhex(sys.argv[1]))
        data = bytearray(10)
        assert folder.file("model.safetensors").read_into(memoryview(data), 200_000) == 10
        paths = folder.local(["model.safetensors", "tokenizer.json"])
        pathlib.Path(sys.argv[2]).write_bytes(data + paths["tokenizer.json"].read_bytes())
    """
    environment = hub_environment("http://127.0.0.1:9", tmp_path / "worker") | {"HF_TOKEN": TOKEN}
    os.environ["HF_TOKEN"] = TOKEN
    try:
        folder = pickle.dumps(opened()).hex()
    finally:
        del os.environ["HF_TOKEN"]
    ours, theirs = pty.openpty()
    try:
        subprocess.run(
            [sys.executable, "-W", "error", "-c", textwrap.dedent(script), folder, tmp_path / "out"],
            env=environment, check=True, timeout=120, stdout=theirs, stderr=theirs, cwd=Path(__file__).parents[2],
        )  # fmt: skip
        os.write(theirs, b"end")
        assert os.read(ours, 10_000) == b"end"
    finally:
        os.close(ours)
        os.close(theirs)
    expected = (source / WEIGHTS).read_bytes()[200_000:200_010] + (source / "tokenizer.json").read_bytes()
    assert (tmp_path / "out").read_bytes() == expected


def test_a_process_of_its_own(hub: HubServer, tmp_path: Path) -> None:
    script = """
        import sys
        from storage.hub import open_hub
        folder = open_hub("base", "org/expert", "main")
        print(folder.file("model.safetensors").read_into(memoryview(bytearray(10)), 200_000), folder.place)
        print([name for name in ("torch", "transformers", "dask") if name in sys.modules])
    """
    environment = hub_environment(hub.url, tmp_path / "own")
    line = [sys.executable, "-W", "error", "-c", textwrap.dedent(script)]
    done = subprocess.run(
        line, env=environment, check=True, timeout=120, capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert (done.stdout, done.stderr) == (f"10 {opened().place}\n[]\n", "")


def test_headers_of_many_large_shards_are_few_bytes(hub: HubServer, tmp_path: Path) -> None:
    """Sparse shards of 3 GB, as a 7B model has them."""
    header = b'{"model.embed_tokens.weight": "..."}'.ljust(30_000)
    for expert in range(5):
        (tmp_path / f"e{expert}").mkdir()
        for shard in range(5):
            with (tmp_path / f"e{expert}" / f"model-{shard}.safetensors").open("wb") as file:
                file.write(struct.pack("<Q", len(header)) + header)
                file.truncate(3_000_000_000)
        hub.add_repo(f"org/e{expert}", tmp_path / f"e{expert}")
    hub.hash_content = False

    def headers(expert: int) -> list[bytes]:
        folder = open_hub(f"expert {expert}", f"org/e{expert}", None)
        files = [folder.file(name) for name in sorted(folder.names)]
        return [read(file, 8, *struct.unpack("<Q", read(file, 0, 8))) for file in files]

    with ThreadPoolExecutor(5) as pool:
        assert list(pool.map(headers, range(5))) == [[header] * 5] * 5
    assert len(hub.asked("hub GET /api")) == 5
    assert len(hub.asked("hub HEAD /org")) == len(hub.asked("cdn GET")) == 25
    assert hub.asked("hub GET /org") == []
    assert sum(request.sent for request in hub.asked("cdn")) == 25 * HEAD_BYTES
