"""Rows of query sources, read one after another in bounded memory: a text of 10 MB, a file of one line, bad bytes.

What cannot be read as a query is a ``Bad`` row, which is counted and listed with its number; a source that cannot be read at
all is an error.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from router_training.questions import MAX_CHARACTERS
from router_training.sources import Columns, Stream, format_of

MAX_LINE = 64 * 1024**2
"""Bytes of a line of a file; a longer one is a bad row and is passed over without being held."""
BATCH_BYTES = 8 * 1024**2
"""Of Parquet, decoded: what is taken at once."""
BATCH_ROWS = 1024
USERS = frozenset(("user", "human", "prompter"))
"""Who asks, in the formats of chats that are common."""
_SHOWN = 60


@dataclass(frozen=True)
class Found:
    """A query as its source has it, cut to ``MAX_CHARACTERS``."""

    text: str
    group: str | None
    """What its source says it is a phrasing of."""
    is_cut: bool


@dataclass(frozen=True)
class Bad:
    """A row that holds no query."""

    why: str


BLANK = Bad("")
"""A blank line, which is no row."""


class UnreadableError(Exception):
    """A whole source cannot be read; the message names it."""


def _said(value: Any) -> str:
    """The text of a message: a string, or the text parts of a list of parts."""
    if isinstance(value, list):
        parts = [part.get("text") for part in value if isinstance(part, dict)]
        value = "\n".join(part for part in parts if isinstance(part, str))
    if not isinstance(value, str):
        raise TypeError("the user's first message is no text")
    return value


def first_question(messages: Any) -> str:
    """The user's first message of a chat: {role, content} or {from, value}. TypeError when there is none."""
    if isinstance(messages, dict) and messages and all(isinstance(column, list) for column in messages.values()):
        messages = [dict(zip(messages, message, strict=False)) for message in zip(*messages.values(), strict=False)]
    if not isinstance(messages, list):
        raise TypeError("expected a list of messages")
    for message in messages:
        if isinstance(message, dict) and message.get("role", message.get("from")) in USERS:
            return _said(message.get("content", message.get("value")))
    raise TypeError("no message of the user")


def row_of(fields: Mapping[str, Any], columns: Columns) -> Found:
    """The query of a row. KeyError, TypeError or ValueError say why it has none."""
    value = fields[columns.text]
    text = first_question(value) if columns.is_chat else value
    if not isinstance(text, str):
        raise TypeError(f"{columns.text!r} is no string")
    cut = text[:MAX_CHARACTERS]
    if not cut.strip():
        raise ValueError(f"{columns.text!r} is empty")
    group = None if columns.group is None else fields[columns.group]
    if not (group is None or isinstance(group, str | int)):
        raise TypeError(f"{columns.group!r} is neither a string nor a whole number")
    named = None if group is None else str(group)[:MAX_CHARACTERS]
    for checked in filter(None, (cut, named)):
        try:
            checked.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("it holds half of a surrogate pair") from None
    return Found(cut, named or None, is_cut=len(text) > len(cut))


def _expected(columns: Columns) -> str:
    inside = '[{"role": "user", "content": "…"}, …]' if columns.is_chat else '"…"'
    second = "" if columns.group is None else f', "{columns.group}": "…"'
    return f'{{"{columns.text}": {inside}{second}}}'


def _bad(columns: Columns, shown: Any, error: Exception) -> Bad:
    why = f"{str(error) or type(error).__name__} is missing" if isinstance(error, KeyError) else str(error)
    return Bad(f"expected {_expected(columns)}, got {str(shown)[:_SHOWN]!r} ({why})")


def json_row(line: bytes, columns: Columns) -> Found | Bad:
    """A line of JSON Lines."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        return Bad(f"expected UTF-8, got {line[:_SHOWN]!r} ({error.reason} at byte {error.start})")
    try:
        fields = json.loads(text)
        if not isinstance(fields, dict):
            raise TypeError("no JSON object")
        return row_of(fields, columns)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        return _bad(columns, text[:_SHOWN].strip(), error)


def text_row(line: bytes, columns: Columns) -> Found | Bad:
    """A line of plain text."""
    try:
        text = line.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        return Bad(f"expected UTF-8, got {line[:_SHOWN]!r} ({error.reason} at byte {error.start})")
    return Found(text[:MAX_CHARACTERS], None, is_cut=len(text) > MAX_CHARACTERS)


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    with path.open("rb") as file:
        if not format_of(path)[1]:
            yield file
        else:
            with gzip.open(file, "rb") as unpacked:
                yield unpacked  # type: ignore[misc]  # it reads as a file does


def _skip_line(file: IO[bytes]) -> int:
    """Pass over the rest of a line without holding it; its bytes."""
    passed = 0
    while piece := file.readline(1024**2):
        passed += len(piece)
        if piece.endswith(b"\n"):
            break
    return passed


def _lines(file: IO[bytes], start: int, stop: int | None) -> Iterator[bytes | None]:
    """The lines that begin in [start, stop); None for one that is longer than ``MAX_LINE``."""
    position = start
    mark = 0
    if start:
        file.seek(start - 1)
        position += _skip_line(file) - 1
    elif file.read(3) == b"\xef\xbb\xbf":  # it says that UTF-8 follows, and is a part of the first line
        mark = 3
    else:
        file.seek(0)
    while stop is None or position < stop:
        line = file.readline(MAX_LINE + 1)
        if not line:
            return
        position += mark + len(line)
        mark = 0
        if len(line) > MAX_LINE and not line.endswith(b"\n"):
            position += _skip_line(file)
            yield None
        else:
            yield line


def line_rows(stream: Stream) -> Iterator[tuple[int, Found | Bad]]:
    """The rows of a file of lines, numbered by the lines of this stream from 1 on. The last number may be that of no row."""
    path = Path(stream.place)
    read = text_row if stream.format == "text" else json_row
    with _opened(path) as file:
        for number, line in enumerate(_lines(file, stream.start, stream.stop), 1):
            if number == 1 and line is not None and path.suffix == ".json" and line.lstrip().startswith(b"["):
                raise UnreadableError(
                    f"{path} is one JSON array; expected JSON Lines, an object a line. Write it so: jq -c '.[]'"
                )
            if line is None:
                yield number, Bad(f"a line of more than {MAX_LINE} bytes")
            elif line.strip():
                yield number, read(line, stream.columns)
            else:
                yield number, BLANK


def _values(column: Any) -> list[Any]:
    """Python values of an Arrow column; an exception stands for one that is no UTF-8."""
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        found: list[Any] = []
        for item in column:
            try:
                found.append(item.as_py())
            except UnicodeDecodeError as error:
                found.append(error)
        return found


def table_rows(batches: Iterable[Any], columns: Columns) -> Iterator[Found | Bad]:
    """The rows of Arrow tables or record batches that hold the columns."""
    for batch in batches:
        named = [_values(batch.column(batch.schema.get_field_index(name))) for name in columns.names]
        for values in zip(*named, strict=True):
            broken = next((value for value in values if isinstance(value, UnicodeDecodeError)), None)
            if broken is not None:
                yield Bad(f"expected UTF-8, got {broken.object[:_SHOWN]!r} ({broken.reason} at byte {broken.start})")
                continue
            try:
                yield row_of(dict(zip(columns.names, values, strict=True)), columns)
            except (ValueError, KeyError, TypeError) as error:
                yield _bad(columns, values[0], error)


def check_columns(place: str, found: Sequence[str], columns: Columns) -> None:
    """UnreadableError when a table lacks a column."""
    missing = [name for name in columns.names if name not in found]
    if missing:
        known = ", ".join(map(str, found)) or "none"
        raise UnreadableError(
            f"{place} has no column {', '.join(map(repr, missing))}; its columns: {known}. Name the right one."
        )


def parquet_groups(path: Path, block_bytes: int) -> list[tuple[int, tuple[int, ...]]]:
    """Row groups of a Parquet file, put together to about so many decoded bytes; each with the number of rows before it.

    One empty list of groups when it cannot be read: who reads it says why.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        about = pq.read_metadata(path)
    except (pa.ArrowException, OSError):
        return [(0, ())]
    found: list[tuple[int, tuple[int, ...]]] = []
    rows = held = 0
    for number in range(about.num_row_groups):
        group = about.row_group(number)
        if found and held + group.total_byte_size <= block_bytes:
            found[-1] = (found[-1][0], (*found[-1][1], number))
            held += group.total_byte_size
        else:
            found.append((rows, (number,)))
            held = group.total_byte_size
        rows += group.num_rows
    return found or [(0, ())]


def parquet_rows(stream: Stream) -> Iterator[tuple[int, Found | Bad]]:
    """The rows of row groups of a Parquet file, numbered from 1 on within the stream."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with Path(stream.place).open("rb") as opened, pq.ParquetFile(opened) as file:
            check_columns(stream.place, file.schema_arrow.names, stream.columns)
            groups = [file.metadata.row_group(group) for group in stream.groups]
            size = sum(group.total_byte_size for group in groups) / max(1, sum(group.num_rows for group in groups))
            at_once = int(min(max(BATCH_BYTES / max(size, 1), 1), BATCH_ROWS))
            batches = file.iter_batches(
                at_once, row_groups=list(stream.groups), columns=stream.columns.names, use_threads=False
            )
            yield from enumerate(table_rows(batches, stream.columns), 1)
    except pa.ArrowException as error:
        raise UnreadableError(f"{stream.place}: {' '.join(str(error).split())[:300]}") from None
