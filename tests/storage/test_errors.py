from __future__ import annotations

import pickle

import pytest

from storage import errors
from storage.errors import ChannelMergingError, PlanError, RecipeError, SourceError, StoreError, together


def all_errors() -> list[type[ChannelMergingError]]:
    return [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, ChannelMergingError)]


def test_the_tree_is_whole() -> None:
    assert len(all_errors()) >= 9


@pytest.mark.parametrize("kind", all_errors())
def test_errors_travel_between_processes(kind: type[ChannelMergingError]) -> None:
    error = kind.listing("headline", ["one", "two"])
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert str(again) == str(error) == "headline: 2 problems\n  - one\n  - two"
    assert again.problems == ("one", "two")
    assert again.exit_code in (2, 3)


def test_one_problem_is_one_line() -> None:
    assert str(ChannelMergingError.listing("headline", ["one"])) == "headline: one"


def test_several_errors_become_one_that_says_whose_fault_it_is() -> None:
    one, two = PlanError.listing("strangers", ["a"]), PlanError.listing("strangers", ["b", "a"])
    assert together([one]) is one
    assert str(together([one, PlanError.listing("strangers", ["a"])])) == str(one)
    assert str(together([one, two])) == "strangers: 2 problems\n  - a\n  - b"
    silent = together([StoreError("no answer"), SourceError("no hub")])
    assert (type(silent), silent.exit_code, silent.problems) == (StoreError, 3, ("no answer", "no hub"))
    mixed = together([StoreError("no answer"), RecipeError.listing("recipe", ["groups"])])
    assert (type(mixed), mixed.exit_code, mixed.problems) == (PlanError, 2, ("no answer", "groups"))
