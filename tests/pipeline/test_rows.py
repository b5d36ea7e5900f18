from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.kernels.forms import members
from pipeline.rows import Kind, RowTable, build_table, first_equal
from storage.local_store import LocalStore

COUNT = 4


@st.composite
def groupings(draw: st.DrawFn) -> dict[str, Any]:
    rows = draw(st.integers(1, 12))
    heights = [draw(st.one_of(st.none(), st.integers(1, rows))) for _ in range(COUNT)]
    heights[draw(st.integers(0, COUNT - 1))] = rows
    content = draw(st.lists(st.integers(0, 2), min_size=rows * COUNT, max_size=rows * COUNT))
    labels = draw(st.lists(st.integers(0, 2), min_size=rows * COUNT, max_size=rows * COUNT))
    digests = np.zeros((COUNT, rows, 16), np.uint8)
    digests[:, :, 3] = np.array(content).reshape(COUNT, rows)
    held = [None if height is None else digests[n, :height] for n, height in enumerate(heights)]
    keep = np.array(draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
    zero = digests[:, :, 3].T == 0  # the base's row is the one of content 0
    return {"rows": rows, "held": held, "labels": np.array(labels).reshape(rows, COUNT), "keep": keep, "zero": zero}


@given(groupings())
def test_every_channel_of_every_expert_has_one_row(case: dict[str, Any]) -> None:
    equal = first_equal(case["held"], case["rows"])
    table = build_table(case["labels"], equal, zero=case["zero"], keep=case["keep"])
    keys = list(zip(table.users.tolist(), table.channel.tolist(), strict=True))
    assert keys == sorted(keys)
    for n, held in enumerate(case["held"]):
        height = 0 if held is None else len(held)
        indices = table.indices(n, height)
        assert (indices >= 0).all()
        assert (table.channel[indices] == np.arange(height)).all()
        uses = {row for row, users in enumerate(table.users.tolist()) if n in members(users)}
        assert uses == set(indices.tolist())


@given(groupings())
def test_rows_are_shared_exactly_by_groups_and_equal_exact_rows(case: dict[str, Any]) -> None:
    """The rule, pair by pair, written as a person would."""
    equal = first_equal(case["held"], case["rows"])
    table = build_table(case["labels"], equal, zero=case["zero"], keep=case["keep"])
    for channel in range(case["rows"]):
        present = [n for n, held in enumerate(case["held"]) if held is not None and channel < len(held)]
        row = {n: int(table.indices(n, len(case["held"][n]))[channel]) for n in present}
        content = {n: case["held"][n][channel].tobytes() for n in present}
        group = {n: [m for m in present if case["labels"][channel, m] == case["labels"][channel, n]] for n in present}
        exact = {n: bool(case["keep"][channel]) and len({content[m] for m in group[n]}) == 1 for n in present}
        for a in present:
            zero_group = all(case["zero"][channel, m] for m in group[a])
            kind = Kind.EXACT if exact[a] else Kind.BASE if zero_group else Kind.MERGED
            assert table.kind[row[a]] == kind
            for b in present:
                by_bits, by_group = content[a] == content[b], b in group[a] and exact[a] == exact[b]
                shared = by_bits if exact[a] and exact[b] else by_group
                assert (row[a] == row[b]) == shared


def test_spans_cover_the_table(tmp_path: Path) -> None:
    table = RowTable(np.array([1, 1, 2, 15], np.uint64), np.array([0, 4, 1, 2], np.int32), np.zeros(4, np.uint8))
    assert table.spans() == [(1, 0, 2), (2, 2, 3), (15, 3, 4)]
    table.save(LocalStore(tmp_path), "t")
    again = RowTable.load(LocalStore(tmp_path), "t")
    assert again.spans() == table.spans()
    assert again.channel.tolist() == [0, 4, 1, 2]


def test_members_of_a_set() -> None:
    assert members(0b1011) == [0, 1, 3]
