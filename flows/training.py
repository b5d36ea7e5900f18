"""The router's part of a run: its queries are prepared while experts come in, it is trained when the weights are packed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.engine import Reporter
from pipeline.recipe import RouterSection
from pipeline.router_inputs import RouterInputs
from storage.stores import Store
from storage.trees import copy_down, copy_up

QUERIES = "queries"
"""The step, and the folder, of prepared queries."""


@dataclass
class RouterTraining:
    """A router's training."""

    inputs: RouterInputs
    seed: int
    staged: Store
    """The version to be: the router's files go below ``router`` there."""
    shared: Store
    """A place of this training's own in the run's unfinished work, where the next run of the same inputs goes on."""
    folder: Path
    """The same place, where it is a folder; else one of this machine, and what another one must find is copied."""
    reporter: Reporter
    check: Callable[[], None]
    """Raises when the run is given up."""
    prepared: Any = None
    seconds: dict[str, float] = field(default_factory=dict)
    """By step."""

    @property
    def section(self) -> RouterSection:
        """With its sources pinned."""
        return self.inputs.section

    @property
    def steps(self) -> Mapping[str, Callable[[], None]]:
        """What can be done beforehand."""
        return {} if self.section.kind == "none" else {QUERIES: self.prepare}

    def prepare(self) -> None:
        """Read, mix and split the queries. QueryDataError lists all that is wrong with them."""
        from router_training import data
        from router_training.tasks import on_dask

        self.reporter.start(QUERIES, 1)
        started = time.perf_counter()
        folder, copies = self.folder / QUERIES, self.shared.under(QUERIES)
        if not self.shared.is_local and not folder.exists():
            copy_down(copies, folder, last=data.RECORD)
        self.prepared = data.prepare(self.section, self.seed, folder, partial(on_dask, check=self.check))
        if not self.shared.is_local and _content(copies, data.RECORD) != (folder / data.RECORD).read_bytes():
            copies.delete([data.RECORD])  # before what it speaks of
            copies.clear("")
            copy_up(folder, copies, last=data.RECORD)
        self.seconds[QUERIES] = round(time.perf_counter() - started, 3)
        trained = sum(counts["train"] for counts in self.prepared.counts.values())
        self.reporter.advance(QUERIES, f"{trained} to train on")
        self.reporter.done(QUERIES)

    def train(self) -> dict[str, Any] | None:
        """Train the router into what is staged; what was measured of it, None when the recipe wants none."""
        if self.section.kind == "none":
            return None
        from router_training.attempt import Place
        from router_training.keeping import Kept
        from router_training.placement import train_placed
        from router_training.training import Training

        self.reporter.start("router", 1)
        self.staged.clear("router")
        kept = None if self.shared.is_local else Kept(self.shared.under("checkpoints"))
        encoder = self.inputs.encoder.files if self.inputs.encoder else {}
        training = Training(self.section, self.seed, self.prepared, kept, encoder)
        place = Place(self.folder, self.shared, self.staged.under("router"))
        started = time.perf_counter()
        record = train_placed(training, place, self.reporter.note if self.section.kind == "bert" else _unsaid)
        self.seconds["router"] = round(time.perf_counter() - started, 3)
        self.reporter.advance("router", self.section.kind)
        self.reporter.done("router")
        return {**record, "seconds": {"prepare": self.seconds[QUERIES], **record["seconds"]}}


def _content(store: Store, name: str) -> bytes | None:
    try:
        return store.get(name)
    except FileNotFoundError:
        return None


def _unsaid(line: str) -> None:
    """A linear router is trained in seconds."""


@contextmanager
def router_training(
    inputs: RouterInputs,
    seed: int,
    staged: Store,
    work: Store,
    reporter: Reporter,
    check: Callable[[], None] = lambda: None,
) -> Iterator[RouterTraining]:
    """The training of a run. ``work``: the run's unfinished work, which outlives a run that is killed."""
    shared = work.under("router")
    with ExitStack() as stack:
        if shared.is_local:
            folder = Path(shared.place)
        else:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="channel-merging-router-")))
        yield RouterTraining(inputs, seed, staged, shared, folder, reporter, check)
