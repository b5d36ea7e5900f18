"""What ``channel-merge route`` prints. It needs neither torch nor Dask where the router is a linear one."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import typer

from flows.output import say, say_json
from serving.choice import BASE, Choice, top
from serving.router import BATCH, Router, artifact_router
from storage.artifact import Artifact
from storage.errors import ArtifactError, QueryDataError, RecipeError

STANDARD_INPUT = "-"
"""As a file: standard input."""


def route_queries(
    artifact: str, query: str | None, batch: str | None, count: int, loaded: str | None, margin: float, *, as_json: bool
) -> None:
    """Print the choice for a query, or a line for every line of a file.

    RecipeError for arguments that do not go together, ArtifactError without a router or an expert ``loaded``, QueryDataError
    when the file cannot be read.
    """
    if (query is None) == (batch is None):
        raise RecipeError("route: expected a query or --batch FILE, one of the two. Give '-' as FILE to read standard input.")
    router = artifact_router(Artifact(artifact))
    if loaded is not None and loaded not in (BASE, *router.experts):
        raise ArtifactError(
            f"--loaded: expected {BASE} or an expert of {artifact}, {', '.join(router.experts)}, got {loaded!r}."
        )
    if query is not None:
        choice = router.choose(query, loaded, margin)
        if as_json:
            say_json(_document(choice, count))
        else:
            _tell(choice, count)
        return
    assert batch is not None
    for choice in _choices(router, _lines(batch), loaded, margin):
        if as_json:
            say(json.dumps(_document(choice, count), ensure_ascii=False))
        else:
            say("\t".join([choice.expert, *(f"{name} {share:.4f}" for name, share in top(choice.shares, count))]))


def _document(choice: Choice, count: int) -> dict[str, Any]:
    found: dict[str, Any] = {"expert": choice.expert, "probabilities": choice.shares, "fallback": choice.is_fallback}
    return found | ({"top": [name for name, _ in top(choice.shares, count)]} if count else {})


def _tell(choice: Choice, count: int) -> None:
    """The expert, and with ``count`` the likeliest, to standard output; all shares to standard error otherwise."""
    say(choice.expert)
    if choice.is_fallback:
        typer.echo("  (the fallback: no expert's kind of query was recognised)", err=True)
    for name, share in top(choice.shares, count or len(choice.shares)):
        if count:
            say(f"  {name} {share:.4f}")
        else:
            typer.echo(f"  {name} {share:.4f}", err=True)


def _lines(place: str) -> Iterator[str]:
    """A file's lines as they come, without their ends. What is not UTF-8 in them is replaced, not refused."""
    try:
        with nullcontext(sys.stdin.buffer) if place == STANDARD_INPUT else Path(place).open("rb") as file:
            for line in file:
                yield line.rstrip(b"\r\n").decode("utf-8", "replace")
    except OSError as error:
        raise QueryDataError(f"--batch {place}: {error.strerror or error}. Give a file with a query per line.") from None


def _choices(router: Router, queries: Iterator[str], loaded: str | None, margin: float) -> Iterator[Choice]:
    """A choice per query; with ``loaded``, what was chosen is what is loaded for the next."""
    while block := list(itertools.islice(queries, BATCH)):
        for shares in router.route(block):
            choice = router.choose(shares, loaded, margin)
            loaded = choice.expert if loaded is not None else None
            yield choice
