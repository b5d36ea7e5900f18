"""What goes into a run and what is kept of it: inputs, sources edited meanwhile, tables, finished experts."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from flows.run import Conductor, run_recipe
from pipeline.engine import Silent, ThreadEngine
from pipeline.job import plan_recipe
from pipeline.ledger import Ledger
from pipeline.recipe import load_recipe
from pipeline.stages.waves import Waves
from storage.arrays import ArrayGroup
from storage.artifact import Artifact
from storage.errors import CheckpointError, PlanError, QueryDataError, StoreError
from tests.pipeline.test_invariants import assert_same_bits, router_of
from tests.support.reference import as_float64, ulps
from tests.support.running import before_all, merged, rebuilt
from tests.support.tiny_experts import NAMES, Family, write_checkpoint

UP = "model.layers.1.mlp.up_proj.weight"


def replace_weights(family: Family, name: str, tensors: dict[str, torch.Tensor]) -> None:
    shutil.rmtree(family.folder / name)
    write_checkpoint(family.folder / name, tensors)


def test_deltas_below_the_bases_precision_count(family: Family, tmp_path: Path) -> None:
    """fp32 experts of a bf16 base: clustered and merged by their own values, rounded once at the end."""
    generator = torch.Generator().manual_seed(5)
    one, two = (torch.randn(24, 16, generator=generator) * 1e-5 for _ in range(2))
    wide = {}
    for name, delta in zip(NAMES, (one, two, one * 1.5, two * 1.5), strict=True):
        wide[name] = {t: x.float() for t, x in family.experts[name].items()}
        wide[name][UP] = family.base[UP].float() + delta
        replace_weights(family, name, wide[name])
    outcome = merged(family.recipe(**{"merge.groups": 2, "merge.scaling": 100.0}))
    rows = np.stack([Artifact(outcome.path).expert_rows(name)[UP] for name in NAMES])
    assert (rows[0] == rows[2]).all()
    assert (rows[1] == rows[3]).all()
    assert (rows[0] != rows[1]).all()
    base = as_float64(family.base[UP])
    plain = base + 100 * sum(as_float64(wide[name][UP]) - base for name in ("chinese", "instruct"))
    assert ulps(rebuilt(outcome, "chinese", tmp_path)[UP], plain).max() <= 1


def test_equal_bits_of_two_types_are_not_equal_rows(family: Family, tmp_path: Path) -> None:
    norm = family.experts["chinese"]["model.norm.weight"]
    half = {t: x.half() for t, x in family.experts["code"].items()}
    half["model.norm.weight"] = norm.view(torch.int16).view(torch.float16)
    replace_weights(family, "code", half)
    outcome = merged(family.recipe(**{"merge.groups": 4}))
    found = rebuilt(outcome, "code", tmp_path)["model.norm.weight"]
    assert torch.equal(found, half["model.norm.weight"].bfloat16())
    assert not torch.equal(found, norm)


def test_renamed_experts_share_the_table(family: Family) -> None:
    """Tables are ordered by id: other names over the same experts give what a fresh run gives."""
    merged(family.recipe(experts={"a": "./code", "b": "./chinese", "c": "./math", "d": "./instruct"}))
    other = {"d": "./code", "c": "./chinese", "b": "./math", "a": "./instruct"}
    found = merged(family.recipe(experts=other))
    assert found.manifest.moved["similarity read"] == 0
    for folder in ("deltas", "output"):
        shutil.rmtree(family.folder.parent / folder)
    assert merged(family.recipe(experts=other)).version == found.version


def test_spans_carry_their_digest(family: Family) -> None:
    outcome = merged(family.recipe())
    artifact = Artifact(outcome.path)
    for tensor, record in outcome.manifest.tensors.items():
        for span in record.spans:
            indices = np.arange(span.start, span.start + span.rows, dtype=np.int32)
            assert hashlib.sha256(artifact.rows(tensor, indices).tobytes()).hexdigest() == span.sha256


def test_weights_and_queries_are_inputs(family: Family) -> None:
    router = router_of(family)
    first = merged(family.recipe(router=router))
    weighted = {name: {"source": f"./{name}", "weight": 3.0 if name == "code" else 1.0} for name in NAMES}
    second = merged(family.recipe(router=router, experts=weighted))
    path = family.folder / "code.jsonl"
    path.write_text(path.read_text() + '\n{"text": "one more code question"}')
    third = merged(family.recipe(router=router))
    fourth = merged(family.recipe(router=router))
    assert [run.new for run in (first, second, third, fourth)] == [True, True, True, False]
    assert len({run.version for run in (first, second, third)}) == 3


@pytest.mark.parametrize("label", ["base", "math"])
def test_a_source_edited_after_ingest_is_never_published(family: Family, monkeypatch: pytest.MonkeyPatch, label: str) -> None:
    path, real = family.folder / label / "config.json", Waves.merge

    def edit(*arguments: Any) -> Any:
        path.write_text(path.read_text() + " ")
        return real(*arguments)

    monkeypatch.setattr(Waves, "merge", edit)
    with pytest.raises(CheckpointError, match=f"{label}: .*config.json changed while the run read it"):
        merged(family.recipe())
    assert list((family.folder.parent / "output").glob("*/manifest.json")) == []


def test_queries_edited_during_a_run_are_never_published(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = family.folder / "code.jsonl", Waves.merge

    def edit(*arguments: Any) -> Any:
        path.write_text(path.read_text() + '\n{"text": "meanwhile"}')
        return real(*arguments)

    recipe = family.recipe(router=router_of(family))
    monkeypatch.setattr(Waves, "merge", edit)
    with pytest.raises(QueryDataError, match=r"router.queries.code: the file changed while the run read it"):
        merged(recipe)


def test_other_permissions_stop_nothing(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = family.folder / "math" / "config.json", Waves.merge

    def touch(*arguments: Any) -> Any:
        path.chmod(0o600)
        return real(*arguments)

    monkeypatch.setattr(Waves, "merge", touch)
    assert merged(family.recipe()).new


def test_a_base_edited_during_ingest_leaves_no_group(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    path = family.folder / "base" / "model.safetensors"
    raw = path.read_bytes()

    before_all(monkeypatch, lambda: path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1])))
    with pytest.raises(CheckpointError, match=r"base: .*changed"):
        merged(family.recipe())
    assert list((family.folder.parent / "deltas").rglob("complete.json")) == []


def test_experts_before_a_failure_are_kept(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """One expert with a NaN, another whose ingest dies: the others are not read again."""
    path = family.expert("math") / "model.safetensors"
    original = path.read_bytes()
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    tensors[UP][0, 0] = torch.nan
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=f"expert math: tensor {UP}: 1 of 384 values"):
        merged(family.recipe())
    complete = [p.parent for p in (family.folder.parent / "deltas").rglob("complete.json")]
    assert len(complete) == 3
    path.write_bytes(original)
    real = ThreadEngine.run
    ingested: list[str] = []

    def recorded(self: ThreadEngine, stage: str, function: Any, tasks: Any, labels: Any, priority: int = 0) -> Any:
        if stage == "ingest":
            ingested.extend(label.partition(" ")[0] for label in labels)
        return real(self, stage, function, tasks, labels, priority)

    monkeypatch.setattr(ThreadEngine, "run", recorded)
    assert merged(family.recipe()).new
    assert set(ingested) == {"math"}


def test_a_base_that_is_no_number_is_refused(family: Family) -> None:
    path = family.folder / "base" / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    tensors[UP][0, 0] = torch.nan
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=f"base: tensor {UP}: 1 of"):
        merged(family.recipe())


def test_finite_values_that_overflow_in_a_difference_are_named(family: Family) -> None:
    base = {name: tensor.float() for name, tensor in family.base.items()}
    base[UP][0, 0] = 3e38
    replace_weights(family, "base", base)
    for name in NAMES:
        wide = {t: x.float() for t, x in family.experts[name].items()}
        wide[UP][0, 0] = -3e38 if name == "math" else 3e38
        replace_weights(family, name, wide)
    with pytest.raises(CheckpointError, match=rf"tensor {UP}: \d+ merged or cast values are not finite in F32"):
        merged(family.recipe(**{"merge.groups": 1}))


def test_a_table_that_lost_a_chunk_is_mended(family: Family) -> None:
    first = merged(family.recipe())
    (chunk,) = (family.folder.parent / "deltas").glob(f"*/tables/*/gram/{UP}/c.0.0.0")
    chunk.unlink()
    shutil.rmtree(family.folder.parent / "output")
    assert merged(family.recipe()).version == first.version
    assert chunk.is_file()


def test_chunks_are_listed_with_size_and_checksum(family: Family) -> None:
    merged(family.recipe())
    records = list((family.folder.parent / "deltas").rglob("complete.json"))
    assert len(records) == 5
    for path in records:
        listed = json.loads(path.read_bytes())["chunks"]
        assert set(listed) == {p.relative_to(path.parent).as_posix() for p in path.parent.rglob("c.*")}
        for key, (size, digest) in listed.items():
            raw = (path.parent / key).read_bytes()
            assert (len(raw), raw[-4:][::-1].hex()) == (size, digest)


def test_rows_beyond_the_base_stay_exact_with_scaled_singletons(family: Family, tmp_path: Path) -> None:
    name = "model.embed_tokens.weight"
    rules = [{"match": name, "policy": "merge", "groups": 2}]
    outcome = merged(family.recipe(**{"merge.singleton": "scale", "merge.rules": rules}))
    for expert in NAMES:
        assert torch.equal(rebuilt(outcome, expert, tmp_path)[name][20:], family.experts[expert][name][20:])


def test_nothing_is_left_of_a_finished_run_and_others_work_is_kept(family: Family) -> None:
    work = family.folder.parent / "output" / ".work"
    (work / "another" / "staged").mkdir(parents=True)
    (work / "another" / "staged" / "pool").write_bytes(b"x" * 1000)
    outcome = merged(family.recipe())
    assert [path.name for path in work.iterdir() if path.is_dir()] == ["another"]
    assert list(outcome.path.parent.rglob("*.part")) == []


def test_parameters_count_the_pool(family: Family) -> None:
    outcome = merged(family.recipe())
    pool = load_file(outcome.path / "pool-00001-of-00001.safetensors")
    assert outcome.manifest.parameters.pool == sum(tensor.numel() for tensor in pool.values())
    assert outcome.manifest.parameters.ratio == outcome.manifest.parameters.pool / outcome.manifest.parameters.experts


def test_a_rule_without_effect_is_noted(family: Family) -> None:
    rules = [{"match": "*layer.0*", "policy": "private"}, {"match": "*layers.0.*", "policy": "private"}]
    plan = plan_recipe(load_recipe(family.recipe(**{"merge.rules": rules})))
    noted = [note for note in plan.notes if "merge.rules" in note]
    assert noted == ["merge.rules.0: '*layer.0*' is the first match of no tensor and has no effect"]


def test_empty_checkpoints_are_refused(family: Family) -> None:
    for name in ("base", *NAMES):
        replace_weights(family, name, {})
    with pytest.raises(PlanError, match="base: it has no tensors"):
        merged(family.recipe())


def test_an_expert_under_two_names_is_ingested_once(family: Family, tmp_path: Path) -> None:
    outcome = merged(family.recipe(experts={"a": "./math", "b": "./math", "c": "./code"}, **{"merge.groups": 2}))
    assert len(list((family.folder.parent / "deltas").glob("*/*/complete.json"))) == 2
    for name in ("a", "b"):
        assert_same_bits(rebuilt(outcome, name, tmp_path), family.experts["math"])


def test_a_second_attempt_at_an_expert_goes_on_after_the_first(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that was done before the attempt failed is not done again, in the same wave either."""
    real_write, real_keep, lock = ArrayGroup.write, Ledger.write, threading.Lock()
    kept: list[tuple[str, str]] = []
    failed: list[str] = []

    def write(group: ArrayGroup, arrays: Any) -> Any:
        with lock:
            if kept and not failed and any(group.store.place in place for place, _ in kept):
                failed.append(group.store.place)
                raise StoreError("no answer")
        return real_write(group, arrays)

    def keep(ledger: Any, key: str, *rest: Any) -> None:
        real_keep(ledger, key, *rest)
        with lock:
            kept.append((ledger.store.place, key))

    class Again(Conductor):
        def step(self, name: str, body: Callable[[], Any], check: Callable[[], None] = lambda: None) -> Any:
            try:
                return body()
            except StoreError:
                return body()

    monkeypatch.setattr(ArrayGroup, "write", write)
    monkeypatch.setattr(Ledger, "write", keep)
    recipe = load_recipe(family.recipe(**{"cluster.kind": "none", "cluster.workers": 1, "cluster.memory": "40kB"}))
    outcome = run_recipe(recipe, Silent(), Again())
    assert len(failed) == 1
    ingested = [one for one in kept if failed[0] in one[0]]
    assert len(ingested) >= 3
    assert len(set(kept)) == len(kept)
    assert Artifact(outcome.path).verify() == []
