"""What a run says of its progress, on a terminal, in a pipe and in a flow's log."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn

from flows import merge
from flows.progress import BarReporter, LineReporter
from pipeline.engine import Reporter


def report(reporter: Reporter) -> None:
    """Two stages side by side, one of them begun twice, and one with nothing to do."""
    reporter.start("ingest", 2)
    reporter.advance("ingest", "layer 1")
    reporter.start("merge", 1)
    reporter.skip("merge", 30)
    reporter.start("ingest", 1)
    reporter.advance("ingest", "layer 2")
    reporter.advance("merge", "layer 1")
    reporter.done("merge")
    reporter.advance("ingest", "layer 3")
    reporter.done("ingest")
    reporter.done("similarity")
    reporter.skip("pack", 4)
    reporter.done("pack")
    reporter.note("over [bold]")


SUMMARIES = [
    "merge: 1 block in T s, 30 found finished",
    "ingest: 3 blocks in T s",
    "similarity: nothing to do",
    "pack: nothing to do, 4 found finished",
]


def untimed(text: str) -> list[str]:
    return re.sub(r"\d+\.\d s", "T s", text).splitlines()


def test_a_line_says_what_a_stage_came_to_when_it_is_over(capsys: pytest.CaptureFixture[str]) -> None:
    report(LineReporter())
    assert untimed(capsys.readouterr().err) == [*SUMMARIES, "note: over [bold]"]


def test_a_stage_that_begins_anew_is_counted_anew(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = LineReporter()
    for _ in range(2):
        reporter.start("merge", 1)
        reporter.advance("merge", "layer")
        reporter.done("merge")
    assert untimed(capsys.readouterr().err) == ["merge: 1 block in T s"] * 2


def test_bars_grow() -> None:
    shown = io.StringIO()
    console = Console(file=shown, width=100)
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TextColumn("{task.fields[label]}"))
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        report(BarReporter(progress))
    lines = [" ".join(line.split()) for line in shown.getvalue().splitlines()]
    assert lines[0] == "note: over [bold]"
    assert lines[-4:] == ["ingest 3/3", "merge 31/31", "similarity 0/0", "pack 4/4"]


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger = logging.Logger("flow")  # noqa: LOG001 - one of its own, as Prefect's needs a flow run
    logger.addHandler(Kept())
    monkeypatch.setattr(merge, "get_run_logger", lambda: logger)
    return lines


def test_a_flow_logs_when_stages_begin_and_end(log: list[str]) -> None:
    report(merge.FlowReporter())
    assert untimed("\n".join(log)) == ["ingest: begins", "merge: begins", *SUMMARIES, "over [bold]"]


def test_a_flow_logs_where_a_long_stage_is(log: list[str]) -> None:
    report(merge.FlowReporter(every_seconds=0.0))
    assert "ingest: 2 of 3 blocks, last layer 2" in log


@pytest.mark.parametrize("kind", ["lines", "bars", "flow"])
def test_no_count_is_lost_between_threads(kind: str, log: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(MofNCompleteColumn(), console=Console(file=io.StringIO()), auto_refresh=False)
    made: dict[str, Callable[[], Reporter]]
    made = {"lines": LineReporter, "bars": lambda: BarReporter(progress), "flow": merge.FlowReporter}
    reporter = made[kind]()

    def work(number: int) -> None:
        reporter.start("merge", 10)
        for _ in range(10):
            reporter.advance("merge", "layer")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(200)))
    reporter.done("merge")
    if kind == "bars":
        assert [(task.total, task.completed) for task in progress.tasks] == [(2000, 2000)]
    else:
        assert untimed("\n".join([*log, capsys.readouterr().err]))[-1] == "merge: 2000 blocks in T s"
