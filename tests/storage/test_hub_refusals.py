"""What may not be read, and what is said of it."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from storage.errors import CheckpointError
from storage.hub import open_hub
from tests.support.hub_repository import (
    REPO,
    TOKEN,
    WEIGHTS,
    caught,
    opened,
    read,
    weights,
)
from tests.support.hub_server import HubServer

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
