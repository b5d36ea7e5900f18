from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipeline.recipe import load_recipe, parse_assignment, parse_bytes, rule_for
from storage.errors import RecipeError

MINIMAL = """
name: tiny
base: ./base
experts:
  b: ./b
  a: {source: ../a, weight: 2}
output: ./out
"""
SETTINGS = ["merge.groups=1", "merge.scaling=0.5", "experts.c=./c", "cluster.kind=none"]
ROOT = Path(__file__).parent.parent.parent


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_defaults_are_filled_and_paths_are_absolute(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, MINIMAL))
    assert recipe.expert_names == ("a", "b")
    assert recipe.base == str(tmp_path / "base")
    assert recipe.experts["a"].source == str(tmp_path.parent / "a")
    assert recipe.experts["a"].weight == 2.0
    assert recipe.output == str(tmp_path / "out")
    assert recipe.deltas == str(tmp_path / "deltas")
    assert (recipe.merge.groups, recipe.merge.method, recipe.merge.scaling, recipe.merge.density) == (2, "dare", "mean", 0.7)
    assert recipe.merge.singleton == "keep"
    assert recipe.cluster.where == "local"
    assert recipe.cluster.memory == 2 * 1024**3


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("merge: {goups: 3}", "merge.goups: unknown key; did you mean 'groups'?"),
        ("clutser: {kind: none}", "clutser: unknown key; did you mean 'cluster'?"),
        ("merge: {rules: [{match: x, polcy: base}]}", "merge.rules.0.polcy: unknown key; did you mean 'policy'?"),
        ("router: {kind: linear, zzz: 1}", "router.zzz: unknown key; known keys: kind, queries, outside, total"),
        ("merge: {groups: 3}", "merge.groups: expected at most 2, the number of experts, got 3"),
        ("merge: {groups: 0}", "merge.groups: expected 'auto' or a whole number from 1 on (got 0)"),
        ("merge: {groups: two}", "merge.groups: expected 'auto' or a whole number from 1 on (got 'two')"),
        ("merge: {density: 1.5}", "merge.density: Input should be less than or equal to 1 (got 1.5)"),
        (
            "merge: {method: dare-ties}",
            "merge.method: Input should be 'average', 'task_arithmetic', 'ties', 'dare', 'dare_ties', 'slerp' or 'byom' (got",
        ),
        ("merge: {scaling: half}", "merge.scaling: expected 'mean' or a number above 0 (got 'half')"),
        ("merge: {scaling: -1}", "merge.scaling: expected 'mean' or a number above 0 (got -1)"),
        ("merge: {rules: [{match: x, groups: 9}]}", "merge.rules.0.groups: expected at most 2"),
        ("cluster: {memory: 2iB}", "cluster.memory: expected a size such as 2GiB, got '2iB'"),
        ("cluster: {memory: lots}", "cluster.memory: expected a size such as 2GiB, got 'lots'"),
        ("cluster: {kind: local, address: 'tcp://x:1'}", "cluster: expected kind or address, got both"),
        ("router: {kind: linear}", "router.queries: no queries for expert 'a'"),
        ("router: {queries: {c: x}}", "router.queries.c: there is no expert of that name; experts: a, b"),
        ("deltas: ftp://bucket/x", "deltas: it can be a folder or a URL of s3, gs or az, got the scheme 'ftp'; correct it"),
        ("merge: {method: byom}", "merge.groups: byom keeps entries beside one merged model: expected 1, got 2"),
        (
            "merge: {method: byom, groups: auto}",
            "merge.groups: byom keeps entries beside one merged model: expected 1, got auto",
        ),
        ("merge: {method: byom, groups: 1, rules: [{match: x, groups: 2}]}", "merge.rules.0.groups: byom keeps entries"),
        (
            "merge: {method: slerp, groups: auto}",
            "merge.groups: slerp merges pairs: with 2 experts expected at least 1, got auto",
        ),
        ("merge: {method: slerp}", "experts.a.weight: slerp goes by merge.t"),
        (
            "merge: {method: slerp, scaling: 0.5}",
            "merge.scaling: slerp has no lambda; leave scaling and combine out or use task_arithmetic",
        ),
        (
            "merge: {method: average, scaling: 1}",
            "merge.scaling: average has no lambda; leave scaling and combine out or use task_arithmetic",
        ),
        ("merge: {method: average, combine: mean}", "merge.scaling: average has no lambda"),
        ("merge: {combine: sum}", "merge.combine: scaling: mean is no sum; set scaling to a number, or combine to mean"),
        (
            "merge: {clustering: sign, sign: mass, groups: auto}",
            "merge.groups: the sign of a sum makes two groups: expected 2, got auto",
        ),
        ("merge: {budget: 0.6}", "merge.budget: it is spent by groups: auto; set that, or leave the budget out"),
        ("merge: {groups: auto, budget: 0.4}", "merge.budget: one row per channel is 1/2 of 2 experts; got 0.4"),
        ("merge: {groups: auto, budget: 1.5}", "merge.budget: Input should be less than or equal to 1 (got 1.5)"),
        (
            "merge: {metric: manhattan, clustering: sign}",
            "merge.metric: sign clustering knows cosine and euclidean, got manhattan",
        ),
        (
            "merge: {metric: manhattan, clustering: spherical}",
            "merge.metric: spherical clustering knows cosine and euclidean, got manhattan",
        ),
        ("merge: {keep: 0}", "merge.keep: Input should be greater than 0 (got 0)"),
        ("merge: {t: 1.1}", "merge.t: Input should be less than or equal to 1 (got 1.1)"),
        ("merge: {trim_scope: layer}", "merge.trim_scope: Input should be 'row', 'tensor' or 'model' (got 'layer')"),
        ("merge: {rescale: l2}", "merge.rescale: Input should be 'density' or 'l1' (got 'l2')"),
        ("merge: {residual: base}", "merge.residual: Input should be 'merged' or 'delta' (got 'base')"),
        ("merge: {combine: max}", "merge.combine: Input should be 'sum' or 'mean' (got 'max')"),
        ("merge: {sign: sum}", "merge.sign: Input should be 'vector' or 'mass' (got 'sum')"),
    ],
)
def test_problems_name_key_and_remedy(tmp_path: Path, extra: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(written(tmp_path, MINIMAL + extra))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("experts: {math: {source: tiny/math, revision: ''}}", "experts.math.revision: empty revision; name a branch"),
        ("experts: {math: {source: tiny/math, revision: ' '}}", "experts.math.revision: empty revision"),
        (
            "experts: {math: tiny/math@}",
            "experts.math: empty revision; write tiny/math@ with a branch, tag or commit, or tiny/math",
        ),
        ("experts: {math: s3://}", "experts.math: no bucket; expected s3://bucket/prefix"),
        ("experts: {math: ''}", "experts.math: empty source; expected a Hub id, a folder or a URL"),
        ("experts: {math: null}", "experts.math: expected a source (a Hub id, a folder or a URL) (got None)"),
        ("experts: {math: 5}", "experts.math: expected a source (a Hub id, a folder or a URL) (got 5)"),
        ("experts: {math: {source: 5}}", "experts.math.source: expected a source (a Hub id, a folder or a URL) (got 5)"),
        ("base: ''", "base: empty source; expected a Hub id, a folder or a URL"),
        ("base: 5", "base: expected a source (a Hub id, a folder or a URL) (got 5)"),
        ("base: hf://org/name@main", "got the scheme 'hf'; write a model on the Hub as org/name@main"),
        (
            "experts: {math: {source: 's3://b/x', revision: main}}",
            "experts.math.revision: only sources on the Hub have revisions",
        ),
        ("experts: {math: {source: a/b@c, revision: main}}", "experts.math.revision: a/b@c names a revision already; keep one"),
        ("deltas: ''", "deltas: empty; correct it"),
        ("output: FILE://host/x", "output: a file URL of another host; expected file:///folder"),
        (
            "router: {queries: {b: 's3://b/x'}}",
            "router.queries.b: queries are data sets on the Hub or files of this machine, got the scheme 's3'; give a data set",
        ),
        ("router: {queries: {b: ''}}", "router.queries.b: empty; give a data set on the Hub or a file"),
    ],
)
def test_how_places_are_written(tmp_path: Path, extra: str, message: str) -> None:
    fields = yaml.safe_load(MINIMAL) | yaml.safe_load(extra)
    with pytest.raises(RecipeError) as caught:
        load_recipe(written(tmp_path, yaml.safe_dump(fields | {"merge": {"groups": 1}})))
    (problem,) = caught.value.problems
    assert message in problem


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"deltas": "s3://"}, "deltas: no bucket; expected s3://bucket/prefix"),
        (
            {"output": "gs://b/x?y=1"},
            "output: a URL is a bucket and a prefix; credentials and options come from the environment",
        ),
        ({"deltas": "s3://b/x", "output": "S3://b/x/"}, "deltas: the delta store would be written into the output, s3://b/x;"),
        ({"base": "s3://b/m", "output": "s3://b/m/out"}, "output: the output would be written into the prefix of base; choose"),
        (
            {"experts.a": "az://c/a", "deltas": "az://c/a"},
            "deltas: the delta store would be written into the prefix of experts.a",
        ),
    ],
)
def test_urls_that_cannot_be_written_to_are_refused(tmp_path: Path, places: dict[str, str], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(written(tmp_path, MINIMAL), places)
    assert message in str(caught.value)


def test_urls_of_stores_are_kept_without_their_last_slash(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, MINIMAL), {"deltas": "S3://b/d/", "output": "abfss://c@h/x/y//"})
    assert (recipe.deltas, recipe.output) == ("s3://b/d", "abfss://c@h/x/y")


@pytest.mark.parametrize("key", ["base", "experts.a", "deltas", "output", "router.queries.a"])
@pytest.mark.parametrize(
    "place",
    [
        "https://user:SECRET@h/x", "https://SECRET@huggingface.co/org/name", "https://h/x?token=SECRET", "s3://AK:SECRET@b/x",
        "S3://SECRET@b/x", "s3://b/x?key=SECRET", "az://b/x#SECRET", "abfss://c:SECRET@h/x", "file://user:SECRET@h/x",
        "SECRET@x://y",
    ],
)  # fmt: skip
def test_what_a_url_may_hide_is_not_repeated(tmp_path: Path, key: str, place: str) -> None:
    with pytest.raises(RecipeError, match=key) as caught:
        load_recipe(written(tmp_path, MINIMAL), {key: place})
    assert "SECRET" not in str(caught.value).upper()
    assert "AK" not in str(caught.value)


def test_file_urls_are_paths(tmp_path: Path) -> None:
    url = f"FILE://localhost{tmp_path}/a%20b"
    recipe = load_recipe(written(tmp_path, MINIMAL), {"base": url, "deltas": f"{url}/../d", "router.queries.a": f"{url}/q"})
    assert recipe.base == str(tmp_path / "a b")
    assert recipe.deltas == str(tmp_path / "d")
    assert [spec.source for spec in recipe.router.queries["a"]] == [str(tmp_path / "a b" / "q")]


@pytest.mark.parametrize("key", ["deltas", "output"])
@pytest.mark.parametrize("place", ["base", "../a", "b/inside/of/it", "link", "link/x", "file://{}/base"])
def test_nothing_is_written_into_a_sources_folder(tmp_path: Path, key: str, place: str) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "b")
    with pytest.raises(RecipeError, match=rf"{key}: the .* would be written into the folder of .*; choose another folder"):
        load_recipe(written(tmp_path, MINIMAL), {key: place.format(tmp_path)})


@pytest.mark.parametrize("key", ["deltas", "output"])
@pytest.mark.parametrize("name", ["config.json", "model-00001-of-00002.safetensors"])
def test_nothing_is_written_into_a_checkpoint(tmp_path: Path, key: str, name: str) -> None:
    (tmp_path / "model" / "deltas").mkdir(parents=True)
    (tmp_path / "model" / name).touch()
    with pytest.raises(RecipeError, match=rf"{key}: the .* would be written into .*/model, which holds a checkpoint; choose"):
        load_recipe(written(tmp_path, MINIMAL), {key: "model"})
    load_recipe(written(tmp_path, MINIMAL), {key: "model/deltas"})


def test_deltas_and_output_have_folders_of_their_own(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"deltas: the delta store would be written into the output, .*/out; choose another"):
        load_recipe(written(tmp_path, MINIMAL), {"deltas": "x/../out/"})
    load_recipe(written(tmp_path, MINIMAL), {"deltas": "baseline", "output": "base-merged"})


def test_wrong_keys_do_not_hide_what_does_not_fit_together(tmp_path: Path) -> None:
    text = MINIMAL + "merge: {goups: 3, groups: 9, density: 7}\nrouter: {kind: linear, queries: {c: x}}\n"
    with pytest.raises(RecipeError) as caught:
        load_recipe(written(tmp_path, text))
    keys = [problem.split(":")[0] for problem in caught.value.problems]
    assert keys == ["merge.density", "merge.goups", "merge.groups", "router.queries", "router.queries", "router.queries.c"]


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    text = "name: 'a/b'\nexperts: {x: {sorce: y}}\nmerge: {goups: 2, density: 0}\nrouter: {kind: forest}\n"
    with pytest.raises(RecipeError) as caught:
        load_recipe(written(tmp_path, text))
    keys = [problem.split(":")[0] for problem in caught.value.problems]
    assert sorted(keys) == [
        "base", "experts.x.sorce", "experts.x.source", "merge.density", "merge.goups", "name", "output", "router.kind",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a list", "expected a mapping"),
        ("a: [", "cannot be read"),
        ("? [a]\n: b", "cannot be read"),
        (MINIMAL + "name: again\n", "the key 'name' is given twice, again at line 8"),
        ("", "expected a mapping"),
    ],
)
def test_files_that_are_no_recipes(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(written(tmp_path, text))


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"recipe .*nothing.yaml: cannot be read: .*No such file"):
        load_recipe(tmp_path / "nothing.yaml")


def test_settings_override_keys(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, MINIMAL), dict(map(parse_assignment, SETTINGS)))
    assert (recipe.merge.groups, recipe.merge.scaling) == (1, 0.5)
    assert recipe.expert_names == ("a", "b", "c")
    with pytest.raises(RecipeError, match=r"--set nonsense: expected KEY=VALUE"):
        parse_assignment("nonsense")
    with pytest.raises(RecipeError, match=r"--set a=\[: the value '\[' is no YAML"):
        parse_assignment("a=[")
    with pytest.raises(RecipeError, match=r"did you mean 'groups'"):
        load_recipe(written(tmp_path, MINIMAL), {"merge.group": 1})
    with pytest.raises(RecipeError, match=r"name is no section of the recipe"):
        load_recipe(written(tmp_path, MINIMAL), {"name.x": 1})
    assert load_recipe(written(tmp_path, MINIMAL), {"output": "/tmp/a: b #2"}).output == "/tmp/a: b #2"


def test_first_matching_rule_wins(tmp_path: Path) -> None:
    rules = "merge: {rules: [{match: '*layers.0.*', groups: 1}, {match: '*.q_proj.*', policy: private}]}"
    merge = load_recipe(written(tmp_path, MINIMAL + rules)).merge
    first, second = rule_for(merge, "model.layers.0.q_proj.weight"), rule_for(merge, "model.layers.1.q_proj.weight")
    assert first is not None
    assert (first.groups, first.policy) == (1, None)
    assert second is not None
    assert (second.groups, second.policy) == (None, "private")
    assert rule_for(merge, "model.norm.weight") is None


@pytest.mark.parametrize(("text", "size"), [("2GiB", 2**31), ("500 MB", 5 * 10**8), (64, 64), ("1.5KiB", 1536), ("7b", 7)])
def test_sizes(text: object, size: int) -> None:
    assert parse_bytes(text) == size


@given(st.text(max_size=8))
def test_sizes_are_numbers_or_refused(text: str) -> None:
    try:
        assert parse_bytes(text) >= 0
    except ValueError as error:
        assert "expected a size such as 2GiB" in str(error)  # noqa: PT017 - either outcome is right


def test_every_recipe_of_the_project_is_valid() -> None:
    found = [
        p for p in ROOT.rglob("*.yaml") if ".venv" not in p.parts and "name:" in p.read_text() and "experts:" in p.read_text()
    ]
    assert found
    for path in found:
        load_recipe(path)
