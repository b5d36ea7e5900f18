"""Where files are asked for: redirects, signed addresses and tokens."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path

import pytest

import storage.hub
from storage.errors import CheckpointError, SourceError
from storage.hub import HEAD_BYTES, KEPT_S
from tests.support.hub_repository import (
    REPO,
    TOKEN,
    WEIGHTS,
    caught,
    parts,
    ranges,
    read,
    together,
    weights,
)
from tests.support.hub_server import HubServer


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
