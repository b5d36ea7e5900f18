"""An empty output in a local folder, or in a bucket on loopback, for tests of both."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest

from storage import buckets, leases, objects
from storage.stores import Store, open_store
from tests.support.store_gateway import SECRET, Gateway

BUCKET = "artifacts"
KINDS = ("local", "s3")


@contextmanager
def bucket_on(moto: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    """An empty bucket behind a gateway, and the environment that leads to it; nothing waits long."""
    for name, value in {"AWS_ACCESS_KEY_ID": "anyone", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    backoff = {"init_backoff": timedelta(milliseconds=5), "max_backoff": timedelta(milliseconds=20), "base": 2}
    monkeypatch.setattr(buckets, "RETRIES", {"max_retries": 2, "backoff": backoff, "retry_timeout": timedelta(seconds=30)})
    monkeypatch.setattr(buckets, "PAUSE_S", 0.01)
    monkeypatch.setattr(leases, "LEASE_POLL_S", 0.05)
    urllib.request.urlopen(urllib.request.Request(f"{moto}/moto-api/reset", b"", method="POST")).close()
    with Gateway(moto).serving() as gateway:
        monkeypatch.setenv("AWS_ENDPOINT_URL", gateway.url)
        gateway.send("PUT", BUCKET)
        yield gateway
    objects._head.cache_clear()
    buckets.forget_connections()


def fill(store: Store, folder: Path, prefix: str = "") -> None:
    """Put every file of a folder into a store."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            store.put(f"{prefix}{path.relative_to(folder).as_posix()}", path.read_bytes())


def filled(place: str, folder: Path) -> Store:
    """The store at a place, with the files of a folder."""
    store = open_store(place)
    fill(store, folder)
    return store
