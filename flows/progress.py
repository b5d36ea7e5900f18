"""Progress of a run: bars on a terminal, one line per finished stage when piped. Always on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from pipeline.engine import Reporter


class BarReporter:
    """Draws one bar per stage."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def start(self, stage: str, total: int) -> None:
        self._tasks[stage] = self._progress.add_task(stage, total=total, label="")

    def advance(self, stage: str, label: str) -> None:
        self._progress.update(self._tasks[stage], advance=1, label=label)

    def note(self, text: str) -> None:
        self._progress.console.print(Text(f"note: {text}"))


class LineReporter:
    """Prints a line when a stage is done."""

    def __init__(self) -> None:
        self._left: dict[str, int] = {}
        self._totals: dict[str, tuple[int, float]] = {}

    def start(self, stage: str, total: int) -> None:
        self._left[stage], self._totals[stage] = total, (total, time.monotonic())
        if not total:
            print(f"{stage}: nothing to do", file=sys.stderr, flush=True)

    def advance(self, stage: str, label: str) -> None:
        self._left[stage] -= 1
        if not self._left[stage]:
            total, started = self._totals[stage]
            blocks = f"{total} block{'s' if total != 1 else ''}"
            print(f"{stage}: {blocks} in {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        print(f"note: {text}", file=sys.stderr, flush=True)


@contextmanager
def open_reporter() -> Iterator[Reporter]:
    """The reporter that suits standard error."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield LineReporter()
        return
    columns = (
        TextColumn("{task.description:>16}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[label]}", style="dim"),
    )
    with Progress(*columns, console=console) as progress:
        yield BarReporter(progress)
