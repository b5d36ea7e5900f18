"""Queries from sources to parts: against a slow account of the same, for any blocks and workers."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from distributed import Client, LocalCluster
from hypothesis import given, settings
from hypothesis import strategies as st

from router_training import data, runs
from router_training.data import PART_ROWS, Prepared, Sizes, check, prepare
from router_training.questions import MAX_CHARACTERS, identity
from router_training.runs import read_stream
from router_training.sources import Queries, Source
from router_training.tasks import here, on_dask
from storage.errors import QueryDataError, StoreError
from tests.support.query_sources import (
    accounted,
    both,
    contents,
    example,
    questions,
    section,
    write_lines,
    write_parquet,
)

SMALL = Sizes(block_bytes=300, run_characters=500, partition_bytes=400)


def prepared(folder: Path, queries: Queries, seed: int = 0, **options: Any) -> Prepared:
    shutil.rmtree(folder / "prepared", ignore_errors=True)
    return prepare(queries, seed, folder / "prepared", **{"runner": here, **options})


def test_every_query_is_in_one_part_with_its_expert(tmp_path: Path) -> None:
    found = prepared(tmp_path, section(example(tmp_path, ("a", "b", "c"))))
    parts = both(found)
    texts = {which: {row.text for row in rows} for which, rows in parts.items()}
    assert not texts["train"] & texts["validation"]
    assert texts["train"] | texts["validation"] == {text for name in "abc" for text in questions(name, 120)}
    assert all(row.text.startswith(found.experts[row.label]) for rows in parts.values() for row in rows)
    assert 0.08 < len(texts["validation"]) / 360 < 0.24
    counted = {
        name: {which: sum(row.label == label for row in rows) for which, rows in parts.items()}
        for label, name in enumerate("abc")
    }
    assert found.counts == counted == found.card["counts"]


def test_parts_are_files_of_256_rows_in_one_order(tmp_path: Path) -> None:
    found = prepared(tmp_path, section(example(tmp_path, count=500), outside=example(tmp_path, ("x",), 300)["x"]), sizes=SMALL)
    for which, count in (("train", sum(c["train"] for c in found.counts.values())), ("outside", found.outside)):
        sizes = [pq.read_metadata(path).num_rows for path in found.parts(which)]  # type: ignore[arg-type]
        assert sizes == [PART_ROWS] * (count // PART_ROWS) + [count % PART_ROWS]
    assert [str(kind) for kind in pq.read_schema(found.parts("train")[0]).types] == ["string", "int32", "string"]
    assert sorted(path.name for path in found.folder.iterdir() if path.suffix != ".parquet") == ["prepared.json"]
    assert {row.label for row in found.rows("outside")} == {-1}


ROWS = st.dictionaries(
    st.sampled_from(["a", "b", "c"]),
    st.lists(
        st.tuples(
            st.builds("{} {}".format, st.sampled_from(["One", "one", "two!", "TWO", "drei"]), st.integers(0, 30)),
            st.sampled_from([None, None, "G1", "g1", "G2", "one 1", "two 2"]),
        ),
        max_size=60,
    ),
    min_size=3,
)


@settings(max_examples=40)
@given(rows=ROWS, total=st.sampled_from([None, 4, 15, 70]), seed=st.integers(0, 3), block=st.integers(20, 3000))
def test_parts_are_those_of_a_slow_account(
    rows: dict[str, list[tuple[str, str | None]]],
    total: int | None,
    seed: int,
    block: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("queries")
    sources = {}
    for name, pairs in rows.items():
        full = [*pairs, *((f"{name} fills up {i}", None) for i in range(40))]
        rows[name] = full
        source = write_lines(folder / f"{name}.jsonl", [{"text": text, "of": group} for text, group in full])
        sources[name] = [replace(source, group="of")]
    expected = accounted(rows, total, seed)
    sizes = Sizes(block, max(50, block // 3), block)
    if any(name not in {expert for _, expert in part} for part in expected.values() for name in rows):
        with pytest.raises(QueryDataError, match="queries are left for"):
            prepared(folder, Queries(sources, total=total), seed, sizes=sizes)
        return
    found = prepared(folder, Queries(sources, total=total), seed, sizes=sizes)
    assert {which: [(row.text, found.experts[row.label]) for row in part] for which, part in both(found).items()} == expected


@settings(max_examples=25)
@given(pairs=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=60), seed=st.integers(0, 2))
def test_no_question_and_no_group_is_in_both_parts(
    pairs: list[tuple[int, int]], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever names whatever as its question, also in circles: what is connected stays together."""
    folder = tmp_path_factory.mktemp("queries")
    rows: list[dict[str, Any]] = [{"text": f"Question {text}.", "of": f"question {group}"} for text, group in pairs]
    rows += [{"text": f"filler {i}", "of": None} for i in range(60)]
    sources = {**example(folder, ("b",)), "a": [replace(write_lines(folder / "a.jsonl", rows), group="of")]}
    parts = both(prepared(folder, Queries(sources), seed))
    names = {which: {identity(row.text) for row in found} for which, found in parts.items()}
    connected: dict[str, set[str]] = {}
    for text, group in pairs:
        whole = {f"question {text}", f"question {group}"}
        whole = whole.union(*(connected.get(one, {one}) for one in whole))
        connected |= dict.fromkeys(whole, whole)
    for whole in connected.values():
        assert not (whole & names["train"] and whole & names["validation"])
    assert not names["train"] & names["validation"]


def test_what_is_held_out_stays_so_when_sources_grow(tmp_path: Path) -> None:
    """A new phrasing of a question goes where its question is; nothing else moves, for any seed and order."""
    grouped = [{"text": f"say {i} in other words {j}", "of": f"how many are {i}?"} for i in range(150) for j in range(2)]
    more = [{"text": f"again {i} but otherwise", "of": f"How many are {i}"} for i in range(150)] + [
        {"text": f"entirely new {i}", "of": None} for i in range(50)
    ]
    held: list[set[str]] = []
    for seed, rows in ((0, grouped), (5, [*more, *reversed(grouped)])):
        sources = {**example(tmp_path, ("b",)), "a": [replace(write_lines(tmp_path / "a.jsonl", rows), group="of")]}
        held.append({row.text for row in both(prepared(tmp_path, Queries(sources), seed))["validation"]})
    old = {row["text"] for row in grouped} | set(questions("b", 120))
    assert held[0] == held[1] & old
    numbers = [
        {int(text.split()[1]) for text in found if text.startswith(word)}
        for found, word in zip((held[0], held[1]), ("say", "again"), strict=True)
    ]
    assert numbers[0] == numbers[1]
    assert 10 < len(numbers[0]) < 40


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_the_same_bytes_for_any_workers_and_blocks(tmp_path: Path, workers: int) -> None:
    sources = example(tmp_path, ("a", "b", "c"), 200)
    sources["a"].append(write_parquet(tmp_path / "more.parquet", [{"text": text} for text in questions("A", 90)]))
    queries = section(
        sources, total=250, outside=[write_lines(tmp_path / "out.jsonl.gz", [{"text": f"far {i}"} for i in range(99)])]
    )
    expected = contents(prepared(tmp_path, queries, 7))
    assert len(expected) == 3
    if workers:
        options = {"n_workers": workers, "threads_per_worker": 1, "dashboard_address": "127.0.0.1:0", "silence_logs": 50}
        with LocalCluster(**options) as cluster, Client(cluster):
            found = [prepared(tmp_path, queries, 7, runner=on_dask, sizes=sizes) for sizes in (None, SMALL)]
            assert contents(found[1]) == expected
    else:
        for block in (64, 1000, 10**6):
            assert contents(prepared(tmp_path, queries, 7, runner=on_dask, sizes=Sizes(block, block, block))) == expected


def test_workers_that_do_not_see_the_files_are_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queries = section(example(tmp_path))
    expected = contents(prepared(tmp_path, queries))
    monkeypatch.setattr("router_training.tasks.sees", lambda _: False)
    asked: list[int] = []

    def read(*call: Any) -> Any:
        asked.append(os.getpid())
        return read_stream(*call)

    monkeypatch.setattr(data, "read_stream", read)
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0", silence_logs=50) as cluster,
        Client(cluster),
    ):
        assert contents(prepared(tmp_path, queries, runner=on_dask)) == expected
    assert set(asked) == {os.getpid()}


def test_order_of_lines_files_and_experts_does_not_matter(tmp_path: Path) -> None:
    sources = example(tmp_path, ("a", "b"), 150)
    sources["a"].append(write_lines(tmp_path / "second.jsonl", [{"text": text.upper()} for text in questions("a", 50)]))
    expected = prepared(tmp_path, section(sources, total=200), 1)
    before = contents(expected)
    for found in sources.values():
        for source in found:
            lines = Path(source.source).read_text().splitlines()
            random.Random(0).shuffle(lines)
            Path(source.source).write_text("\n".join(lines))
    turned = {name: list(reversed(found)) for name, found in reversed(sources.items())}
    assert contents(prepared(tmp_path, section(turned, total=200), 1)) == before


def test_the_seed_decides_sample_and_order_and_not_what_is_held_out(tmp_path: Path) -> None:
    sources = example(tmp_path, ("a", "b"), 300)
    first, second = (both(prepared(tmp_path, section(sources, total=300), seed)) for seed in (0, 1))
    samples = [{row.text for rows in found.values() for row in rows} for found in (first, second)]
    assert 100 < len(samples[0] & samples[1]) < 200
    held = [{row.text for row in found["validation"]} for found in (first, second)]
    assert held[0] & samples[1] == held[1] & samples[0]
    everything = [both(prepared(tmp_path, section(sources), seed))["train"] for seed in (0, 1)]
    assert set(everything[0]) == set(everything[1])
    assert everything[0] != everything[1]
    labels = [row.label for row in everything[0]]
    assert sum(one != other for one, other in pairwise(labels)) > 100  # mixed


def test_repeats_go_and_what_stands_under_several_experts_too(tmp_path: Path) -> None:
    rows = {
        "a": ["Say  it!", "say it", "shared by both", *questions("a", 90), *questions("a", 10)],
        "b": ["SHARED by “both”", *questions("b", 90)],
        "x": ["say it?", "far away", "far away", "shared by both"],
    }
    sources = {
        name: [write_lines(tmp_path / f"{name}.jsonl", [{"text": text} for text in texts])] for name, texts in rows.items()
    }
    outside = sources.pop("x")
    found = prepared(tmp_path, section(sources, outside=outside))
    kept = [row.text for rows in both(found).values() for row in rows]
    assert len(kept) == 181
    assert "Say  it!" in kept
    assert not [text for text in kept if "both" in text]
    assert [row.text for row in found.rows("outside")] == ["far away"]
    numbers = {"unreadable": 0, "cut": 0}
    (a,), (b,), (x,) = (found.card["sources"]["a"], found.card["sources"]["b"], found.card["outside"])
    assert {**a, **numbers, "rows": 103, "repeated": 11, "shared": 1, "distinct": 91} == a
    assert {**b, **numbers, "rows": 91, "repeated": 0, "shared": 1, "distinct": 90} == b
    assert {**x, **numbers, "rows": 4, "repeated": 1, "shared": 2, "distinct": 1} == x
    assert found.card["split"]["ambiguous"] == 1


def test_samples_are_balanced_and_what_one_lacks_others_give(tmp_path: Path) -> None:
    sources = {name: example(tmp_path, (name,), count)[name] for name, count in (("a", 60), ("b", 400), ("c", 300))}
    far = example(tmp_path, ("x",), 500)["x"]
    found = prepared(tmp_path, section(sources, total=400, outside=far))
    assert {name: sum(counts.values()) for name, counts in found.counts.items()} == {"a": 60, "b": 170, "c": 170}
    assert found.outside == 134
    assert found.card["sampling"] == {"seed": 0, "total": 400, "available": {"a": 60, "b": 400, "c": 300}}
    everything = prepared(tmp_path, section(sources, total=None, outside=far))
    assert {name: sum(counts.values()) for name, counts in everything.counts.items()} == {"a": 60, "b": 400, "c": 300}
    assert everything.outside == 500


def test_the_card_says_nothing_of_places_and_times(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other" / "deeper"
    cards = []
    for folder in (one, other):
        folder.mkdir(parents=True)
        cards.append(prepared(folder, section(example(folder))).card)
    assert cards[0] == cards[1]
    assert str(tmp_path) not in json.dumps(cards)


def test_what_is_prepared_is_taken_up_and_what_is_half_done_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queries, folder = section(example(tmp_path)), tmp_path / "prepared"
    first = prepare(queries, 0, folder, here)
    expected = contents(first)
    monkeypatch.setattr(data, "read_stream", None)
    assert prepare(queries, 0, folder, here) == first
    monkeypatch.undo()
    assert contents(prepare(replace(queries, total=100), 0, folder, here)) != expected
    (folder / "prepared.json").unlink()
    (folder / "train-000099.parquet").touch()
    (folder / "spill").mkdir()
    assert contents(prepare(queries, 0, folder, here)) == expected
    path = Path(queries.queries["a"][0].source)
    path.write_text(path.read_text() + '{"text": "one more"}\n')
    assert contents(prepare(queries, 0, folder, here)) != expected


def test_a_file_that_changes_while_it_is_read_stops_the_preparation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queries = section(example(tmp_path))
    path = Path(queries.queries["b"][0].source)

    def edit(*call: Any) -> Any:
        path.write_text(path.read_text() + '{"text": "one more"}\n')
        return read_stream(*call)

    monkeypatch.setattr(data, "read_stream", edit)
    with pytest.raises(QueryDataError, match=r"router.queries.b: the file changed while the run read it"):
        prepared(tmp_path, queries)
    assert not (tmp_path / "prepared" / "prepared.json").exists()


# what is refused


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"expert a: .*a.jsonl holds no queries"),
        (b"\n\n \n", r"expert a: .*a.jsonl holds no queries"),
        (b'{"text": ""}\n', r"a.jsonl line 1: expected .*'text' is empty"),
        (b'{"question": "x"}\n', r"a.jsonl line 1: expected \{\"text\": \"…\"\}, got .*'text' is missing"),
        (b"[1]\n", r"a.jsonl line 1: expected .*no JSON object"),
        (b'{"text": "\xff"}\n', r"a.jsonl line 1: expected UTF-8, got .*invalid start byte"),
        (b'{"text": "\\ud800"}\n', r"a.jsonl line 1: .*half of a surrogate pair"),
        (b'{"text": 5}\n', r"a.jsonl line 1: .*'text' is no string"),
        (b"[" * 100_000, r"a.jsonl line 1: expected .*recursion"),
        (b'{"text": "only one"}\n', r"no (training|validation) queries are left for a after .* Give at least 50"),
    ],
)
def test_queries_that_cannot_train_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    queries = section(example(tmp_path))
    (tmp_path / "a.jsonl").write_bytes(content)
    for attempt in (lambda: prepared(tmp_path, queries), lambda: check(queries)):
        with pytest.raises(QueryDataError, match=message):
            attempt()


def test_all_sources_are_judged_at_once(tmp_path: Path) -> None:
    queries = section(example(tmp_path, ("a", "b", "c", "d")), outside=[Source(str(tmp_path / "far.jsonl"))])
    (tmp_path / "a.jsonl").write_text("")
    (tmp_path / "b.jsonl").write_text("nonsense\n")
    (tmp_path / "c.jsonl").unlink()
    with pytest.raises(QueryDataError) as caught:
        check(queries)
    starts = ["expert a: ", "expert b: ", "expert c: ", "outside: "]
    assert [problem[: len(start)] for problem, start in zip(caught.value.problems, starts, strict=True)] == starts
    with pytest.raises(QueryDataError, match=r"2 problems\n  - expert c: .*c.jsonl.*No such file.*\n  - outside: .*far.jsonl"):
        prepared(tmp_path, queries)


def test_one_domain_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(QueryDataError, match=r"expected those of at least two experts to tell apart, got a"):
        prepared(tmp_path, section(example(tmp_path, ("a",))))
    with pytest.raises(QueryDataError, match=r"expert b: no source of queries"):
        prepared(tmp_path, section({**example(tmp_path, ("a",)), "b": []}))


def test_bad_rows_are_counted_up_to_a_share(tmp_path: Path) -> None:
    queries = section(example(tmp_path), bad_share=0.1)
    path = tmp_path / "a.jsonl"
    path.write_text(
        "".join(line + ("\n\nnot json\n" if i % 12 == 0 else "\n") for i, line in enumerate(path.read_text().splitlines()))
    )
    found = prepared(tmp_path, queries, sizes=SMALL)
    assert (found.card["sources"]["a"][0]["rows"], found.card["sources"]["a"][0]["unreadable"]) == (130, 10)
    with pytest.raises(QueryDataError) as caught:
        prepared(tmp_path, replace(queries, bad_share=0.05), sizes=SMALL)
    numbers = [int(problem.split("line ")[1].split(":")[0]) for problem in caught.value.problems]
    assert numbers == [i + 1 for i, line in enumerate(path.read_text().splitlines()) if line == "not json"]


def test_many_bad_lines_are_counted_not_all_printed(tmp_path: Path) -> None:
    queries = section(example(tmp_path))
    (tmp_path / "a.jsonl").write_text("nonsense\n" * 100)
    for sizes in (None, SMALL):
        with pytest.raises(QueryDataError, match=r"… and 80 more lines of .*a.jsonl; a share of 0.01 may be bad") as caught:
            prepared(tmp_path, queries, sizes=sizes)
        assert len(caught.value.problems) == 21
        assert "a.jsonl line 20: expected" in caught.value.problems[19]


def test_a_long_text_is_cut_and_equals_what_begins_like_it(tmp_path: Path) -> None:
    sources = example(tmp_path)
    long = "long question " * 800_000
    rows = [{"text": long}, {"text": long[:MAX_CHARACTERS] + "another end"}]
    sources["a"].append(write_lines(tmp_path / "long.jsonl", rows))
    found = prepared(tmp_path, section(sources))
    kept = [row.text for part in both(found).values() for row in part if row.text.startswith("long")]
    assert kept == [long[:MAX_CHARACTERS]]
    assert {**found.card["sources"]["a"][1], "rows": 2, "cut": 2, "repeated": 1, "distinct": 1} == found.card["sources"]["a"][1]


def test_languages_are_the_sources_or_guessed_by_script(tmp_path: Path) -> None:
    sources = example(tmp_path)
    sources["a"].append(
        replace(write_lines(tmp_path / "de.jsonl", [{"text": f"Was ist {i} mal 7?"} for i in range(30)]), language="de")
    )
    sources["a"].append(write_lines(tmp_path / "zh.jsonl", [{"text": f"第{i}章讲的是什么"} for i in range(30)]))
    rows = [row for part in both(prepared(tmp_path, section(sources))).values() for row in part]
    assert {row.language for row in rows if row.text.startswith("Was")} == {"de"}
    assert {row.language for row in rows if row.text.startswith("第")} == {"script:Han"}
    assert {row.language for row in rows if " asks " in row.text} == {"script:Latin"}


def test_a_check_leaves_nothing_and_needs_no_dask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queries = section(example(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setitem(__import__("sys").modules, "dask", None)
    check(queries)
    assert list((tmp_path / "tmp").iterdir()) == []


def test_what_was_found_fit_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queries, reads = section(example(tmp_path)), []

    def read(*call: Any) -> Any:
        reads.append(call)
        return read_stream(*call)

    monkeypatch.setattr(data, "read_stream", read)
    for asked in (queries, queries, replace(queries, total=90), queries):
        check(asked)
    assert len(reads) == 4  # two sources, twice
    path = tmp_path / "a.jsonl"
    content = path.read_text()
    path.write_text("no json\n")
    for _ in range(2):  # what was not found fit is read again
        with pytest.raises(QueryDataError, match=r"a.jsonl line 1"):
            check(queries)
    path.write_text(content)
    check(queries)
    assert len(reads) == 8


def test_a_disk_that_is_full_is_no_fault_of_the_queries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(runs, "_write_run", full)
    with pytest.raises(StoreError, match=r"No space left on device. Free space there and run again"):
        prepared(tmp_path, section(example(tmp_path)))


def test_a_source_of_bad_rows_alone_is_refused_whatever_share_may_be_bad(tmp_path: Path) -> None:
    queries = section(example(tmp_path), bad_share=1)
    Path(queries.queries["a"][0].source).write_text("nonsense\n" * 30)
    with pytest.raises(QueryDataError, match="line 1: "):
        prepared(tmp_path, queries)


def test_prepared_folders_that_lost_a_part_are_prepared_anew(tmp_path: Path) -> None:
    queries = section(example(tmp_path))
    folder = tmp_path / "prepared"
    expected = contents(prepare(queries, 7, folder, here))
    for damage in (Path.unlink, lambda path: path.write_bytes(b"PAR1")):
        damage(next(folder.glob("validation-*.parquet")))
        assert contents(prepare(queries, 7, folder, here)) == expected
