from __future__ import annotations

import pickle

import pytest

from storage import errors
from storage.errors import ChannelMergingError


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
