"""Data sets on a Hub on loopback that this process uses: its client, and ``datasets``, which streams them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import pytest
from huggingface_hub import close_session, constants

from tests.support.hub_server import HubServer

TOKEN = "hf_good"


@contextmanager
def dataset_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """An empty Hub, with caches and a login of this process's own in ``folder``; faults are not waited for."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    client = {
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_CACHE": str(folder / "cache"),
        "HF_TOKEN_PATH": str(folder / "token"),
    }
    own = {
        "HF_HUB_OFFLINE": False,
        "HF_DATASETS_CACHE": folder / "datasets",
        "HF_MODULES_CACHE": folder / "modules",
        "STREAMING_READ_MAX_RETRIES": 2,
        "STREAMING_READ_RETRY_INTERVAL": 0,
        "STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL": 0,
        "STREAMING_OPEN_MAX_RETRIES": 2,
        "STREAMING_OPEN_RETRY_INTERVAL": 0,
    }
    for module, settings in ((constants, client), (datasets.config, own)):
        for name, value in settings.items():
            monkeypatch.setattr(module, name, value)
    with HubServer(token=TOKEN) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server.url)
        # some addresses are made from what these were at import
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        yield server
        close_session()
    assert server.leaks == []
