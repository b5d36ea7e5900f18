"""How the command line prints: lines, errors, JSON, counts and sizes, tables that lose nothing on a narrow terminal."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from storage.errors import ChannelMergingError

OF_TENSOR = re.compile(r"(?P<whose>(?:[^:]+: )?tensor )(?P<tensor>\S+?)(?P<what>:? .+)", re.DOTALL)
FEW = 3
"""Tensors with the same problem that are listed one by one."""


def say(text: str) -> None:
    """Print a line to standard output.

    A reader that has left (``| head -1``) has seen enough, and the exit code is what it is without one.
    """
    try:
        typer.echo(text)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still in the buffer goes there at exit


def say_json(value: Any) -> None:
    """Print one JSON document."""
    say(json.dumps(value, indent=2, ensure_ascii=False))


def counted(count: int, noun: str) -> str:
    """``1 file``, ``2,000 files``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def size(count: int) -> str:
    """Bytes in the largest unit of which there is one."""
    for unit, amount in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= amount:
            return f"{count / amount:,.2f} {unit}"
    return counted(count, "byte")


def listed(error: ChannelMergingError) -> tuple[str, ...]:
    """What is wrong, each for itself."""
    return error.problems or (str(error),)


def told(error: ChannelMergingError) -> str:
    """An error for people: many tensors with the same problem in one line."""
    alike: dict[str, list[tuple[str, str]]] = {}
    for problem in error.problems:
        match = OF_TENSOR.fullmatch(problem)
        kind = f"{match['whose']}{{}}{match['what']}" if match else problem
        alike.setdefault(kind, []).append((problem, match["tensor"] if match else ""))
    if all(len(same) <= FEW for same in alike.values()):
        return str(error)
    headline = str(error).partition("\n")[0]
    whose = f"{headline.partition(':')[0]}: "  # said by the headline already, where all are one expert's
    lines = [headline]
    for same in alike.values():
        shown = [problem for problem, _ in same]
        if len(same) > FEW:
            problem, tensor = same[0]
            shown = [problem.replace(tensor, f"{tensor} and {len(same) - 1} more", 1)]
        lines += [f"  - {line.removeprefix(whose)}" for line in shown]
    return "\n".join(lines)


def _table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], left_out: Sequence[str]) -> Table:
    shown = [position for position, heading in enumerate(headings) if heading not in left_out]
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for position in shown:
        table.add_column(headings[position], overflow="fold")  # rich would cut names off
    for row in rows:
        table.add_row(*(Text(row[position]) for position in shown))  # as text: a path may hold what rich would read as markup
    return table


def table_text(
    console: Console, title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], spare: Sequence[str] = ()
) -> str:
    """A table as wide as the console at most, its cells folded but whole.

    ``spare``: headings of columns that are left out, one after the other, until the rest fits a line; which, is said.
    """
    wide = console.options.update(width=10_000)
    for count in range(len(spare) + 1):
        table = _table(title, headings, rows, spare[:count])
        if console.measure(table, options=wide).maximum <= console.width:
            break
    with console.capture() as captured:
        console.print(table)
        if count:
            console.print(f"(wider, or piped, it also shows: {', '.join(spare[:count])})", style="dim")
    return captured.get().rstrip("\n")


def say_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], spare: Sequence[str] = ()) -> None:
    """Print a table, folded to a terminal; piped, a line per row: a script or a log must not get wrapped cells."""
    console = Console()
    text = table_text(console if console.is_terminal else Console(width=10_000), title, headings, rows, spare)
    say("\n".join(line.rstrip() for line in text.splitlines()))


def say_lines(title: str, items: Sequence[tuple[str, str]]) -> None:
    """Print a line per item; on a terminal that is too narrow, what an item is goes under its name."""
    console = Console()
    lines = [f"  {name}  {what}" for name, what in items]
    if console.is_terminal and max(map(len, lines), default=0) > console.width:
        lines = [f"  {name}\n    {what}" for name, what in items]
    say("\n".join([title, *lines]))
