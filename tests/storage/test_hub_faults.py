"""Connections that are cut, refused or answered with something else."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from storage.errors import CheckpointError, SourceError
from storage.hub import HubFile
from storage.hub_errors import RETRIES
from tests.support.hub_repository import (
    REPO,
    SIZE,
    WEIGHTS,
    caught,
    files_under,
    opened,
    ranges,
    read,
    weights,
)
from tests.support.hub_server import HubServer

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
