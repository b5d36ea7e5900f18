"""A Hub on loopback that the process under test uses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import close_session, constants

from tests.support.hub_repository import (
    REPO,
    TOKEN,
    write_repo,
)
from tests.support.hub_server import HubServer


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
