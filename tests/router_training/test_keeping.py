"""Checkpoints in a store: a training whose folder is lost with its machine goes on in another one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from router_training.bert import train
from router_training.keeping import Keeper, Kept, last_whole
from storage.errors import StoreError
from storage.local_store import LocalStore
from storage.stores import Store
from tests.router_training.test_bert import TEXTS, noisy, silent, validation_of
from tests.support.encoders import Settings, write_queries
from tests.support.prepared import Written

pytestmark = pytest.mark.usefixtures("one_thread")


class LostError(Exception):
    """What ends a training in the middle."""


def lost_at(update: int, said: list[str]) -> Callable[[str], None]:
    """Listens to a training, and ends it at an update."""

    def tell(line: str) -> None:
        said.append(line)
        if line.startswith("update ") and int(line.split()[1]) >= update:
            raise LostError

    return tell


def misleading(folder: Path) -> Written:
    """Half of the validation's labels are wrong: the best checkpoint is an early one."""
    swapped = {name: list(TEXTS[name]) for name in ("code", "math")}
    for row in range(0, 60, 3):
        swapped["code"][row], swapped["math"][row] = swapped["math"][row], swapped["code"][row]
    return write_queries(folder, swapped, validation=60)


@pytest.mark.parametrize("early_stop", [None, 30])
def test_a_training_goes_on_in_another_folder(source: Path, tmp_path: Path, output: Store, early_stop: int | None) -> None:
    """With an early stop the checkpoint that is best goes along, though later ones were made."""
    prepared = misleading(tmp_path / "queries") if early_stop else write_queries(tmp_path / "queries", noisy())
    settings = Settings(str(source), epochs=4, batch=16, early_stop=early_stop)
    kept = Kept(output.under("checkpoints"), every=0.0)
    steps = -(-(320 if early_stop else 600) // 16)
    with pytest.raises(LostError):
        train(prepared, settings, 3, tmp_path / "first", lost_at(3 * steps, []), kept=kept)
    (training,) = kept.store.children()
    assert len(kept.store.under(training).children()) == (2 if early_stop else 1)
    shutil.rmtree(tmp_path / "first")
    said: list[str] = []
    found = train(prepared, settings, 3, tmp_path / "second", said.append, kept=kept)
    whole = train(prepared, settings, 3, tmp_path / "whole", silent)
    (went_on,) = [line for line in said if line.startswith("goes on from update ")]
    assert int(went_on.rpartition(" ")[2]) > 2 * steps
    texts, _ = validation_of(prepared)
    np.testing.assert_allclose(found.logits(texts), whole.logits(texts), atol=2e-2)
    assert np.ptp(whole.logits(texts)) > 1


def test_another_training_does_not_go_on_from_there(source: Path, tmp_path: Path) -> None:
    prepared = write_queries(tmp_path / "queries", noisy())
    kept = Kept(LocalStore(tmp_path / "store"), every=0.0)
    with pytest.raises(LostError):
        train(prepared, Settings(str(source)), 3, tmp_path / "first", lost_at(30, []), kept=kept)
    said: list[str] = []
    with pytest.raises(LostError):
        train(prepared, Settings(str(source)), 4, tmp_path / "second", lost_at(5, said), kept=kept)
    assert not [line for line in said if line.startswith("goes on")]


def checkpoint(folder: Path, number: int, content: bytes = b"weights") -> Path:
    found = folder / f"checkpoint-{number}"
    found.mkdir(parents=True)
    (found / "model.safetensors").write_bytes(content)
    (found / "whole.json").write_text(json.dumps({"model.safetensors": len(content)}))
    return found


def test_copies_are_made_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("router_training.keeping.time", SimpleNamespace(monotonic=lambda: now[0]))
    store = LocalStore(tmp_path / "store")
    keeper = Keeper(store, 60.0)
    for number, (seconds, expected) in enumerate([(130.0, None), (160.0, 1), (219.0, 1), (221.0, 3), (222.0, 3)]):
        now[0] = seconds
        keeper.keep([checkpoint(tmp_path / "work", number)])
        assert store.children() == ([] if expected is None else [f"checkpoint-{expected}"])


def test_the_best_is_copied_before_what_refers_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order of their numbers, which is not that of their names; what fails in between leaves no orphan."""
    store, copied = LocalStore(tmp_path / "store"), []
    own = LocalStore.upload

    def upload(to: LocalStore, key: str, *pieces: Any, **size: Any) -> None:
        copied.append(f"{to.path.name}/{key}")
        if len(copied) == 3:
            raise StoreError("the store answers 503")
        own(to, key, *pieces, **size)

    monkeypatch.setattr(LocalStore, "upload", upload)
    checkpoints = [checkpoint(tmp_path / "work", number) for number in (90, 100)]
    with pytest.raises(StoreError):
        Keeper(store, 0.0).keep(checkpoints)
    assert copied[:2] == ["checkpoint-90/model.safetensors", "checkpoint-90/whole.json"]
    Keeper(store, 0.0).restore(tmp_path / "again")
    assert [path.name for path in (tmp_path / "again").iterdir()] == ["checkpoint-90"]


def test_a_store_that_fails_does_not_end_a_training(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = iter(range(3))
    own = Keeper.keep

    def keep(keeper: Keeper, checkpoints: Any) -> None:
        if next(failures, None) is not None:
            raise StoreError("the store answers 503.")
        own(keeper, checkpoints)

    monkeypatch.setattr(Keeper, "keep", keep)
    prepared = write_queries(tmp_path / "queries", {name: texts[:100] for name, texts in TEXTS.items()})
    kept = Kept(LocalStore(tmp_path / "store"), every=0.0)
    said: list[str] = []
    train(prepared, Settings(str(source)), 3, tmp_path / "work", said.append, kept=kept)
    assert said.count("the store answers 503. A checkpoint was not copied; the training goes on.") == 3
    assert list((tmp_path / "store").rglob("whole.json"))


def test_what_was_copied_in_part_is_not_gone_on_from(tmp_path: Path) -> None:
    store, folder = LocalStore(tmp_path / "store"), tmp_path / "work"
    for number in (9, 10, 100):
        checkpoint(Path(store.place), number)
    (Path(store.place) / "checkpoint-100" / "whole.json").unlink()  # it is copied last
    Keeper(store, 0.0).restore(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-10", "checkpoint-9"]
    assert last_whole(folder) == folder / "checkpoint-10"
    own = checkpoint(tmp_path / "own", 3)
    Keeper(store, 0.0).restore(own.parent)  # what lies here is from this training's last process
    assert [path.name for path in own.parent.iterdir()] == ["checkpoint-3"]
    Keeper(LocalStore(tmp_path / "none"), 0.0).restore(tmp_path / "empty")
    assert last_whole(tmp_path / "empty") is None
