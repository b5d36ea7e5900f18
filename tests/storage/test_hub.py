from __future__ import annotations

import hashlib
import logging
import os
import pickle
import pty
import re
import struct
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace

import numpy as np
import pytest
from huggingface_hub import close_session, constants, get_session, snapshot_download

import storage.hub
from storage.errors import ChannelMergingError, CheckpointError, SourceError
from storage.files import File, Folder
from storage.hub import FETCHED_BYTES, HEAD_BYTES, KEPT_S, HubFile, HubFolder, open_hub
from storage.hub_errors import RETRIES
from tests.support.hub_server import HubServer, hub_environment

REPO, WEIGHTS = "org/expert", "model.safetensors"
TOKEN = "hf_good"
SIZE = 1_500_001


def write_repo(folder: Path, seed: int = 0) -> Path:
    (folder / "original").mkdir(parents=True)
    (folder / WEIGHTS).write_bytes(np.random.default_rng(seed).bytes(SIZE))
    (folder / "config.json").write_text('{"model_type": "mistral"}')
    (folder / "tokenizer.json").write_text(f'{{"seed": {seed}}}' * 100)
    (folder / "empty.txt").touch()
    (folder / "original" / "consolidated.bin").write_bytes(b"below the top level")
    return folder


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds the client wanted to wait before it asked again; it does not."""
    slept: list[float] = []
    for module in ("huggingface_hub.utils._http", "huggingface_hub.file_download", "storage.hub"):
        monkeypatch.setattr(f"{module}.time", SimpleNamespace(sleep=slept.append))
    return slept


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> Iterator[HubServer]:
    """A Hub that this process uses, with a cache and a login of its own; ``org/expert`` is on it."""
    write_repo(tmp_path / "hub" / REPO)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    with HubServer(tmp_path / "hub", token=TOKEN) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield server
        close_session()
    assert server.leaks == []


@pytest.fixture
def source(hub: HubServer, tmp_path: Path) -> Path:
    """The folder that ``org/expert`` serves."""
    return tmp_path / "hub" / REPO


@pytest.fixture
def cache(hub: HubServer) -> Path:
    return Path(constants.HF_HUB_CACHE)


def opened(revision: str | None = None) -> HubFolder:
    folder = open_hub("expert math", REPO, revision)
    assert isinstance(folder, HubFolder)
    return folder


def weights() -> HubFile:
    return opened().file(WEIGHTS)


def read(file: File, offset: int, count: int) -> bytes:
    data = bytearray(count)
    got = file.read_into(memoryview(data), offset)
    return bytes(data[:got])


def ranges(hub: HubServer, pattern: str = "cdn GET") -> list[str | None]:
    return [request.range for request in hub.asked(pattern)]


def files_under(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def caught(kind: type[ChannelMergingError], action: Callable[[], object]) -> str:
    """The message of the error that an action ends with; nothing of the client's hangs on it."""
    with pytest.raises(kind) as found:
        action()
    error = found.value
    assert "\n" not in str(error)
    assert error.__cause__ is None
    assert error.__context__ is None
    assert type(pickle.loads(pickle.dumps(error))) is kind
    return str(error)


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


# addresses


def parts(file: File, count: int = 100_000) -> bytes:
    """The file behind its start, read in ranges."""
    return b"".join(read(file, offset, count) for offset in range(HEAD_BYTES, SIZE, count))


def together(count: int, action: Callable[[int], bytes]) -> list[bytes]:
    """What threads that start at the same moment get."""
    start = Barrier(count)

    def run(index: int) -> bytes:
        start.wait()
        return action(index)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def test_many_ranges_of_a_file_are_one_request_to_the_hub(hub: HubServer, source: Path) -> None:
    """And it names no range: the address that is signed for one serves no other."""
    file, content = weights(), (source / WEIGHTS).read_bytes()
    hub.forget()
    assert parts(file) == content[HEAD_BYTES:]
    assert read(file, 0, 8) == content[:8]
    assert [(request.method, request.range) for request in hub.asked("^hub")] == [("HEAD", None)]
    assert len(hub.asked("cdn GET")) == 15


def test_threads_ask_for_an_address_once(hub: HubServer, source: Path) -> None:
    file, content = weights(), (source / WEIGHTS).read_bytes()
    for requests in (1, 2):
        found = together(2, lambda index: read(file, 200_000 + 100_000 * index, 100_000))
        assert b"".join(found) == content[200_000:400_000]
        assert len(hub.asked("hub HEAD")) == requests
        hub.expire()


def test_files_that_the_hub_serves_itself_are_asked_for_there(hub: HubServer, source: Path) -> None:
    hub.redirects = False
    file = weights()
    hub.fail("hub GET /org", times=2, status=503)
    assert parts(file) == (source / WEIGHTS).read_bytes()[HEAD_BYTES:]
    assert len(hub.asked("hub HEAD")) == 1
    assert len(ranges(hub, "hub GET /org")) == 14 + 2
    assert hub.asked("cdn") == []


def test_addresses_expire(hub: HubServer, source: Path) -> None:
    file, content = weights(), (source / WEIGHTS).read_bytes()
    assert parts(file) == content[HEAD_BYTES:]
    hub.expire()
    hub.forget()
    assert parts(file) == content[HEAD_BYTES:]
    assert len(hub.asked("^hub")) == 1
    assert [request.status for request in hub.asked("cdn")] == [403] + [206] * 14


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_a_refused_address_is_asked_for_again_once(hub: HubServer, source: Path, status: int, waits: list[float]) -> None:
    file, content = weights(), (source / WEIGHTS).read_bytes()
    read(file, 200_000, 10)
    hub.fail("cdn GET", status=status)
    assert read(file, 300_000, 10) == content[300_000:300_010]
    assert len(hub.asked("hub HEAD")) == 2
    hub.fail("cdn GET", times=2, status=status)
    caught(CheckpointError, lambda: read(file, 400_000, 10))
    assert len(hub.asked("hub HEAD")) == 3
    assert waits == []


def test_a_host_that_went_away_is_asked_for_again(hub: HubServer, source: Path, waits: list[float]) -> None:
    file, content, other_host = weights(), (source / WEIGHTS).read_bytes(), hub.cdn_url
    with HubServer() as gone:
        hub.cdn_url = gone.cdn_url
        assert read(file, 200_000, 10) == content[200_000:200_010]
    hub.cdn_url = other_host
    assert read(file, 300_000, 10) == content[300_000:300_010]
    assert len(hub.asked("hub HEAD")) == 2
    assert gone.leaks == []
    assert waits == []


def test_addresses_are_kept_for_a_time(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    file = weights()
    for now, requests in ((1000.0, 1), (1000 + KEPT_S, 1), (1001 + KEPT_S, 2), (1002 + KEPT_S, 2)):
        monkeypatch.setattr("storage.hub.monotonic", lambda now=now: now)
        read(file, 200_000, 10)
        assert len(hub.asked("hub HEAD")) == requests


def test_redirects_on_the_hub_are_followed_with_the_token(
    hub: HubServer, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of renamed repositories."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.repos[REPO].private = True
    file = weights()
    path = file.url.removeprefix(hub.url)
    hub.fail("hub HEAD /org", status=307, headers={"Location": path})
    assert read(file, 200_000, 10) == (source / WEIGHTS).read_bytes()[200_000:200_010]
    assert [(request.status, request.has_token) for request in hub.asked("hub HEAD")] == [(307, True), (302, True)]
    hub.expire()
    hub.fail("hub HEAD /org", times=100, status=307, headers={"Location": path})
    assert "TooManyRedirects" in caught(SourceError, lambda: read(file, 200_000, 10))


def test_tokens_and_addresses_stay_where_they_belong(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Tokens at the Hub, signed addresses in memory: not in what travels, nor in what is logged."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.repos[REPO].private = True
    client_log = logging.getLogger("huggingface_hub")
    client_log.addHandler(caplog.handler)  # it does not propagate
    try:
        with caplog.at_level(logging.INFO), caplog.at_level(logging.DEBUG, "huggingface_hub"):
            file = weights()
            before = pickle.dumps(file)
            parts(file)
            hub.expire()
            hub.fail("cdn GET", times=2, status=503)
            parts(file)
            file.download()
    finally:
        client_log.removeHandler(caplog.handler)
    assert {(request.server, request.has_token) for request in hub.requests} == {("hub", True), ("cdn", False)}
    assert pickle.dumps(file) == before
    assert {record.name for record in caplog.records if hub.cdn_url in record.getMessage()} == {
        "httpx2", "huggingface_hub.utils._http"
    }  # fmt: skip
    for text in (caplog.text, repr(file), repr(storage.hub._LINKS), before.decode("latin-1")):
        assert "secret" not in text
        assert "Signature" not in text


# faults


@pytest.mark.parametrize("reset", [False, True])
def test_a_cut_connection_goes_on_where_it_stopped(hub: HubServer, source: Path, reset: bool) -> None:
    hub.fail("cdn GET", cut=100_000, reset=reset)
    assert read(weights(), 200_000, 400_000) == (source / WEIGHTS).read_bytes()[200_000:600_000]
    first, second = ranges(hub)
    assert first == "bytes=200000-599999"
    start = re.fullmatch(r"bytes=(\d+)-599999", second or "")
    assert start is not None
    # what a reset connection had not handed over yet is lost
    assert int(start[1]) == 300_000 if not reset else 200_000 <= int(start[1]) <= 300_000


def test_attempts_that_make_progress_do_not_count(hub: HubServer, source: Path) -> None:
    hub.fail("cdn GET", times=3 * RETRIES, cut=1000)
    assert read(weights(), 200_000, 100_000) == (source / WEIGHTS).read_bytes()[200_000:300_000]
    assert ranges(hub) == [f"bytes={200_000 + 1000 * attempt}-299999" for attempt in range(3 * RETRIES + 1)]


def test_a_server_that_answers_less_than_was_asked_is_asked_for_the_rest(hub: HubServer, source: Path) -> None:
    hub.fail("cdn GET", times=2, most=40_000)
    assert read(weights(), 200_000, 100_000) == (source / WEIGHTS).read_bytes()[200_000:300_000]
    assert ranges(hub) == ["bytes=200000-299999", "bytes=240000-299999", "bytes=280000-299999"]


def test_connections_that_bring_nothing_are_given_up(hub: HubServer, waits: list[float]) -> None:
    file = weights()
    hub.fail("cdn GET", times=100, cut=0)
    message = caught(SourceError, lambda: read(file, 200_000, 100_000))
    assert message.startswith(f"{file.place}: no connection to {hub.url} in 6 attempts (RemoteProtocolError: ")
    assert message.endswith("Check the network and run again.")
    assert len(ranges(hub)) == RETRIES + 1
    assert waits == [1, 2, 4, 8, 8]
    assert SourceError.exit_code == 3


def test_connections_that_are_reset_before_any_answer_are_made_again(hub: HubServer, source: Path) -> None:
    hub.fail("hub GET /api", reset=True)
    hub.fail("hub HEAD /org", reset=True)
    hub.fail("cdn GET", reset=True)
    assert read(weights(), 200_000, 10) == (source / WEIGHTS).read_bytes()[200_000:200_010]


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
@pytest.mark.parametrize("where", ["hub GET /api", "hub HEAD /org", "cdn GET"])
def test_bursts_of_refusals_are_waited_for(hub: HubServer, source: Path, waits: list[float], where: str, status: int) -> None:
    hub.fail(where, times=3, status=status)
    assert read(weights(), 200_000, 10) == (source / WEIGHTS).read_bytes()[200_000:200_010]
    assert waits == [1, 2, 4]


def test_retry_after_is_respected(hub: HubServer, waits: list[float]) -> None:
    hub.fail("cdn GET", status=429, headers={"Retry-After": "37"})
    read(weights(), 200_000, 10)
    assert waits == [38]  # the client adds a second


def test_the_hubs_rate_limit_is_waited_for(hub: HubServer, waits: list[float]) -> None:
    hub.fail("hub HEAD", status=429, headers={"RateLimit": '"resolvers";r=0;t=55'})
    read(weights(), 200_000, 10)
    assert waits == [56]


@pytest.mark.parametrize("status", [429, 503])
def test_endless_refusals_end_the_run(hub: HubServer, status: int) -> None:
    file = weights()
    hub.fail("GET", times=100, status=status)
    expected = f"{hub.url} answered {status} (scripted fault) 6 times. Run again later."
    assert caught(SourceError, lambda: read(file, 200_000, 10)) == f"{file.place}: {expected}"
    assert caught(SourceError, opened) == f"expert math: {REPO}: {expected}"


def test_a_hub_that_is_not_there(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    file = weights()
    with HubServer() as gone:
        monkeypatch.setenv("HF_ENDPOINT", gone.url)
    expected = f"expert math: {REPO}: no connection to {gone.url} in 6 attempts \\(ConnectError: .*refused"
    assert re.match(expected, caught(SourceError, opened))
    elsewhere = HubFile(file.repo, file.commit, file.name, file.size, gone.url)
    assert "ConnectError" in caught(SourceError, lambda: read(elsewhere, 200_000, 10))
    assert "ConnectError" in caught(SourceError, elsewhere.download)


def test_another_size_than_the_listed_one_is_an_error(hub: HubServer) -> None:
    hub.fail("cdn GET", times=2, lie=SIZE - 100_000)
    file = weights()
    expected = f"{file.place}: expected the {SIZE} bytes its commit lists, {hub.url} has {SIZE - 100_000}"
    assert expected in caught(CheckpointError, lambda: read(file, 200_000, 10))
    assert expected in caught(CheckpointError, lambda: read(file, SIZE - 10, 10))  # answered by 416


# servers without ranges


def test_without_ranges_the_start_is_read_and_the_rest_not(hub: HubServer, source: Path, cache: Path) -> None:
    hub.ranges = False
    hub.fail("cdn GET", cut=200_000)  # beyond what is read
    assert read(weights(), 8, 40_000) == (source / WEIGHTS).read_bytes()[8:40_008]
    assert len(hub.asked("GET .*resolve")) == 1
    assert files_under(cache) == []


@pytest.mark.parametrize("redirects", [True, False])
def test_without_ranges_a_file_is_downloaded_once(hub: HubServer, source: Path, cache: Path, redirects: bool) -> None:
    hub.ranges, hub.redirects = False, redirects
    file, content = weights(), (source / WEIGHTS).read_bytes()
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda offset: read(file, offset, 100_000), range(200_000, SIZE, 100_000)))
    assert b"".join(parts) == content[200_000:]
    assert len(hub.asked(f"HEAD .*{WEIGHTS}")) == 2  # by the client too, once for the download
    assert (
        len(
            [request for request in hub.asked("GET") if request.status == 200 and WEIGHTS in request.path and not request.range]
        )
        == 1
    )
    hub.forget()
    assert read(file, 300_000, 10) == content[300_000:300_010]
    assert hub.requests == []
    for path in files_under(cache):  # even without its copy it is not asked for ranges again
        path.unlink()
    assert read(file, 300_000, 10) == content[300_000:300_010]
    assert [request for request in hub.asked("GET") if request.range] == []


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


# tokens


@pytest.mark.parametrize("login", ["environment", "file"])
def test_private_repositories_are_read_with_the_clients_token(
    hub: HubServer, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, login: str
) -> None:
    hub.repos[REPO].private = True
    assert "HF_TOKEN" in caught(CheckpointError, opened)
    if login == "environment":
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    else:
        (tmp_path / "token").write_text(f"{TOKEN}\n")
    hub.forget()
    folder = opened()
    assert read(folder.file(WEIGHTS), 200_000, 10) == (source / WEIGHTS).read_bytes()[200_000:200_010]
    folder.local(["config.json"])
    folder.file(WEIGHTS).download()
    assert all(request.has_token == (request.server == "hub") for request in hub.requests)
    assert {request.server for request in hub.requests} == {"hub", "cdn"}
    travelling = pickle.dumps((folder, folder.file(WEIGHTS)))
    assert TOKEN.encode() not in travelling
    assert len(travelling) < 2000
    assert pickle.loads(travelling) == (folder, folder.file(WEIGHTS))


def test_a_token_that_cannot_be_sent_is_not_shown(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for token in ("hf_se\x0bcret", "hf_se\u00e4cret"):
        monkeypatch.setenv("HF_TOKEN", token)
        message = caught(CheckpointError, opened)
        assert "Does HF_TOKEN hold something that is no token?" in message
        assert "hf_se" not in message


def test_an_endpoint_with_a_password_is_refused(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.url.replace("//", "//user:secret@"))
    message = caught(CheckpointError, opened)
    assert "HF_ENDPOINT holds a user or a password" in message
    assert "secret" not in message


# refusals


def missing(hub: HubServer) -> None:
    del hub.repos[REPO]


def private(hub: HubServer) -> None:
    hub.repos[REPO].private = True


def gated(hub: HubServer) -> None:
    hub.repos[REPO].gated = True


def disabled(hub: HubServer) -> None:
    hub.repos[REPO].disabled = True


def forbidden(hub: HubServer) -> None:
    hub.fail("hub", times=10, status=403, headers={"X-Error-Message": "Your token lacks a permission"})


def no_hub(hub: HubServer) -> None:
    hub.fail("hub", times=10, status=404)


def a_login_page(hub: HubServer) -> None:
    hub.fail("hub", times=10, status=200)


@pytest.mark.parametrize("token", [None, TOKEN])
@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        (missing, "nor a folder of that name beside the recipe, or it is private: check the name, or set HF_TOKEN to a token"),
        (
            gated,
            "it is gated: accept its terms at http://127.0.0.1:[0-9]+/org/expert and set HF_TOKEN to a token of that account",
        ),
        (disabled, "has disabled this repository"),
        (forbidden, r"access was refused \(403: Your token lacks a permission.*\)"),
        (no_hub, r"answered 404 \(scripted fault\). Is HF_ENDPOINT the address of a Hub"),
        (a_login_page, r"does not answer as a Hub does \(Expecting value.*\). Is HF_ENDPOINT right"),
    ],
)
def test_refusals_say_what_to_do(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, token: str | None, trouble: Callable[[HubServer], None], message: str
) -> None:
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    trouble(hub)
    assert re.match(f"expert math: {REPO}: .*{message}.*[.?]$", caught(CheckpointError, opened))


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        (missing, "there is no such repository"),
        (private, "there is no such repository, nor a folder of that name beside the recipe, or it is private"),
        (gated, "it is gated: accept its terms at"),
        (disabled, "has disabled this repository"),
        (forbidden, "access was refused"),
    ],
)
def test_what_is_taken_away_after_it_was_listed(hub: HubServer, trouble: Callable[[HubServer], None], message: str) -> None:
    file = weights()
    trouble(hub)
    for action in (lambda: read(file, 0, 8), lambda: read(file, 200_000, 10)):
        assert re.match(f"{file.place}: .*{message}", caught(CheckpointError, action))


def test_signatures_of_a_store_that_refuses_are_not_shown(hub: HubServer) -> None:
    file = weights()
    text = "<Error><Code>SignatureDoesNotMatch</Code><Signature>secret</Signature></Error>"
    hub.fail("cdn GET", times=2, status=403, text=text)
    message = caught(CheckpointError, lambda: read(file, 200_000, 10))
    assert message.startswith(f"{file.place}: access was refused (403: Forbidden). ")
    assert "secret" not in message
    hub.fail("cdn GET", times=2, status=403, text=f"{hub.cdn_url}/file?Signature=secret is too old")
    message = caught(CheckpointError, lambda: read(file, 200_000, 10))
    assert f"access was refused (403: {hub.cdn_url}/file is too old). " in message


@pytest.mark.parametrize("trouble", [missing, private, gated])
def test_whole_copies_are_refused_alike(hub: HubServer, trouble: Callable[[HubServer], None]) -> None:
    file = weights()
    trouble(hub)
    assert "HF_TOKEN" in caught(CheckpointError, file.download)


def test_other_bad_input(hub: HubServer, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert caught(CheckpointError, lambda: opened("v9")).startswith(
        f"expert math: {REPO}@v9: {REPO} has no revision v9. Name a "
    )
    message = caught(CheckpointError, lambda: open_hub("base", "org/na--me", None))
    assert message == "base: org/na--me: expected a repository's name (org/name), got org/na--me. Correct it in the recipe."
    file = weights()
    (source / WEIGHTS).unlink()
    assert f"{file.place}: {hub.url} lists this file and has none" in caught(CheckpointError, lambda: read(file, 0, 8))
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    message = caught(CheckpointError, opened)
    assert "does not know the token (Invalid credentials in Authorization header). Set HF_TOKEN to a valid one" in message
    assert "hf_expired" not in message


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
