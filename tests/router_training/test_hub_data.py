"""Data sets on a Hub on loopback, streamed with ``datasets`` itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from router_training.data import Prepared, check, prepare
from router_training.opening import CHECKED_ROWS
from router_training.sources import Queries, Source
from router_training.tasks import here
from storage.errors import ChannelMergingError, QueryDataError, SourceError
from storage.hub_datasets import open_dataset
from tests.support.dataset_hub import TOKEN
from tests.support.hub_server import HubServer
from tests.support.query_sources import both, example, questions

NAME = "org/questions"


def lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def published(hub: HubServer, folder: Path, **options: Any) -> Source:
    """A folder's data set at the commit of its main branch."""
    hub.add_repo(f"datasets/{NAME}", folder, **options)
    return Source(open_dataset("expert a", NAME, None).place)


def prepared(folder: Path, source: Source, **options: Any) -> Prepared:
    return prepare(Queries({"a": [source], **example(folder, ("b",))}, **options), 0, folder / "prepared", here)


def texts_of(found: Prepared) -> set[str]:
    return {row.text for rows in both(found).values() for row in rows if row.label == 0}


def test_json_lines_by_column(hub: HubServer, tmp_path: Path) -> None:
    texts = questions("a", 2500)
    lines(tmp_path / "set" / "train.jsonl", [{"query": text, "answer": "x"} for text in texts])
    source = replace(published(hub, tmp_path / "set"), column="query")
    found = prepared(tmp_path, source)
    assert texts_of(found) == set(texts)
    (card,) = found.card["sources"]["a"]
    assert (card["dataset"], card["commit"], card["split"], card["rows"]) == (NAME, source.source.split("@")[1], "train", 2500)
    assert not list((tmp_path / "home" / "datasets").rglob("*.arrow"))  # streamed, not stored


@pytest.mark.parametrize("shards", [1, 3, 11])
def test_parquet_shards_of_a_split(hub: HubServer, tmp_path: Path, shards: int) -> None:
    texts = questions("a", 330)
    data = tmp_path / "set" / "data"
    data.mkdir(parents=True)
    for split, rows in (("train", texts), ("test", questions("other", 90))):
        for shard in range(shards):
            table = pa.table(
                {
                    "messages": [[{"role": "user", "content": text}] for text in rows[shard::shards]],
                    "other": list(range(len(rows[shard::shards]))),
                }
            )
            pq.write_table(table, data / f"{split}-{shard:05}-of-{shards:05}.parquet", row_group_size=20)
    source = replace(published(hub, tmp_path / "set"), messages="messages")
    found = prepared(tmp_path, source)
    assert texts_of(found) == set(texts)
    assert found.card["sources"]["a"][0]["rows"] == 330  # every shard once
    assert texts_of(prepared(tmp_path, replace(source, split="test"))) == set(questions("other", 90))


def test_configs_limits_groups_and_languages(hub: HubServer, tmp_path: Path) -> None:
    for name in ("easy", "hard"):
        lines(
            tmp_path / "set" / name / "all.jsonl",
            [{"q": text, "of": f"{name} {i // 2}"} for i, text in enumerate(questions(name, 120))],
        )
    (tmp_path / "set" / "README.md").write_text(
        "---\nconfigs:\n- config_name: easy\n  data_files: easy/*.jsonl\n- config_name: hard\n  data_files: hard/*.jsonl\n---\n"
    )
    source = replace(published(hub, tmp_path / "set"), column="q", group="of", language="en")
    found = prepared(tmp_path, replace(source, config="hard", limit=100))
    assert texts_of(found) == set(questions("hard", 100))
    assert {row.language for rows in both(found).values() for row in rows if row.label == 0} == {"en"}
    pairs = [{int(row.text.split()[3]) // 2 for row in rows if row.label == 0} for rows in both(found).values()]
    assert not pairs[0] & pairs[1]
    assert found.card["sources"]["a"][0]["config"] == "hard"
    with pytest.raises(QueryDataError, match=r"expert a: data set org/questions@.*Config name is missing.*easy.*hard"):
        prepared(tmp_path, source)


def test_a_commit_is_what_is_read_though_the_branch_moves_on(hub: HubServer, tmp_path: Path) -> None:
    for version, count in (("old", 100), ("new", 150)):
        lines(tmp_path / version / "train.jsonl", [{"text": text} for text in questions(version, count)])
    old = published(hub, tmp_path / "old")
    hub.add_repo(f"datasets/{NAME}", tmp_path / "new", revisions={"v1": tmp_path / "old"})
    assert texts_of(prepared(tmp_path, old)) == set(questions("old", 100))
    new = Source(open_dataset("expert a", NAME, "main").place)
    assert new != old
    assert open_dataset("expert a", NAME, "v1").place == old.source
    assert texts_of(prepared(tmp_path, new)) == set(questions("new", 150))


def test_a_check_reads_the_beginning_alone(hub: HubServer, tmp_path: Path) -> None:
    rows = [{"text": text + " " * 2000 + "and its end"} for text in questions("a", 40_000)]
    lines(tmp_path / "set" / "train.jsonl", rows)
    published(hub, tmp_path / "set")
    hub.forget()
    check(Queries({"a": [Source(NAME)], **example(tmp_path, ("b",))}))
    sent = sum(request.sent for request in hub.asked("GET .*train.jsonl"))
    assert 0 < sent < 60_000_000 < (tmp_path / "set" / "train.jsonl").stat().st_size
    assert CHECKED_ROWS == 1000
    hub.forget()
    check(Queries({"a": [Source(NAME)], **example(tmp_path, ("b",))}))
    assert [request.path for request in hub.requests] == [f"/api/datasets/{NAME}/revision/main"]


def test_bad_rows_are_counted_with_their_numbers(hub: HubServer, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": text} for text in questions("a", 200)]
    rows[4]["text"], rows[150]["text"] = None, "  "
    lines(tmp_path / "set" / "train.jsonl", rows)
    source = published(hub, tmp_path / "set")
    assert prepared(tmp_path, source).card["sources"]["a"][0]["unreadable"] == 2
    with pytest.raises(QueryDataError, match=r"2 problems\n.*row 5: expected .*\n.*row 151: expected .*'text' is empty"):
        prepared(tmp_path, source, bad_share=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"column": "question"}, r"expert a: data set org/questions@\w+ has no column 'question'; its columns: text"),
        ({"split": "dev"}, r"expert a: data set org/questions@\w+: .*dev"),
        ({"config": "hard"}, r"expert a: data set org/questions@\w+: .*hard"),
    ],
)
def test_what_a_data_set_does_not_have(hub: HubServer, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    lines(tmp_path / "set" / "train.jsonl", [{"text": text} for text in questions("a", 100)])
    source = published(hub, tmp_path / "set")
    for attempt in (
        lambda: prepared(tmp_path, replace(source, **changes)),
        lambda: check(Queries({"a": [replace(source, **changes)], **example(tmp_path, ("b",))})),
    ):
        with pytest.raises(QueryDataError, match=message) as caught:
            attempt()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"train.jsonl": b'{"text": "x"}\nno json\n'}, r"expert a: data set org/questions"),
        ({"train.parquet": b"no parquet"}, r"expert a: data set org/questions"),
        ({"README.md": b"nothing else"}, r"expert a: data set org/questions"),
        (
            {"questions.py": b"raise SystemExit", "x.txt": b""},
            r"expert a: data set org/questions.*scripts are no longer supported",
        ),
        (
            {"a.png": b"\x89PNG", "b.png": b"\x89PNG"},
            r"expected tables of text \(json, parquet, csv, text, arrow\), got imagefolder",
        ),
        ({"a.pkl": b"cos\nsystem\n(S'touch /tmp/never'\ntR."}, r"expert a: data set org/questions"),
    ],
)
def test_data_sets_that_are_no_tables_of_text(hub: HubServer, tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    (tmp_path / "set").mkdir()
    for name, content in files.items():
        (tmp_path / "set" / name).write_bytes(content)
    with pytest.raises(QueryDataError, match=message) as caught:
        prepared(tmp_path, published(hub, tmp_path / "set"))
    assert "\n" not in str(caught.value)


def test_data_sets_that_there_are_not(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines(tmp_path / "set" / "train.jsonl", [{"text": "x"}])
    published(hub, tmp_path / "set")
    both_wrong = Queries({"a": [Source("org/none")], "b": [Source(f"{NAME}@v9")], "c": [Source(str(tmp_path / "gone.jsonl"))]})
    with pytest.raises(ChannelMergingError) as caught:
        check(both_wrong)
    for message in (
        "expert a: data set org/none: there is no such repository",
        "expert b: data set org/questions@v9: ",
        "gone.jsonl",
    ):
        assert message in str(caught.value)
    assert caught.value.exit_code == 2
    hub.add_repo("datasets/org/secret", tmp_path / "set", private=True)
    with pytest.raises(QueryDataError, match=r"data set org/secret: there is no such repository"):
        open_dataset("expert a", "org/secret", None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert open_dataset("expert a", "org/secret", None).commit
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(QueryDataError, match=r"does not know the token"):
        open_dataset("expert a", "org/secret", None)


def test_a_private_data_set_is_read_with_a_token_that_stays_with_the_hub(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files come from a second server by signed addresses: it is shown no token, and no error shows the signatures."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    (tmp_path / "set").mkdir()
    pq.write_table(pa.table({"text": questions("a", 100)}), tmp_path / "set" / "train.parquet")
    source = published(hub, tmp_path / "set", private=True)
    assert texts_of(prepared(tmp_path, source)) == set(questions("a", 100))
    assert hub.asked("cdn GET")
    assert hub.leaks == []
    hub.fail("cdn GET", times=99, status=403, text="Signature=secret-1")
    with pytest.raises(ChannelMergingError) as caught:
        prepared(tmp_path, replace(source, limit=99))
    assert "secret" not in str(caught.value)
    assert TOKEN not in str(caught.value)


def test_a_gated_data_set_is_met_before_a_run(hub: HubServer, tmp_path: Path) -> None:
    lines(tmp_path / "set" / "train.jsonl", [{"text": "x"}])
    published(hub, tmp_path / "set", gated=True)
    with pytest.raises(QueryDataError, match=r"expert a: data set org/questions@.*gated"):
        check(Queries({"a": [Source(NAME)], **example(tmp_path, ("b",))}))


def test_a_hub_that_cannot_be_reached_is_no_fault_of_the_recipe(hub: HubServer, tmp_path: Path) -> None:
    lines(tmp_path / "set" / "train.jsonl", [{"text": text} for text in questions("a", 100)])
    source = published(hub, tmp_path / "set")
    hub.fail("hub GET /datasets/org/questions/resolve/.*jsonl", times=99, status=503)
    with pytest.raises(SourceError, match=r"expert a: data set org/questions@.*Check the network and run again"):
        prepared(tmp_path, source)
    hub.fail("hub GET /api/datasets/org/questions", times=99, status=503)
    with pytest.raises(SourceError, match=r"answered 503"):
        open_dataset("expert a", NAME, None)


def test_a_stream_that_is_cut_once_goes_on(hub: HubServer, tmp_path: Path) -> None:
    texts = questions("a", 5000)
    lines(tmp_path / "set" / "train.jsonl", [{"text": text} for text in texts])
    source = published(hub, tmp_path / "set")
    hub.fail("hub GET /datasets/org/questions/resolve/.*jsonl", cut=10_000)
    hub.fail("hub GET /datasets/org/questions/resolve/.*jsonl", status=503)
    assert texts_of(prepared(tmp_path, source)) == set(texts)


def test_without_network_local_files_are_asked_for(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        QueryDataError, match=r"expert a: data set org/questions: HF_HUB_OFFLINE is set, .* or name local files"
    ):
        open_dataset("expert a", NAME, None)
    assert hub.requests == []


def test_a_check_is_content_with_a_bad_beginning(hub: HubServer, tmp_path: Path) -> None:
    """What share of a data set is bad is known when all of it is read."""
    rows = [{"text": text} for text in questions("a", 4000)]
    for row in rows[:30]:
        row["text"] = ""
    lines(tmp_path / "set" / "train.jsonl", rows)
    source = published(hub, tmp_path / "set")
    check(Queries({"a": [source], **example(tmp_path, ("b",))}))
    assert prepared(tmp_path, source).card["sources"]["a"][0]["unreadable"] == 30
    lines(tmp_path / "empty" / "train.jsonl", [{"text": ""} for _ in range(2000)])
    with pytest.raises(QueryDataError, match="row 1: expected"):
        check(Queries({"a": [published(hub, tmp_path / "empty")], **example(tmp_path, ("b",))}))
