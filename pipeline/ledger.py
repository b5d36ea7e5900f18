"""Receipts that outlive a run: what a block came to is written beside the work, and found by the next run.

A block is done when there is a receipt under its key, which covers everything the block depends on, and the receipt's own
digest is right; that some file exists proves nothing. Receipts are JSON: they come from a store that others can write to.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Generic, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from pipeline.engine import Engine
from storage.digests import digest_of
from storage.stores import Store

AT_ONCE = 16
"""Receipts that are read at once."""
KEY_LENGTH = 40

Task = TypeVar("Task")
Receipt = TypeVar("Receipt")


@lru_cache(maxsize=32)
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def block_key(*covered: Any) -> str:
    """The key of a block: a digest of JSON values that cover all it depends on, beside what its ledger's place covers."""
    return digest_of(covered)[:KEY_LENGTH]


@dataclass(frozen=True)
class Ledger(Generic[Receipt]):
    """Receipts of one kind, a dataclass of numbers, texts and lists, in a folder of a store. It pickles."""

    store: Store
    kind: type[Receipt]

    def write(self, key: str, receipt: Receipt, run: str) -> None:
        """Keep a receipt of a run; over one of the same key, which says the same."""
        body = json.dumps(asdict(receipt), sort_keys=True)  # type: ignore[call-overload]  # infinities and NaNs as Python has them
        record = {"receipt": body, "run": run, "digest": digest_of([key, run, body])}
        self.store.put(f"{key}.json", json.dumps(record).encode())

    def keys(self) -> list[str]:
        """The keys of all receipts."""
        return [name.removesuffix(".json") for name in self.store.children() if name.endswith(".json")]

    def read(self, keys: Iterable[str]) -> dict[str, Receipt]:
        """The receipts under these keys, as far as there are any that are whole."""
        known = set(self.keys())
        wanted = [key for key in keys if key in known]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            found = dict(zip(wanted, pool.map(self._one, wanted), strict=True))
        return {key: receipt for key, receipt in found.items() if receipt is not None}

    def _one(self, key: str, run: str | None = None) -> Receipt | None:
        """The receipt under a key, of this run if one is named."""
        try:
            found = json.loads(self.store.get(f"{key}.json"))
            if found["digest"] != digest_of([key, found["run"], found["receipt"]]) or run not in (None, found["run"]):
                return None
            receipt: Receipt = _adapter(cast("Any", self.kind)).validate_python(json.loads(found["receipt"]))
        except (FileNotFoundError, ValueError, KeyError, TypeError, ValidationError):
            return None  # none, or damaged: the block is done again
        return receipt

    def of_run(self, key: str, run: str) -> Receipt | None:
        """The receipt that this very run has written, if it has: its worker may have died before it could tell."""
        return self._one(key, run)


@dataclass(frozen=True)
class Item(Generic[Task, Receipt]):
    """One block of a stage."""

    task: Task
    label: str
    """What a person calls it."""
    key: str
    ledger: Ledger[Receipt]


@dataclass(frozen=True)
class _Kept(Generic[Task, Receipt]):
    """A function over blocks that leaves receipts."""

    function: Callable[[Task], Receipt]
    run: str

    def __call__(self, item: Item[Task, Receipt]) -> Receipt:
        receipt = item.ledger.of_run(item.key, self.run)
        if receipt is None:
            receipt = self.function(item.task)
            item.ledger.write(item.key, receipt, self.run)
        return receipt


@dataclass(frozen=True)
class Work(Generic[Task, Receipt]):
    """What a stage does to blocks."""

    stage: str
    function: Callable[[Task], Receipt]
    priority: int = 0
    """Of two stages that wait for a worker, the higher goes first."""

    def run(self, engine: Engine, items: Sequence[Item[Task, Receipt]]) -> list[Receipt]:
        """Do all of these, whatever receipts there are; receipts in their order."""
        if not items:
            return []
        labels = [item.label for item in items]
        return engine.run(self.stage, _Kept(self.function, uuid.uuid4().hex), items, labels, priority=self.priority)

    def resume(
        self, engine: Engine, items: Sequence[Item[Task, Receipt]], holds: Callable[[Item[Task, Receipt], Receipt], bool]
    ) -> tuple[list[Receipt], list[Receipt]]:
        """Do those of these that have no receipt, or one that does not hold: receipts of all in order, and those of now."""
        known: dict[str, Receipt] = {}
        by_key = {item.key: item for item in items}
        for ledger in {item.ledger: None for item in items}:
            found = ledger.read(item.key for item in items if item.ledger == ledger)
            known |= {key: receipt for key, receipt in found.items() if holds(by_key[key], receipt)}
        if known:
            engine.reporter.skip(self.stage, len(known))
        left = [item for item in items if item.key not in known]
        fresh = self.run(engine, left)
        done = known | {item.key: receipt for item, receipt in zip(left, fresh, strict=True)}
        return [done[item.key] for item in items], fresh
