"""What a run says of its progress, on a terminal, in a pipe and in a flow's log."""

from __future__ import annotations

import io
import logging
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from uuid import UUID, uuid4

import pytest
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn

from flows.deployed import reporting
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
    monkeypatch.setattr(reporting, "get_run_logger", lambda: logger)
    return lines


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[float]]:
    """Key of a progress artifact -> where it stood, one after the other."""
    keys: dict[UUID, str] = {}
    found: dict[str, list[float]] = {}

    def create(percent: float, *, key: str, description: str) -> UUID:
        keys[identity := uuid4()] = key
        found[key] = [percent]
        return identity

    def update(identity: UUID, percent: float, description: str) -> None:
        found[keys[identity]].append(percent)

    monkeypatch.setattr(reporting, "create_progress_artifact", create)
    monkeypatch.setattr(reporting, "update_progress_artifact", update)
    return found


@pytest.mark.usefixtures("shown")
def test_a_flow_logs_when_stages_begin_and_end(log: list[str]) -> None:
    report(reporter := reporting.FlowReporter())
    reporter.close()
    begins = ["ingest: begins", "ingest: 1 of 2 blocks, last layer 1", "merge: begins"]
    assert untimed("\n".join(log)) == [*begins, *SUMMARIES[:3], "pack: begins", SUMMARIES[3], "over [bold]"]


@pytest.mark.usefixtures("shown")
def test_a_flow_logs_where_a_long_stage_is(log: list[str]) -> None:
    report(reporter := reporting.FlowReporter(log_every=0.0))
    reporter.close()
    assert "ingest: 2 of 3 blocks, last layer 2" in log


@pytest.mark.usefixtures("log")
def test_progress_artifacts_move_to_where_a_stage_is_and_never_back(shown: dict[str, list[float]]) -> None:
    reporter = reporting.FlowReporter("Our recipe", show_every=0.0)
    reporter.expected = {"ingest": 4}
    report(reporter)
    reporter.close()
    assert shown.keys() == {f"our-recipe-{stage}" for stage in ("ingest", "merge", "pack")}, "of stages with blocks"
    for moves in shown.values():
        assert moves == sorted(moves)
        assert moves[-1] == 100


@pytest.mark.usefixtures("log")
def test_a_stage_that_stands_still_is_shown_where_it_stands(shown: dict[str, list[float]]) -> None:
    """The last of several quick moves is not lost; four blocks are expected, more than are known yet."""
    reporter = reporting.FlowReporter("r", show_every=0.01)
    reporter.expected = {"ingest": 4}
    reporter.start("ingest", 2)
    reporter.advance("ingest", "layer 1")
    reporter.advance("ingest", "layer 2")
    while shown["r-ingest"][-1] != 50:
        time.sleep(0.01)
    reporter.close()


@pytest.mark.usefixtures("shown")
def test_a_server_that_does_not_answer_costs_the_picture_alone(log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no answer")

    monkeypatch.setattr(reporting, "update_progress_artifact", fail)
    reporter = reporting.FlowReporter("r", show_every=0.0)
    report(reporter)
    reporter.close()
    assert {f"progress of r: {line} is not shown: no answer" for line in ("pack, nothing to do, 4 found finished",)} <= set(log)
    monkeypatch.setattr(reporting, "create_progress_artifact", fail)
    report(reporter := reporting.FlowReporter("r"))
    reporter.close()
    assert "no progress is shown for r-merge: no answer" in log


@pytest.mark.usefixtures("shown")
@pytest.mark.parametrize("kind", ["lines", "bars", "flow"])
def test_no_count_is_lost_between_threads(kind: str, log: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(MofNCompleteColumn(), console=Console(file=io.StringIO()), auto_refresh=False)
    made: dict[str, Callable[[], Reporter]]
    made = {"lines": LineReporter, "bars": lambda: BarReporter(progress), "flow": reporting.FlowReporter}
    reporter = made[kind]()

    def work(number: int) -> None:
        reporter.start("merge", 10)
        for _ in range(10):
            reporter.advance("merge", "layer")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(200)))
    reporter.done("merge")
    if isinstance(reporter, reporting.FlowReporter):
        reporter.close()  # or it shows the rest when the test is over, to a server that it starts
    if kind == "bars":
        assert [(task.total, task.completed) for task in progress.tasks] == [(2000, 2000)]
    else:
        assert untimed("\n".join([*log, capsys.readouterr().err]))[-1] == "merge: 2000 blocks in T s"
