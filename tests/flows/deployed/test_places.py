from __future__ import annotations

from pathlib import Path

import pytest
from prefect import runtime

from flows.deployed import places
from storage.errors import RecipeError


@pytest.fixture(autouse=True)
def clear(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (places.STORE, places.CLUSTER, places.LINKS):
        monkeypatch.delenv(name, raising=False)


def test_the_environment_says_where_nobody_else_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = places.read("tiny", {})
    assert own.output == str(places.ROOT / "build" / "artifacts" / "tiny")
    monkeypatch.setenv(places.STORE, "s3://models/")
    monkeypatch.setenv(places.CLUSTER, "tcp://scheduler:8786")
    read = places.read("tiny", {})
    assert (read.output, read.deltas) == ("s3://models/artifacts/tiny", "s3://models/deltas")
    assert read.cluster.address == "tcp://scheduler:8786"
    settings = {"output": str(tmp_path / "mine"), "deltas": "s3://a/b", "cluster.kind": "none"}
    read = places.read("tiny", settings)
    assert (read.output, read.deltas, read.cluster.where) == (str(tmp_path / "mine"), "s3://a/b", "none")
    read = places.read("tiny", {"name": "other"}, output=str(tmp_path / "given"), cluster="local")
    assert (read.output, read.deltas, read.cluster.where) == (str(tmp_path / "given"), "s3://models/deltas", "local")
    assert places.read("tiny", {"name": "other"}).output == "s3://models/artifacts/other"


def test_a_store_that_is_gone_with_the_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(places.STORE, "store")
    with pytest.raises(RecipeError, match=r"CHANNEL_MERGING_STORE: expected a URL or an absolute path, got 'store'"):
        places.read("tiny", {})
    monkeypatch.delenv(places.STORE)
    assert places.read("tiny", {}, output="build/here").output == str(Path("build/here").absolute())
    monkeypatch.setattr(runtime.deployment, "id", "some", raising=False)
    with pytest.raises(RecipeError, match=r"output: expected a URL or an absolute path, got 'build/here'"):
        places.read("tiny", {}, output="build/here")


def test_an_unknown_recipe_is_said_with_the_known_ones() -> None:
    with pytest.raises(RecipeError, match=r"recipe mistral-5x: expected the path .* codellama-3x, mistral-4x, tiny"):
        places.find_recipe("mistral-5x")


def test_links_lead_where_a_browser_can_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    assert places.link("s3://models/artifacts/a b/v", "v", "report.html") == "v `s3://models/artifacts/a b/v/report.html`"
    monkeypatch.setenv(places.STORE, "s3://models")
    monkeypatch.setenv(places.LINKS, "https://files.example/")
    found = places.link("s3://models/artifacts/a b/v", "v", "report.html")
    assert found == "[v](https://files.example/artifacts/a%20b/v/report.html)"
    assert places.link("/data/v", "v") == "[v](file:///data/v) `/data/v`"
