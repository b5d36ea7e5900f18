"""The router's section of a recipe: sources of queries, what they are known by, and what is refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.recipe import Recipe, load_recipe
from pipeline.router_inputs import identify_router, pinned
from pipeline.sections import OF_BERT
from storage.errors import CheckpointError, QueryDataError, RecipeError
from storage.layout import ROUTER_FORMAT
from tests.support.hub_server import HubServer

BASIC: dict[str, Any] = {
    "name": "tiny", "base": "./base", "experts": {"a": "./a", "b": "./b"}, "output": "./out",
    "router": {"kind": "linear", "queries": {"a": "./a.jsonl", "b": "org/b"}},
}  # fmt: skip


def loaded(folder: Path, router: Any = None, **sets: Any) -> Recipe:
    """The basic recipe with a router of its own, and keys set."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(BASIC | ({} if router is None else {"router": router}), sort_keys=False))
    return load_recipe(path, {f"router.{key}": value for key, value in sets.items()})


def refused(folder: Path, router: Any = None, **sets: Any) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        loaded(folder, router, **sets)
    return list(caught.value.problems)


def test_one_source_alone_is_the_short_form(tmp_path: Path) -> None:
    router = {
        "kind": "linear",
        "queries": {
            "a": ["a.jsonl", {"source": "org/more@v1", "config": "main", "messages": "chat", "limit": 10}],
            "b": {"source": "./b.parquet", "column": "q", "group": "of", "language": "de"},
        },
        "outside": "far.txt",
    }
    found = loaded(tmp_path, router).router
    assert [spec.source for spec in found.queries["a"]] == [str(tmp_path / "a.jsonl"), "org/more@v1"]
    assert found.queries["a"][1].model_dump() == {"source": "org/more@v1", "config": "main", "messages": "chat", "limit": 10}
    assert [spec.source for spec in found.queries["b"]] == [str(tmp_path / "b.parquet")]
    assert [spec.source for spec in found.outside] == [str(tmp_path / "far.txt")]
    assert (found.total, found.bad_share, found.threshold, found.fallback) == (50_000, 0.01, 0, None)


@pytest.mark.parametrize(
    ("place", "kind"),
    [
        ("org/name", "hub"), ("org/name@v1", "hub"), ("org/name@refs/pr/1", "hub"), ("data/q.jsonl", "local"),
        ("data/q.txt", "local"), ("data/q.jsonl.gz", "local"), ("name", "local"), ("./org/name", "local"), ("a/b/c", "local"),
        ("held/q", "local"), ("~/q", "local"), ("org/na me", "local"),
    ],
)  # fmt: skip
def test_what_is_a_data_set_and_what_a_file(tmp_path: Path, place: str, kind: str) -> None:
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "q").touch()
    (spec,) = loaded(tmp_path, **{"queries.a": place}).router.queries["a"]
    assert ("hub" if spec.source == place else "local") == kind
    assert kind == "hub" or Path(spec.source).is_absolute()


def test_keys_of_one_source_can_be_set(tmp_path: Path) -> None:
    found = loaded(tmp_path, **{"queries.a.column": "q", "queries.b.limit": 5, "total": None}).router
    assert (found.queries["a"][0].column, found.queries["b"][0].limit, found.total) == ("q", 5, None)
    with pytest.raises(RecipeError, match=r"router.queries.a.limit: a is no section of the recipe"):
        loaded(tmp_path, {"kind": "none", "queries": {"a": ["x", "y"]}}, **{"queries.a.limit": 5})


def test_a_resolved_recipe_is_a_recipe(tmp_path: Path) -> None:
    for router in (
        BASIC["router"],
        {**BASIC["router"], "kind": "bert", "threshold": "auto", "fallback": "base", "encoder": "./encoder", "epochs": 2},
        {**BASIC["router"], "threshold": {"a": 0.5}, "fallback": "b", "outside": ["org/c", "./d.txt"], "total": None},
        {"kind": "none"},
    ):
        found = loaded(tmp_path, router)
        again = json.loads(json.dumps(found.model_dump(mode="json", exclude={"cluster"})))
        (tmp_path / "again.yaml").write_text(yaml.safe_dump(again))
        assert load_recipe(tmp_path / "again.yaml").router == found.router
        assert pickle.loads(pickle.dumps(found.router)) == found.router


def test_the_keys_of_bert_have_the_papers_values(tmp_path: Path) -> None:
    found = loaded(tmp_path, {**BASIC["router"], "kind": "bert"}).router
    values = {name: getattr(found, name) for name in OF_BERT}
    assert values == {
        "encoder": "google-bert/bert-base-multilingual-cased", "epochs": 1, "batch": 128, "learning_rate": 1e-4, "warmup": 0.1,
        "weight_decay": 0.01, "max_length": 512, "accumulate": 1, "early_stop": None,
    }  # fmt: skip
    assert (
        loaded(tmp_path, {**BASIC["router"], "kind": "bert", "learning_rate": "3e-5"}).router.learning_rate == 3e-5
    )  # as YAML reads it
    assert OF_BERT[0] not in loaded(tmp_path).router.model_dump()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"queries.a": "s3://b/x"}, "router.queries.a: queries are data sets on the Hub or files of this machine, got the"),
        ({"queries.a": "hf://datasets/org/x@v1"}, "got the scheme 'hf'; write the data set as org/x"),
        ({"queries.a": "https://huggingface.co/datasets/org/x/tree/main"}, "the scheme 'https'; write the data set as org/x"),
        ({"queries.a": "org/x@"}, "router.queries.a: empty revision; name a branch, tag or commit, or leave it out"),
        ({"queries.a": " "}, "router.queries.a: empty; give a data set on the Hub or a file"),
        ({"queries.a": "."}, "is a folder; give a file, or several as a list"),
        ({"queries.a": "x/q.csv"}, "router.queries.a: q.csv: expected JSON Lines, Parquet (.parquet) or text (.txt)"),
        ({"queries.a": {"colum": "q", "source": "x"}}, "router.queries.a.colum: unknown key; did you mean 'column'?"),
        ({"queries.a": {"column": "q"}}, "router.queries.a.source: Field required"),
        ({"queries.a": ["x", {"source": "y", "limit": 0}]}, "router.queries.a.1.limit: Input should be greater than"),
        ({"queries.a": []}, "router.queries.a: no source; give a data set on the Hub or a file"),
        ({"queries.a": {"source": "x", "split": "test"}}, "router.queries.a.split: only data sets on the Hub have one, got x"),
        ({"queries.a": {"source": "x", "config": "c"}}, "router.queries.a.config: only data sets on the Hub have one, got x"),
        ({"queries.a": {"source": "x.txt.gz", "column": "q"}}, "router.queries.a.column: a text file has no columns"),
        ({"queries.a": {"source": "org/x", "column": "q", "messages": "m"}}, "router.queries.a: column or messages, got both"),
        ({"queries.a": ["./a.jsonl", "./a.jsonl"]}, "router.queries.a.1: the same queries as router.queries.a.0, which"),
        ({"outside": "org/b"}, "router.outside: the same queries as router.queries.b, which tell nobody apart; remove one"),
        ({"queries.c": "./c.jsonl"}, "router.queries.c: there is no expert of that name; experts: a, b"),
        ({"total": 0}, "router.total: Input should be greater than or equal to 1 (got 0)"),
        ({"bad_share": 2}, "router.bad_share: Input should be less than or equal to 1 (got 2)"),
        ({"threshold": 0.5}, "router.threshold: below it the fallback is chosen, and there is none; set router.fallback"),
        ({"threshold": {"c": 0.5}, "fallback": "base"}, "router.threshold.c: there is no expert of that name; experts: a, b"),
        ({"fallback": "c", "threshold": "auto"}, "router.fallback: expected 'base' or an expert (a, b), got 'c'"),
        ({"fallback": "base"}, "router.fallback: it is chosen below router.threshold, which is 0; set that to auto"),
        ({"epochs": 3}, "router.epochs: only kind bert has it, the kind is linear; leave it out"),
        ({"kind": "bert", "accumulate": 3}, "router.accumulate: expected a divisor of the batch, 128, got 3; change one"),
        ({"kind": "bert", "encoder": ""}, "router.encoder: empty source; expected a Hub id, a folder or a URL"),
        ({"kind": "bert", "learning_rate": "fast"}, "router.learning_rate: Input should be a valid number"),
        ({"kind": "bert", "warmup": 1.5}, "router.warmup: Input should be less than or equal to 1"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_its_key(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    problems = refused(tmp_path, **keys)
    assert len([problem for problem in problems if message in problem]) == 1, problems
    assert len(problems) == 1, problems


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"queries.a": 5}, "router.queries.a: expected a source (a data set on the Hub or a file) or a mapping with one"),
        ({"threshold": "often", "fallback": "a"}, "router.threshold: expected 'auto', a number from 0 to below 1"),
        ({"threshold": 1, "fallback": "a"}, "router.threshold: expected 'auto', a number from 0 to below 1"),
        ({"threshold": {"a": True}, "fallback": "a"}, "router.threshold: expected 'auto', a number from 0 to below 1"),
    ],
)
def test_values_that_are_none(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    """What does not fit the rest once they are left out may be named beside them."""
    assert [problem for problem in refused(tmp_path, **keys) if message in problem]


def test_an_expert_named_base_is_no_fallback(tmp_path: Path) -> None:
    fields = BASIC | {"experts": {"a": "./a", "base": "./b"}, "router": {
        "kind": "linear", "queries": {"a": "x", "base": "y"}, "threshold": 0.5, "fallback": "base"}}  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(fields))
    with pytest.raises(
        RecipeError, match=r"router.fallback: 'base' is the base model here, and an expert has that name; rename"
    ):
        load_recipe(tmp_path / "recipe.yaml")


def test_what_is_wrong_with_one_source_does_not_hide_the_rest(tmp_path: Path) -> None:
    problems = refused(
        tmp_path, {"kind": "linear", "queries": {"a": {"source": "x", "colum": "y"}}, "fallback": "z", "threshold": 0.5}
    )
    assert [problem.split(":")[0] for problem in problems] == ["router.queries.a.colum", "router.queries", "router.fallback"]


def test_queries_are_known_by_their_content(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "other.jsonl").write_text('{"text": "x"}\n')

    def covered(**sets: Any) -> Any:
        return identify_router(loaded(tmp_path, **{"queries.b": "./a.jsonl", "queries.b.limit": 1, **sets}).router).covered

    first = covered()
    assert first["format"] == ROUTER_FORMAT
    assert str(tmp_path) not in json.dumps(first)
    assert covered(**{"queries.a": "./elsewhere/other.jsonl"}) == first
    for changed in (
        {"queries.a.column": "q"},
        {"queries.b.language": "en"},
        {"total": 9},
        {"outside": "./elsewhere/other.jsonl"},
    ):
        assert covered(**changed) != first
    (tmp_path / "a.jsonl").write_text('{"text": "y"}\n')
    assert covered() != first
    assert identify_router(loaded(tmp_path, {"kind": "none"}).router).covered == {"kind": "none", "queries": {}}


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(QueryDataError, match=r"expert a: .*a.jsonl: .*No such file"):
        identify_router(loaded(tmp_path, **{"queries.b": "./a.jsonl", "queries.b.limit": 1}).router)


def test_data_sets_are_pinned_and_asked_for_once(tmp_path: Path, hub: HubServer) -> None:
    (tmp_path / "set").mkdir()
    commit = hub.add_repo("datasets/org/b", tmp_path / "set")
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    router = {**BASIC["router"], "queries": {"a": ["./a.jsonl", {"source": "org/b", "split": "test"}], "b": "org/b"}}
    found = identify_router(loaded(tmp_path, router).router)
    assert [spec.source for spec in found.section.queries["a"]] == [str(tmp_path / "a.jsonl"), f"org/b@{commit}"]
    assert found.covered["queries"]["b"] == [{"dataset": "org/b", "commit": commit, "split": "train"}]
    assert found.covered["queries"]["a"][1] == {"dataset": "org/b", "commit": commit, "split": "test"}
    assert len(hub.asked("GET /api/datasets/org/b/revision/main")) == 1
    assert pinned(found.section) == found.section
    found.check()
    (tmp_path / "a.jsonl").write_text('{"text": "y"}\n')
    with pytest.raises(QueryDataError, match=r"^router.queries.a: the file changed while the run read it"):
        found.check()


def test_an_encoder_is_known_by_its_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / "config.json").write_text("{}")
    (tmp_path / "encoder" / "notes.md").write_text("")
    router = {"kind": "bert", "queries": {"a": "./a.jsonl", "b": {"source": "./a.jsonl", "limit": 1}}, "encoder": "./encoder"}
    found = identify_router(loaded(tmp_path, router).router)
    assert list(found.covered["encoder"]) == ["config.json"]
    assert found.section.encoder == str(tmp_path / "encoder")
    assert found.covered["epochs"] == 1
    found.check()
    (tmp_path / "encoder" / "config.json").write_text("{ }")
    with pytest.raises(CheckpointError, match=r"router.encoder: .*config.json changed while the run read it"):
        found.check()
    with pytest.raises(CheckpointError, match=r"router.encoder: there is no directory"):
        identify_router(loaded(tmp_path, {**router, "encoder": "./none"}).router)


def test_a_link_is_read_as_it_is_named(tmp_path: Path) -> None:
    """As a cache's links lead to files without an end to their names."""
    (tmp_path / "blob").write_text("one\ntwo\n")
    (tmp_path / "a.txt").symlink_to(tmp_path / "blob")
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "blob")
    found = loaded(tmp_path, {"kind": "linear", "queries": {"a": "./a.txt", "b": "./a.jsonl"}}).router
    assert [spec.source for spec in found.queries["a"]] == [str(tmp_path / "a.txt")]
    ((text,), (lines,)) = (identify_router(found).queries.experts[name] for name in ("a", "b"))
    assert text["sha256"] == lines["sha256"]
    assert text != lines


def test_an_encoder_in_the_hubs_cache_goes_by_its_commit_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "a" * 40
    home = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    snapshot = home / "models--org--encoder" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (snapshot / name).write_text("{}")
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}))
    router = {"kind": "bert", "queries": {"a": "./a.jsonl", "b": "./b.jsonl"}, "encoder": f"org/encoder@{commit}"}
    inputs = identify_router(loaded(tmp_path, router).router)
    assert inputs.encoder is not None
    assert inputs.encoder.id == commit
    inputs.check()
