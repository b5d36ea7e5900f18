"""Rows of files: every format, every kind of bad row, and lines that are cut into blocks anywhere."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router_training import reading
from router_training.data import Prepared, check, prepare
from router_training.opening import open_parts
from router_training.reading import BLANK, Bad, Found, first_question, line_rows, row_of
from router_training.sources import Columns, Queries, Source, Stream, format_of
from router_training.tasks import here
from storage.errors import QueryDataError
from tests.support.query_sources import both, example, questions, write_lines, write_parquet

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is it?"},
    {"role": "user", "content": "And now?"},
]
SHARED = [{"from": "gpt", "value": "Hello."}, {"from": "human", "value": "What is it?"}]
PARTED = [
    {"role": "user", "content": [{"type": "text", "text": "What"}, {"type": "image"}, {"type": "text", "text": "is it?"}]}
]
COLUMNS = {"role": ["system", "user"], "content": ["Be brief.", "What is it?"]}


def prepared(folder: Path, source: Source, **options: Any) -> Prepared:
    """What is prepared of expert b's example and this source, expert a's."""
    return prepare(Queries({"a": [source], **example(folder, ("b",))}, **options), 0, folder / "prepared", here)


def texts_of(found: Prepared, label: int = 0) -> set[str]:
    return {row.text for rows in both(found).values() for row in rows if row.label == label}


@pytest.mark.parametrize(
    "name",
    ["q.jsonl", "q.json", "q.ndjson", "queries", "q.jsonl.gz", "q.parquet", "q.PARQUET", "q.txt", "q.txt.gz", "q.v2.jsonl"],
)
def test_formats(tmp_path: Path, name: str) -> None:
    texts = questions("a", 90)
    path = tmp_path / name
    rows = [{"text": text, "answer": i, "more": None} for i, text in enumerate(texts)]
    if name.lower().endswith("parquet"):
        write_parquet(path, rows)
    elif ".txt" in name:
        data = "\r\n".join(texts).encode()
        path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    else:
        write_lines(path, rows)
    assert texts_of(prepared(tmp_path, Source(str(path)))) == set(texts)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_columns_chats_and_limits(tmp_path: Path, kind: str) -> None:
    write = write_lines if kind == "jsonl" else write_parquet
    rows = [
        {
            "question": text,
            "chat": [{"role": "user", "content": f"chat {text}"}, {"role": "assistant", "content": "Yes."}],
            "id": i // 3,
        }
        for i, text in enumerate(questions("a", 120))
    ]
    source = write(tmp_path / f"q.{kind}", rows)
    assert texts_of(prepared(tmp_path, replace(source, column="question", group="id"))) == set(questions("a", 120))
    assert texts_of(prepared(tmp_path, replace(source, messages="chat"))) == {f"chat {text}" for text in questions("a", 120)}
    found = prepared(tmp_path, replace(source, column="question", limit=70))
    assert texts_of(found) == set(questions("a", 120)[:70])
    assert found.card["sources"]["a"][0]["rows"] == 70
    grouped = both(prepared(tmp_path, replace(source, column="question", group="id")))
    numbers = [{int(row.text.split()[3]) // 3 for row in grouped[which] if row.label == 0} for which in grouped]
    assert not numbers[0] & numbers[1]


@pytest.mark.parametrize("messages", [CHAT, SHARED, COLUMNS])
def test_the_users_first_message(messages: Any) -> None:
    assert first_question(messages) == "What is it?"


def test_a_message_of_parts() -> None:
    assert first_question(PARTED) == "What\nis it?"


@pytest.mark.parametrize(
    "messages",
    [
        None,
        "text",
        [],
        {},
        [None],
        ["text"],
        [{"role": "assistant", "content": "x"}],
        [{"role": "user"}],
        [{"role": "user", "content": 5}],
    ],
)
def test_no_message_of_the_user(messages: Any) -> None:
    with pytest.raises(TypeError, match=r"no message of the user|list of messages|is no text"):
        first_question(messages)


@pytest.mark.parametrize(
    ("fields", "columns", "message"),
    [
        ({"text": None}, Columns(), "'text' is no string"),
        ({"text": " \n"}, Columns(), "'text' is empty"),
        ({"text": "x"}, Columns("query"), "query"),
        ({"text": "x"}, Columns(group="of"), "of"),
        ({"text": "x", "of": 1.5}, Columns(group="of"), "'of' is neither a string nor a whole number"),
        ({"text": "x", "of": "\udc00"}, Columns(group="of"), "half of a surrogate pair"),
    ],
)
def test_rows_that_hold_no_query(fields: dict[str, Any], columns: Columns, message: str) -> None:
    with pytest.raises((TypeError, ValueError, KeyError), match=message):
        row_of(fields, columns)


def test_a_group_may_be_a_number_or_nothing() -> None:
    assert row_of({"text": "x", "of": 7}, Columns(group="of")).group == "7"
    assert row_of({"text": "x", "of": None}, Columns(group="of")).group is None


LINE = st.one_of(
    st.just(b""), st.just(b"   "), st.just(b"\xff\xfe"), st.just(b"no json"),
    st.text(max_size=30).map(lambda text: json.dumps({"text": f"q {text}"}, ensure_ascii=False).encode("utf-8", "replace")),
    st.text(max_size=30).map(lambda text: json.dumps({"text": f"q {text}"}).encode()),
)  # fmt: skip


@settings(max_examples=200)
@given(lines=st.lists(LINE, max_size=25), end=st.sampled_from([b"\n", b""]), block=st.integers(1, 200), mark=st.booleans())
def test_blocks_hold_every_line_once(
    lines: list[bytes], end: bytes, block: int, mark: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Cut anywhere, in the middle of a character or between the two bytes of a line's end."""
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_bytes((b"\xef\xbb\xbf" if mark else b"") + b"\n".join(lines) + end)
    parts = open_parts(Queries({"a": [Source(str(path))], "b": []} | {"b": [Source("/x")]}), block)
    found, number = [], 0
    for stream in parts[0].streams:
        last = 0
        for last, row in line_rows(stream):
            found.append((number + last, row))
        number += last
    whole = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    expected = [(i, line) for i, line in enumerate(whole, 1) if line.strip()]
    rows = [(i, row) for i, row in found if row is not BLANK]
    assert [i for i, _ in rows] == [i for i, _ in expected]
    for (_, row), (_, line) in zip(rows, expected, strict=True):
        try:
            text = json.loads(line.decode())["text"]
        except ValueError:
            assert isinstance(row, Bad)
        else:
            assert row == Found(text, None, is_cut=False)


def test_line_separators_inside_texts_do_not_end_lines(tmp_path: Path) -> None:
    texts = [f"one\u2028two\x85three\x0cfour {i}" for i in range(100)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
    assert texts_of(prepared(tmp_path, Source(str(path)))) == set(texts)


def test_a_line_without_end_is_passed_over_and_never_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_LINE", 1_000_000)
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "first"}\n')
        for _ in range(40):
            file.write(b'{"text": "' + b"x" * 999_990)
        file.write(b'\n{"text": "last"}\n')
    tracemalloc.start()
    rows = list(line_rows(Stream(0, str(path), "lines", Columns(), None)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [(number, type(row)) for number, row in rows] == [(1, Found), (2, Bad), (3, Found)]
    assert "a line of more than 1000000 bytes" in rows[1][1].why  # type: ignore[union-attr]
    assert peak < 6_000_000


def test_a_text_of_ten_megabytes_does_not_stay(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("w") as file:
        for i in range(12):
            file.write(json.dumps({"text": f"{i} " + "long text " * 1_000_000}) + "\n")
    tracemalloc.start()
    rows = [row for _, row in line_rows(Stream(0, str(path), "lines", Columns(), None))]
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert all(isinstance(row, Found) and row.is_cut and len(row.text) == 8192 for row in rows)
    assert held < 1_000_000
    assert peak < 60_000_000


# what is refused


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"text": "x"},\n {"text": "y"}]', r"expert a: .*a.json is one JSON array; expected JSON Lines"),
        ("a.jsonl.gz", b"no gzip", r"expert a: .*a.jsonl.gz: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 99)[:-9], r"expert a: .*a.jsonl.gz: Compressed file ended before"),
        ("a.parquet", b"no parquet at all", r"expert a: .*a.parquet: Parquet magic bytes not found"),
        ("a.parquet", b"", r"expert a: .*a.parquet: Parquet file size is 0 bytes"),
        ("a.txt", b"one\ntw\xff\n", r"expert a: .*a.txt line 2: expected UTF-8, got b'tw.xff.n'"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    queries = Queries({"a": [Source(str(tmp_path / name))], **example(tmp_path, ("b",))})
    with pytest.raises(QueryDataError, match=message):
        check(queries)


def test_a_cut_gzip_stream_is_refused(tmp_path: Path) -> None:
    data = bytearray(gzip.compress(b"".join(b'{"text": "%d"}\n' % i for i in range(9999))))
    data[len(data) // 2] ^= 255
    (tmp_path / "a.jsonl.gz").write_bytes(data)
    with pytest.raises(QueryDataError, match=r"expert a: .*a.jsonl.gz"):
        prepared(tmp_path, Source(str(tmp_path / "a.jsonl.gz")))


def test_a_column_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "a.parquet", [{"question": text, "answer": 1} for text in questions("a", 90)])
    for wrong in (source, replace(source, column="question", group="of")):
        with pytest.raises(QueryDataError, match=r"a.parquet has no column '(text|of)'; its columns: question, answer"):
            prepared(tmp_path, wrong)


@pytest.mark.parametrize("value", [None, 5, b"bytes", ["list"], ""])
def test_parquet_rows_of_other_types_are_bad(tmp_path: Path, value: Any) -> None:
    rows = pa.table({"text": pa.array([value] * 3), "n": [1, 2, 3]})
    pq.write_table(rows, tmp_path / "a.parquet", row_group_size=1)
    with pytest.raises(QueryDataError, match=r"a.parquet row 3: expected \{\"text\": \"…\"\}, got .*(no string|empty)"):
        prepared(tmp_path, Source(str(tmp_path / "a.parquet")))


def test_parquet_strings_that_are_no_utf8_are_bad_rows(tmp_path: Path) -> None:
    values = [f"good {i}".encode() for i in range(99)] + [b"bad \xff"]
    broken = pa.Array.from_buffers(pa.string(), 100, pa.array(values, pa.binary()).buffers())
    pq.write_table(pa.table({"text": broken}), tmp_path / "a.parquet")
    found = prepared(tmp_path, Source(str(tmp_path / "a.parquet")), bad_share=0.01)
    assert found.card["sources"]["a"][0]["unreadable"] == 1
    assert len(texts_of(found)) == 99
    with pytest.raises(QueryDataError, match=r"a.parquet row 100: expected UTF-8, got b'bad .xff'"):
        prepared(tmp_path, Source(str(tmp_path / "a.parquet")), bad_share=0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("q.jsonl", ("lines", False)), ("q", ("lines", False)), ("q.gz", ("lines", True)), ("q.txt.gz", ("text", True)),
        ("q.parquet", ("parquet", False)), ("q.v1.2", ("lines", False)), ("q.TXT", ("text", False)), (".gz", ("lines", False)),
    ],
)  # fmt: skip
def test_formats_by_name(name: str, expected: tuple[str, bool]) -> None:
    assert format_of(Path(name)) == expected
