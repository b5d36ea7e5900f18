from __future__ import annotations

from functools import partial
from itertools import product

import pytest

from flows import sweeping
from flows.sweeping import candidates, readable
from pipeline.recipe import load_recipe
from storage.errors import RecipeError
from tests.support.running import merged
from tests.support.tiny_experts import Family


def test_every_combination_once_and_a_density_only_where_it_prunes(family: Family) -> None:
    recipe = load_recipe(family.recipe())
    asked = ([1, 2], ["task_arithmetic", "dare", "ties"], [0.5, 0.7])
    found = candidates(recipe, *asked)
    expected = {(k, method, density if method in ("dare", "ties") else None) for k, method, density in product(*asked)}
    settings = [(c.settings["merge.groups"], c.settings["merge.method"], c.settings.get("merge.density")) for c in found]
    assert len(settings) == len(expected) == 10
    assert set(settings) == expected
    assert len({c.label for c in found}) == len(found)
    assert found[1].label == "k1-dare-0.5"


def test_what_is_not_given_is_the_recipes(family: Family) -> None:
    recipe = load_recipe(family.recipe(**{"merge.groups": 3, "merge.method": "ties", "merge.density": 0.4}))
    (only,) = candidates(recipe, None, None, None)
    assert only.settings == {"merge.groups": 3, "merge.method": "ties", "merge.density": 0.4}


def test_one_error_for_all_that_cannot_be_run(family: Family) -> None:
    path = family.recipe()
    several = candidates(load_recipe(path), [1, 9], ["dare", "foo"], None)
    with pytest.raises(RecipeError, match="the sweep cannot be run: 4 problems") as caught:
        readable((one.label, partial(load_recipe, path, one.settings)) for one in several)
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["k1-foo", "k9-dare-0.7", "k9-foo", "k9-foo"]


def test_a_row_says_what_the_manifest_says(family: Family) -> None:
    outcome = merged(family.recipe(**{"merge.groups": 2, "merge.method": "task_arithmetic"}))
    row = dict(zip(sweeping.HEADINGS, sweeping.row("k2", outcome), strict=True))
    errors = [expert.reconstruction_error for expert in outcome.manifest.experts.values()]
    assert None not in errors
    assert row["error, mean"] == pytest.approx(sum(e for e in errors if e is not None) / 4, abs=5e-5)
    assert row["density"] == "-"
    assert row["share of parameters"] == pytest.approx(outcome.manifest.parameters.ratio, abs=5e-5)
    assert (row["version"], row["new"]) == (outcome.version, True)
