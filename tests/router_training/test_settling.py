"""Quotas and components of groups, against slow accounts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_training.settling import joined, quotas
from tests.support.query_sources import components, shares


@given(st.lists(st.integers(0, 30), min_size=1, max_size=6), st.one_of(st.none(), st.integers(0, 120)))
def test_quotas_are_those_of_handing_out_one_at_a_time(available: list[int], total: int | None) -> None:
    assert quotas(available, total) == shares(available, total)


@pytest.mark.parametrize(
    ("available", "total", "expected"),
    [
        ([100, 100, 100], 50, [17, 17, 16]), ([10, 1, 10], 7, [3, 1, 3]), ([5, 5], 100, [5, 5]), ([5, 9], None, [5, 9]),
        ([0, 9, 9], 6, [0, 3, 3]), ([12_500] * 4, 50_000, [12_500] * 4),
    ],
)  # fmt: skip
def test_quotas(available: list[int], total: int | None, expected: list[int]) -> None:
    assert quotas(available, total) == expected


DIGESTS = st.integers(0, 15).map(lambda number: bytes([number]) * 15 + b"\0")  # a byte that fixed-width strings may lose


@given(st.lists(st.tuples(DIGESTS, DIGESTS), max_size=30), st.integers(1, 4))
def test_components_are_those_of_a_slow_account(links: list[tuple[bytes, bytes]], streams: int) -> None:
    pairs = [np.array(links[start::streams], "S16").reshape(-1, 2) for start in range(streams)]
    found = joined(pairs)
    expected = components(links)
    asked = [bytes([number]) * 15 + b"\0" for number in range(20)]
    roots = found.roots_of(np.array(asked, "S16"))
    assert [bytes(root).ljust(16, b"\0") for root in roots.tolist()] == [expected.get(one, one) for one in asked]
