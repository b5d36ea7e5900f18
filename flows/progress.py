"""Progress of a run: bars on a terminal, one line per finished stage when piped. Always on standard error."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from pipeline.engine import Reporter


class BarReporter:
    """Draws one bar per stage."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._lock = threading.Lock()
        self._tasks: dict[str, TaskID] = {}
        self._totals: dict[str, int] = {}

    def start(self, stage: str, total: int) -> None:
        self._grow(stage, total, 0)

    def skip(self, stage: str, count: int) -> None:
        self._grow(stage, count, count)

    def _grow(self, stage: str, more: int, finished: int) -> None:
        with self._lock:
            if stage not in self._tasks:
                self._tasks[stage] = self._progress.add_task(stage, total=0, label="")
            self._totals[stage] = self._totals.get(stage, 0) + more
            self._progress.update(self._tasks[stage], total=self._totals[stage], advance=finished)

    def advance(self, stage: str, label: str) -> None:
        self._progress.update(self._tasks[stage], advance=1, label=label)

    def done(self, stage: str) -> None:
        self._grow(stage, 0, 0)
        self._progress.update(self._tasks[stage], label="")
        self._progress.stop_task(self._tasks[stage])

    def note(self, text: str) -> None:
        self._progress.console.print(Text(f"note: {text}"))


@dataclass
class StageCount:
    """What is known of a stage under way."""

    total: int = 0
    """Blocks that were to be computed."""
    computed: int = 0
    skipped: int = 0
    """Blocks found finished."""
    started: float = field(default_factory=time.monotonic)

    def summary(self) -> str:
        """What the stage came to: its blocks, their time, and what was there before."""
        found = f"{self.skipped} found finished" if self.skipped else ""
        if not self.total:
            return f"nothing to do{found and ', '}{found}"
        blocks = f"{self.computed} block{'s' if self.computed != 1 else ''}"
        return f"{blocks} in {time.monotonic() - self.started:.1f} s{found and ', '}{found}"


class StageCounts:
    """Counts of the stages under way, kept by several threads at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stages: dict[str, StageCount] = {}

    def add(self, stage: str, total: int = 0, computed: int = 0, skipped: int = 0) -> tuple[StageCount, bool]:
        """The stage's counts after these are added, and whether this is the first that is heard of it."""
        with self._lock:
            new = stage not in self._stages
            count = self._stages.setdefault(stage, StageCount())
            count.total += total
            count.computed += computed
            count.skipped += skipped
            return count, new

    def take(self, stage: str) -> StageCount:
        """The counts of a stage that is over; none if nothing was heard of it."""
        with self._lock:
            return self._stages.pop(stage, StageCount())


class LineReporter:
    """Prints a line when a stage is over."""

    def __init__(self) -> None:
        self._counts = StageCounts()

    def start(self, stage: str, total: int) -> None:
        self._counts.add(stage, total=total)

    def skip(self, stage: str, count: int) -> None:
        self._counts.add(stage, skipped=count)

    def advance(self, stage: str, label: str) -> None:
        self._counts.add(stage, computed=1)

    def done(self, stage: str) -> None:
        _say(f"{stage}: {self._counts.take(stage).summary()}")

    def note(self, text: str) -> None:
        _say(f"note: {text}")


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")  # in one piece: print writes the end of the line by itself, and threads mix
    sys.stderr.flush()


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
