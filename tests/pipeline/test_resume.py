"""Runs that go on where another ended, wave by wave: the version of an undisturbed run, whatever happened in between."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import plan
from pipeline.job import plan_recipe
from pipeline.plan import plan_waves
from pipeline.recipe import load_recipe
from pipeline.stages.intake import RECEIPTS
from pipeline.stages.waves import Waves
from storage.errors import CheckpointError
from storage.local_store import LocalStore
from tests.pipeline.test_invariants import fresh
from tests.support.running import merged, rebuilt
from tests.support.tiny_experts import NAMES, Family

TIES = {"merge.method": "ties", "merge.density": 0.6}


@pytest.mark.parametrize(
    "merge",
    [
        TIES,
        {**TIES, "merge.trim_scope": "model"},
        {"merge.method": "dare", "merge.rescale": "l1"},
        {"merge.method": "byom", "merge.groups": 1},
        {"merge.groups": "auto", "merge.budget": 0.6},
        {"merge.granularity": "model"},
        {"merge.granularity": "layer", "merge.groups": 3},
    ],
    ids=lambda merge: "-".join(map(str, merge.values())),
)
def test_many_waves_rebuild_what_one_does(
    family: Family, merge: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = merged(family.recipe(**merge))
    expected = {name: rebuilt(whole, name, tmp_path / "one") for name in NAMES}
    fresh(family)
    monkeypatch.setattr(plan, "LEAST_WAVE_BYTES", 1)
    cut = merged(family.recipe(**merge, cluster={"kind": "none", "workers": 2}))
    files = [name for name in cut.manifest.files if name.startswith("pool-")]
    assert len(files) == len(plan_recipe(load_recipe(family.recipe(**merge))).waves) > 5
    for name in NAMES:
        found = rebuilt(cut, name, tmp_path / "many")
        assert found.keys() == expected[name].keys()
        assert all(torch.equal(found[tensor], weight) for tensor, weight in expected[name].items())


def test_waves_hold_every_tensor_once_in_order(family: Family) -> None:
    found = plan_recipe(load_recipe(family.recipe()))
    for least in (1, 2000, 1 << 30):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plan, "LEAST_WAVE_BYTES", least)
            waves = plan_waves(found.tensors.values(), 4)
        assert [tensor.name for wave in waves for tensor in wave] == list(found.tensors)
        assert all(waves)


class DeathError(Exception):
    """What ends a run in the middle."""


def dying(real: Callable[[Waves], None]) -> Callable[[Waves], None]:
    """A stage after which the run ends."""

    def stage(waves: Waves) -> None:
        real(waves)
        raise DeathError

    return stage


def edited(path: Path) -> bytes:
    """Change the last byte of a file; what it held."""
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    return content


@pytest.mark.parametrize("source", ["base", "math"])
@pytest.mark.parametrize("dies", [True, False])
def test_work_done_while_a_source_was_another_is_not_believed(
    family: Family, monkeypatch: pytest.MonkeyPatch, source: str, *, dies: bool
) -> None:
    expected = merged(family.recipe(output="../undisturbed", deltas="../other-deltas")).version
    path, real, content = family.folder / source / "model.safetensors", Waves.group, b""

    def group(waves: Waves) -> None:
        nonlocal content
        while "ingest written" not in waves.moved and not waves._ingested[-1].done():
            time.sleep(0.01)
        content = edited(path)
        real(waves)

    monkeypatch.setattr(Waves, "group", group)
    if dies:
        monkeypatch.setattr(Waves, "merge", dying(Waves.merge))
    with pytest.raises((DeathError, CheckpointError), match=None if dies else "changed while the run read it"):
        merged(family.recipe())
    monkeypatch.undo()
    path.write_bytes(content)
    assert merged(family.recipe()).version == expected
    assert merged(family.recipe(output="../again")).version == expected


def test_a_source_that_was_another_for_a_while_stops_the_run(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = family.folder / "base" / "model.safetensors", Waves.group

    def group(waves: Waves) -> None:
        content = edited(path)
        real(waves)
        path.write_bytes(content)

    monkeypatch.setattr(Waves, "group", group)
    with pytest.raises(CheckpointError, match=r"base: .*changed while the run read it"):
        merged(family.recipe())


@pytest.mark.parametrize(("kind", "merge"), [("tables", {}), ("counts", TIES)])
def test_unfinished_work_that_is_lost_or_damaged_is_done_again(
    family: Family, monkeypatch: pytest.MonkeyPatch, kind: str, merge: dict[str, Any]
) -> None:
    expected = merged(family.recipe(**merge, output="../undisturbed", deltas="../other-deltas")).version
    monkeypatch.setattr(Waves, "merge", dying(Waves.merge))
    with pytest.raises(DeathError):
        merged(family.recipe(**merge))
    monkeypatch.undo()
    for thresholds in (family.folder.parent / "deltas").glob("*/thresholds"):
        shutil.rmtree(thresholds)
    files = sorted((family.folder.parent / "output" / ".work").glob(f"*/{kind}/**/*.npz"))
    assert len(files) > 3
    files[0].write_bytes(files[0].read_bytes()[:-40])
    files[1].unlink()
    assert merged(family.recipe(**merge)).version == expected


def test_a_second_attempt_with_another_budget_goes_on(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = merged(family.recipe(output="../undisturbed")).version
    monkeypatch.setattr(Waves, "pack", dying(Waves.pack))
    with pytest.raises(DeathError):
        merged(family.recipe())
    monkeypatch.undo()
    again = merged(family.recipe(cluster={"kind": "none", "memory": "1GiB"}))
    assert again.version == expected
    assert again.manifest.moved["ingest read"] == again.manifest.moved["similarity read"] == 0


def test_a_run_that_died_when_a_source_was_just_in_leaves_no_receipts(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """Death between the record of a source, which the receipts become part of, and their removal."""
    recipe = family.recipe(cluster={"kind": "none", "workers": 1})
    own = LocalStore.clear

    def clear(store: LocalStore, prefix: str) -> None:
        if prefix == RECEIPTS:
            raise DeathError
        own(store, prefix)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "clear", clear)
        with pytest.raises(DeathError):
            merged(recipe)
    deltas = Path(load_recipe(recipe).deltas)
    assert list(deltas.rglob(f"{RECEIPTS}/*/*.json"))
    assert merged(recipe).new
    assert not list(deltas.rglob(RECEIPTS))
