"""Progress of a flow run: its log, and one progress artifact per stage that moves while blocks finish."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import copy_context
from logging import Logger, LoggerAdapter
from typing import Any, cast
from uuid import UUID

import dask
from prefect import get_run_logger
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.runtime import task_run
from slugify import slugify

from flows.progress import StageCount, StageCounts

SHOWN = ("ingest", "similarity", "merge", "pack", "sweep")
"""Stages that have a progress artifact: the others are one step."""
LOG_EVERY_S = 30.0
SHOW_EVERY_S = 2.0
"""How often progress artifacts move at most: they are for eyes, and each move is a request."""


def key_of(*parts: str) -> str:
    """The key of an artifact: Prefect takes small letters, digits and dashes."""
    return slugify(" ".join(parts))


class Progress:
    """Moves progress artifacts, in a thread of its own: a server that is slow or gone must not slow what it shows."""

    def __init__(self, logger: Logger | LoggerAdapter[Any], every: float = SHOW_EVERY_S) -> None:
        self._logger = logger
        self._every = every
        self._changed = threading.Condition()
        self._latest: dict[UUID, tuple[float, str]] = {}
        self._closing = False
        context = copy_context()  # which server it is, and whose artifacts
        self._thread = threading.Thread(target=context.run, args=(self._work,), name="progress", daemon=True)
        self._thread.start()

    def create(self, key: str, text: str) -> UUID | None:
        """A new artifact of the task run or flow run that calls; None when the server does not take it."""
        try:
            return cast("UUID", create_progress_artifact(0.0, key=key, description=text))
        except Exception as error:  # what is shown is no reason to fail
            self._logger.warning("no progress is shown for %s: %s", key, error)
            return None

    def move(self, artifact: UUID, percent: float, text: str) -> None:
        """Let an artifact say this, soon: of several moves the last one counts."""
        with self._changed:
            self._latest[artifact] = percent, text
            self._changed.notify()

    def close(self) -> None:
        """Show what is left; not for long, should the server be gone."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout=10)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._latest or self._closing)
                if not self._latest:
                    return
                moves, self._latest = self._latest, {}
            for artifact, (percent, text) in moves.items():
                try:
                    update_progress_artifact(artifact, percent, text)
                except Exception as error:
                    self._logger.warning("progress of %s is not shown: %s", text, error)
            with self._changed:
                self._changed.wait_for(lambda: self._closing, timeout=self._every)


class FlowReporter:
    """Logs when a stage begins and ends, and blocks now and then: the first of each task run too. Moves progress artifacts.

    A line is logged by the task run that it is of. ``stages``: those that have an artifact. ``expected``: blocks of a stage in
    a first run, as far as they are known beforehand: what is reported grows wave by wave.
    """

    def __init__(
        self,
        recipe: str = "run",
        stages: Collection[str] = SHOWN,
        log_every: float = LOG_EVERY_S,
        show_every: float = SHOW_EVERY_S,
    ) -> None:
        self.expected: Mapping[str, int] = {}
        self._recipe = recipe
        self._stages = stages
        self._counts = StageCounts()
        self._progress = Progress(get_run_logger(), show_every)
        self._log_every = log_every
        self._lock = threading.Lock()
        self._logged: dict[tuple[str, object], float] = {}
        """Stage and task run -> when a block was logged last."""
        self._shown: dict[str, tuple[UUID | None, float]] = {}
        """Stage -> its artifact, and where it stands."""

    def start(self, stage: str, total: int) -> None:
        count, _ = self._counts.add(stage, total=total)
        self._begin(stage, count)

    def skip(self, stage: str, count: int) -> None:
        counted, _ = self._counts.add(stage, skipped=count)
        self._begin(stage, counted)

    def _begin(self, stage: str, count: StageCount) -> None:
        with self._lock:
            begun = stage in self._shown
            self._shown.setdefault(stage, (None, 0.0))
        if not begun:
            get_run_logger().info("%s: begins", stage)
            if stage in self._stages:
                artifact = self._progress.create(key_of(self._recipe, stage), f"{self._recipe}: {stage}")
                with self._lock:
                    self._shown[stage] = artifact, self._shown[stage][1]
        self._show(stage, count, "")

    def advance(self, stage: str, label: str) -> None:
        count, _ = self._counts.add(stage, computed=1)
        now, which = time.monotonic(), (stage, task_run.id)
        with self._lock:
            due = count.computed < count.total and now - self._logged.get(which, -math.inf) >= self._log_every
            if due:
                self._logged[which] = now
        if due:
            get_run_logger().info("%s: %d of %d blocks, last %s", stage, count.computed, count.total, label)
        self._show(stage, count, label)

    def _show(self, stage: str, count: StageCount, label: str, *, over: bool = False) -> None:
        with self._lock:
            artifact, stood = self._shown.get(stage, (None, 0.0))
            if artifact is None:
                return
            whole = max(count.total + count.skipped, self.expected.get(stage, 0), 1)
            percent = 100.0 if over else min(99.0, 100.0 * (count.computed + count.skipped) / whole)
            percent = max(stood, percent)
            self._shown[stage] = artifact, percent
            text = f"{self._recipe}: {stage}, {count.summary() if over else label}".removesuffix(", ")
            self._progress.move(artifact, percent, text)

    def done(self, stage: str) -> None:
        count = self._counts.take(stage)
        get_run_logger().info("%s: %s", stage, count.summary())
        self._show(stage, count, "", over=True)
        with self._lock:
            self._logged = {which: when for which, when in self._logged.items() if which[0] != stage}
            self._shown.pop(stage, None)

    def note(self, text: str) -> None:
        get_run_logger().info("%s", text)

    def close(self) -> None:
        """Show what is left."""
        self._progress.close()


@contextmanager
def reporting(recipe: str, stages: Collection[str] = SHOWN) -> Iterator[FlowReporter]:
    """A reporter for the flow run that runs."""
    # Of connections there is nothing to read in a flow's log, and what a cluster loses is told once, as an error.
    dask.config.set({"logging.distributed": "critical"})  # where distributed will be imported, and set its own level
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    reporter = FlowReporter(recipe, stages)
    try:
        yield reporter
    finally:
        reporter.close()
