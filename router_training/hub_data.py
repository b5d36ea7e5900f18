"""Data sets on the Hub, streamed with ``datasets``: nothing is stored, and only the columns that are asked for are decoded.

The commit is pinned before. Of its formats those that hold tables of text are read; no code of a repository ever runs. A file
that is one JSON array is the exception to streaming: ``datasets`` holds it whole, for one row as for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from router_training.reading import BATCH_ROWS, Bad, Found, UnreadableError, check_columns, table_rows
from router_training.sources import Stream
from storage.places import split_revision
from storage.queries import QuerySource

FORMATS = ("json", "parquet", "csv", "text", "arrow")
"""Builders of ``datasets`` that queries are read by."""
SHARDS = 8
"""Streams of one data set at most; it has no more than files."""

_T = TypeVar("_T")


class PassingError(Exception):
    """The Hub cannot be reached; the message names the data set."""


def _attempt(place: str, step: Callable[[], _T]) -> _T:
    """What a step of ``datasets`` returns. UnreadableError or PassingError in one line when it fails, however it does."""
    try:
        return step()
    except UnreadableError:
        raise
    except Exception as error:  # whatever its builders, fsspec, pyarrow or the Hub's client may raise
        from storage.hub_datasets import stream_problem

        said, is_passing = stream_problem(error)
        message = f"data set {place}: {said or type(error).__name__}"
    if is_passing:
        raise PassingError(f"{message}. Check the network and run again.")
    raise UnreadableError(message)


def _opened(place: str, config: str | None, split: str, names: list[str]) -> Any:
    """A data set as a stream of Arrow tables."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what goes wrong is told once, as an error
    name, commit = split_revision(place)
    builder = datasets.load_dataset_builder(name, config, revision=commit)
    if builder.name not in FORMATS:
        raise UnreadableError(f"data set {place}: expected tables of text ({', '.join(FORMATS)}), got {builder.name}")
    if builder.name == "parquet":  # the others are read whole in any case
        builder.config.columns, builder.config.batch_size = names, BATCH_ROWS
    return builder.as_streaming_dataset(split=split).with_format("arrow")


def hub_shards(spec: QuerySource, names: list[str]) -> int:
    """Into how many streams a data set is divided."""
    found = _attempt(spec.source, lambda: _opened(spec.source, spec.config, spec.split, names))
    return min(int(found.num_shards), SHARDS)


def _tables(stream: Stream) -> Iterator[Any]:
    place, options = stream.place, stream.hub
    found = _attempt(place, lambda: _opened(place, options["config"], options["split"], stream.columns.names))
    if options["shards"] > 1:
        found = found.shard(options["shards"], options["shard"])
    tables = iter(found.iter(BATCH_ROWS))
    while (table := _attempt(place, lambda: next(tables, None))) is not None:
        check_columns(f"data set {place}", table.column_names, stream.columns)
        yield table


def hub_rows(stream: Stream) -> Iterator[tuple[int, Found | Bad]]:
    """The rows of a data set's shard, numbered from 1 on. UnreadableError or PassingError when it cannot be read."""
    yield from enumerate(table_rows(_tables(stream), stream.columns), 1)
