"""A new router for an artifact: another version of the same weights, and what the next runs make of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.retrain import retrain
from flows.run import Conductor, Outcome, run_recipe
from pipeline.engine import Silent
from pipeline.recipe import QuerySource, Recipe, load_recipe
from serving.router import artifact_router
from storage.artifact import Artifact, latest
from storage.errors import ArtifactError, QueryDataError, RecipeError
from storage.stores import open_store
from tests.pipeline.test_invariants import router_of
from tests.support.places import BUCKET
from tests.support.running import command, merged
from tests.support.tiny_experts import Family


@pytest.fixture
def outcome(family: Family) -> Outcome:
    return merged(family.recipe(router=router_of(family)))


def with_more(family: Family, expert: str = "math", text: str = "how many apples are left in the basket") -> Recipe:
    """The recipe after a query was added."""
    recipe = load_recipe(family.recipe(router=router_of(family)))
    path = Path(recipe.router.queries[expert][0].source)
    path.write_text(f"{path.read_text('utf-8')}\n{json.dumps({'text': text})}\n", "utf-8")
    return recipe


def files_of(place: Path) -> dict[str, Path]:
    return {path.relative_to(place).as_posix(): path for path in place.rglob("*") if path.is_file()}


def test_a_new_router_is_a_new_version_of_the_same_weights(family: Family, outcome: Outcome) -> None:
    before = {name: path.read_bytes() for name, path in files_of(outcome.path).items()}
    new = retrain(with_more(family), None, Silent())
    assert new.new
    assert new.version != outcome.version
    assert Artifact(new.path).verify() == []
    assert {name: path.read_bytes() for name, path in files_of(outcome.path).items()} == before
    for name, path in files_of(new.path).items():
        shared = not name.startswith(("router/", "manifest", "README", "report"))
        assert path.samefile(outcome.path / name) is shared, name
    assert new.manifest.experts == outcome.manifest.experts
    assert new.manifest.tensors == outcome.manifest.tensors
    assert new.manifest.router is not None
    assert new.manifest.router["queries"] >= 1
    assert sum(artifact_router(Artifact(new.path)).route("1 + 1").values()) == pytest.approx(1)
    assert latest(open_store(str(new.path.parent)))["version"] == new.version


def test_it_is_what_a_run_with_these_queries_makes(family: Family, outcome: Outcome) -> None:
    recipe = with_more(family)
    new = retrain(recipe, None, Silent())
    again = run_recipe(recipe.model_copy(update={"output": str(family.folder.parent / "elsewhere")}), Silent())
    assert again.version == new.version
    assert outcome.version != new.version


def test_the_same_queries_publish_nothing(family: Family, outcome: Outcome) -> None:
    recipe = with_more(family)
    first = retrain(recipe, None, Silent())
    assert retrain(recipe, None, Silent()) == Outcome(first.version, first.place, new=False, manifest=first.manifest)
    assert retrain(recipe, outcome.version, Silent()).version == first.version
    assert not [path for path in (first.path.parent / ".work").iterdir() if path.is_dir()]


def test_a_run_of_the_merged_inputs_is_content_with_the_new_router_while_it_is_the_latest(
    family: Family, outcome: Outcome, tmp_path: Path
) -> None:
    """As its queries lie elsewhere: the recipe's own are as they were."""
    recipe = load_recipe(family.recipe(router=router_of(family)))
    queries = {}
    for name, (source,) in recipe.router.queries.items():
        copy = tmp_path / f"more-{name}.jsonl"
        copy.write_text(f"{Path(source.source).read_text('utf-8')}\n{json.dumps({'text': f'one more for {name}'})}\n", "utf-8")
        queries[name] = (source.model_copy(update={"source": str(copy)}),)
    other = recipe.model_copy(update={"router": recipe.router.model_copy(update={"queries": queries})})
    new = retrain(other, None, Silent())
    assert new.version != outcome.version
    kept = merged(family.recipe(router=router_of(family)))
    assert (kept.version, kept.new) == (new.version, False)
    again = retrain(recipe, None, Silent())  # with the recipe's own queries: the version that was there
    assert (again.version, again.new) == (outcome.version, False)
    back = command("latest", outcome.path.parent, "--set", outcome.version)
    assert (back.returncode, back.stdout.strip()) == (0, outcome.version)
    kept = merged(family.recipe(router=router_of(family)))
    assert (kept.version, kept.new) == (outcome.version, False)
    twice = retrain(other, None, Silent())
    assert (twice.version, twice.new) == (new.version, False)


def test_what_cannot_be_trained_is_refused_and_leaves_nothing(family: Family, outcome: Outcome, tmp_path: Path) -> None:
    recipe = load_recipe(family.recipe(router=router_of(family)))
    before = sorted(map(str, outcome.path.parent.rglob("*")))
    with pytest.raises(RecipeError, match=r"router.kind is none: there is no router to train"):
        retrain(load_recipe(family.recipe()), None, Silent())
    fewer = recipe.model_copy(update={"experts": {n: s for n, s in recipe.experts.items() if n != "math"}})
    with pytest.raises(
        RecipeError, match=r"expected the experts of .* chinese, code, instruct, math, got chinese, code, instruct\."
    ):
        retrain(fewer, None, Silent())
    with pytest.raises(ArtifactError, match=r"no-such-version is not an artifact"):
        retrain(recipe, "no-such-version", Silent())
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    queries = recipe.router.model_copy(update={"queries": {**recipe.router.queries, "math": (QuerySource(source=str(empty)),)}})
    with pytest.raises(QueryDataError, match=r"expert math: .*empty.jsonl holds no queries"):
        retrain(recipe.model_copy(update={"router": queries}), None, Silent())
    assert sorted(map(str, outcome.path.parent.rglob("*"))) == before


def test_a_pulled_copy_is_no_place_to_publish(family: Family, outcome: Outcome, tmp_path: Path) -> None:
    copy = tmp_path / "here"
    assert command("pull", outcome.path.parent, copy).returncode == 0
    recipe = load_recipe(family.recipe(router=router_of(family))).model_copy(update={"output": str(copy)})
    with pytest.raises(ArtifactError, match=r"expected a published version in .*here, got a copy"):
        retrain(recipe, None, Silent())


def test_on_an_object_store(family: Family, gateway: object) -> None:
    place = f"s3://{BUCKET}/team/tiny"
    recipe = load_recipe(family.recipe(router=router_of(family)), {"output": place})
    first = run_recipe(recipe, Silent())
    with_more(family)
    new = retrain(recipe, None, Silent())
    assert new.new
    assert new.version != first.version
    assert Artifact(f"{place}@{new.version}").verify() == []
    assert Artifact(place).manifest.version == new.version
    assert not retrain(recipe, None, Silent()).new


def test_a_damaged_version_is_not_shared(family: Family, outcome: Outcome) -> None:
    pool = outcome.path / "pool-00001-of-00001.safetensors"
    raw = bytearray(pool.read_bytes())
    raw[-3] ^= 1
    pool.write_bytes(raw)
    with pytest.raises(ArtifactError, match=r"is damaged, and a new version would share its files. Run its recipe again"):
        retrain(with_more(family), None, Silent())


def test_a_new_router_stands_in_for_its_merge_only_while_it_is_the_latest(
    family: Family, outcome: Outcome, tmp_path: Path
) -> None:
    recipe = load_recipe(family.recipe(router=router_of(family)))
    more = tmp_path / "more.jsonl"
    (own,) = recipe.router.queries["math"]
    more.write_text(f"{Path(own.source).read_text('utf-8')}\n{json.dumps({'text': 'one more'})}\n", "utf-8")
    other = (own.model_copy(update={"source": str(more)}),)
    queries = recipe.router.model_copy(update={"queries": {**recipe.router.queries, "math": other}})
    new = retrain(recipe.model_copy(update={"router": queries}), None, Silent())
    assert merged(family.recipe(router=router_of(family))).version == new.version
    third = merged(family.recipe(router=router_of(family), **{"merge.groups": 3}))
    assert third.new
    back = merged(family.recipe(router=router_of(family)))
    assert (back.version, back.new) == (outcome.version, False)


def test_a_second_attempt_to_publish_still_publishes(family: Family, outcome: Outcome) -> None:
    class Twice(Conductor):
        def step(self, name: str, body: Callable[[], Any], check: Callable[[], None] = lambda: None) -> Any:
            if name == "publish":
                body()  # whose success was not heard of
            return body()

    assert run_recipe(load_recipe(family.recipe(**{"merge.groups": 3})), Silent(), Twice()).new
    assert retrain(with_more(family), outcome.version, Silent(), Twice()).new
