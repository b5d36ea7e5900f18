"""The recipes that come with the package, and the file that deploys them."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.flows import Flow, load_flow_from_entrypoint

from flows.deployed import places
from flows.planning import judge
from pipeline.recipe import load_recipe
from storage.errors import RecipeError
from tests.support.prefect_server import POOL, ROOT

RECIPES = sorted((ROOT / "flows" / "recipes").iterdir())
PROMISED = {
    "merge/mistral-4x",
    "merge/codellama-3x",
    "merge/tiny",
    "train-router/mistral-4x",
    "train-router/tiny",
    "sweep/mistral-4x",
    "sweep/tiny",
    "clean/mistral-4x",
    "evaluate/tiny",
}
DEPLOYED: Any = yaml.safe_load((ROOT / "prefect.yaml").read_text())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_is_valid_and_has_the_name_of_its_file(path: Path) -> None:
    recipe = load_recipe(path)
    assert path.name == f"{recipe.name}.yaml"
    assert places.find_recipe(recipe.name) == path
    assert len(recipe.experts) >= 3
    assert f"prefect deployment run merge/{recipe.name}" in path.read_text().split("\nname:")[0], "how it is run"


def test_the_tiny_recipe_can_be_run() -> None:
    found = judge(load_recipe(ROOT / "flows" / "recipes" / "tiny.yaml"))
    assert not found.errors


def test_the_deployments_are_the_promised_ones() -> None:
    named = [f"{load_flow_from_entrypoint(one['entrypoint']).name}/{one['name']}" for one in DEPLOYED["deployments"]]
    assert sorted(named) == sorted(PROMISED)
    assert all(one["work_pool"] == {"name": POOL} for one in DEPLOYED["deployments"])


@pytest.mark.parametrize("deployment", DEPLOYED["deployments"], ids=lambda one: f"{one['entrypoint']} {one['name']}")
def test_parameters_fit_the_flow(deployment: dict[str, Any]) -> None:
    flow: Flow[..., Any] = load_flow_from_entrypoint(deployment["entrypoint"])
    given = dict(deployment["parameters"])
    required = {name for name, one in inspect.signature(flow.fn).parameters.items() if one.default is one.empty}
    missing = required - given.keys()
    assert missing == ({"artifact"} if flow.name == "evaluate" else set()), "what only the event of a version knows"
    flow.validate_parameters(given | dict.fromkeys(missing, "output@version"))
    if "recipe" in given:
        assert given["recipe"] in places.known_recipes()
        assert deployment["name"] == given["recipe"]
    if "texts" in given:
        assert (places.ROOT / given["texts"]).is_dir()


def test_places_are_of_the_environment_where_nobody_says_otherwise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = places.read("tiny", {})
    assert Path(own.output) == ROOT / "build" / "artifacts" / "tiny"
    monkeypatch.setenv(places.STORE, "s3://models/team/")
    monkeypatch.setenv(places.CLUSTER, "tcp://scheduler:8786")
    found = places.read("tiny", {"name": "other"})
    assert (found.output, found.deltas) == ("s3://models/team/artifacts/other", "s3://models/team/deltas")
    assert found.cluster.where == "tcp://scheduler:8786"
    said = places.read("tiny", {}, output=str(tmp_path), cluster="none")
    assert (said.output, said.deltas, said.cluster.where) == (str(tmp_path), "s3://models/team/deltas", "none")


def test_a_recipe_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(RecipeError, match=r"recipe unheard-of: expected the path .* or one of codellama-3x, mistral-4x, tiny"):
        places.read("unheard-of", {})


def test_links_are_for_browsers_where_they_can_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    place = f"{tmp_path}/artifacts/tiny/0 1"
    assert places.link(place, "here") == f"[here]({Path(place).as_uri()}) `{place}`"
    assert places.link("s3://models/x", "here", "report.html") == "here `s3://models/x/report.html`"
    monkeypatch.setenv(places.STORE, "s3://models")
    monkeypatch.setenv(places.LINKS, "https://files.example/models/")
    assert places.link("s3://models/x y", "here", "report.html") == "[here](https://files.example/models/x%20y/report.html)"
    assert places.link("s3://models-of-others/x", "here") == "here `s3://models-of-others/x`"
