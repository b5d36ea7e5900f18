from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

os.environ["DO_NOT_TRACK"] = "1"
os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
# every test has caches of its own, but none needs to compile the kernels again
os.environ.setdefault("NUMBA_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache"))

from hypothesis import settings

from storage.stores import Store, open_store
from tests.support.places import BUCKET, KINDS, bucket_on
from tests.support.store_gateway import Gateway, moto_server
from tests.support.tiny_experts import Family, write_family

if TYPE_CHECKING:
    from tests.support.hub_server import HubServer

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=60)
settings.register_profile("nightly", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache of file digests lies in a temporary folder, never in the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def family(tmp_path: Path) -> Family:
    """Four experts of a two-layer base, with the irregularities of real ones."""
    return write_family(tmp_path / "family")


@pytest.fixture(scope="session")
def tiny_mistral() -> Path:
    """The trained family of the demo."""
    return Path(__file__).parent.parent / "examples" / "tiny-mistral"


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    """The address of an object store on loopback."""
    with moto_server() as url:
        yield url


@pytest.fixture
def gateway(moto: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    """An empty bucket behind what records and disturbs requests."""
    with bucket_on(moto, monkeypatch) as gateway:
        yield gateway


@pytest.fixture(params=KINDS)
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty output, here or there."""
    if request.param == "s3":
        request.getfixturevalue("gateway")
        return open_store(f"s3://{BUCKET}/team/output")
    return open_store(str(tmp_path / "output"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """An empty Hub on loopback, for data sets; its clients do not wait between tries."""
    from tests.support.dataset_hub import dataset_hub  # which imports the Hub's clients

    for module in ("huggingface_hub.utils._http", "storage.hub"):
        monkeypatch.setattr(f"{module}.time", SimpleNamespace(sleep=lambda _: None))
    with dataset_hub(tmp_path / "home", monkeypatch) as server:
        yield server
