"""What must hold for every run: exactness at K=N, the plain merge at K=1, and the same bytes wherever it runs."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import Client, LocalCluster

from flows.run import Outcome
from pipeline import memory
from pipeline.job import plan_recipe
from pipeline.recipe import load_recipe
from pipeline.stages import labels
from storage import layout
from storage.artifact import Artifact
from storage.errors import CheckpointError
from tests.support.reference import as_float64, ulps
from tests.support.running import before_all, merged, rebuilt
from tests.support.tiny_experts import NAMES, Family, Tensors, read_checkpoint, write_checkpoint, write_family


def digests(outcome: Outcome) -> dict[str, str]:
    return {name: record.sha256 for name, record in outcome.manifest.files.items() if name not in layout.DOCUMENTS}


def assert_same_bits(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert (
            found[name].numpy(force=True).tobytes() == tensor.numpy(force=True).tobytes()
            if tensor.dtype != torch.bfloat16
            else (torch.equal(found[name].view(torch.int16), tensor.view(torch.int16)))
        ), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("method", ["task_arithmetic", "dare"])
@pytest.mark.parametrize("singleton", ["keep", "scale"])
def test_as_many_groups_as_experts_gives_every_bit_back(
    tmp_path: Path, dtype: torch.dtype, method: str, singleton: str
) -> None:
    family = write_family(tmp_path / "family", dtype)
    changes = {"merge.groups": 4, "merge.method": method, "merge.singleton": singleton, "merge.scaling": 0.5}
    outcome = merged(family.recipe(**changes))
    for name in family.experts:
        assert_same_bits(rebuilt(outcome, name, tmp_path), family.experts[name])


def test_one_group_is_the_plain_merge(family: Family, tmp_path: Path) -> None:
    """K=1 with lambda = 1/N is task arithmetic with 1/N: every expert has the same matrices, base + mean delta."""
    outcome = merged(family.recipe(**{"merge.groups": 1, "merge.singleton": "scale"}))
    experts = {name: rebuilt(outcome, name, tmp_path) for name in NAMES}
    for tensor, record in outcome.manifest.tensors.items():
        if record.policy != "merge":
            continue
        assert record.rows == record.shape[0]
        base = as_float64(family.base[tensor])
        plain = base + sum(as_float64(family.experts[name][tensor]) - base for name in NAMES) / len(NAMES)
        for name in NAMES:
            assert torch.equal(experts[name][tensor], experts[NAMES[0]][tensor])
            assert ulps(experts[name][tensor], plain).max() <= 1


def test_private_tensors_and_new_rows_are_exact(family: Family, tmp_path: Path) -> None:
    outcome = merged(family.recipe())
    for name in NAMES:
        found = rebuilt(outcome, name, tmp_path)
        for tensor, record in outcome.manifest.tensors.items():
            if record.policy == "private":
                assert torch.equal(found[tensor], family.experts[name][tensor])


def test_merged_embeddings_keep_rows_beyond_the_base(family: Family, tmp_path: Path) -> None:
    outcome = merged(family.recipe(**{"merge.rules": [{"match": "*embed_tokens*", "policy": "merge", "groups": 1}]}))
    assert outcome.manifest.tensors["model.embed_tokens.weight"].policy == "merge"
    found = {name: rebuilt(outcome, name, tmp_path)["model.embed_tokens.weight"] for name in NAMES}
    rows = len(family.base["model.embed_tokens.weight"])
    for name in NAMES:
        own = family.experts[name]["model.embed_tokens.weight"]
        assert torch.equal(found[name][:rows], found["code"][:rows])
        assert torch.equal(found[name][rows:], own[rows:])
        assert not torch.equal(found[name][:rows], own[:rows])


def test_policy_base_gives_the_bases_rows(family: Family, tmp_path: Path) -> None:
    outcome = merged(family.recipe(**{"merge.rules": [{"match": "*norm*", "policy": "base"}]}))
    for name in NAMES:
        assert torch.equal(rebuilt(outcome, name, tmp_path)["model.norm.weight"], family.base["model.norm.weight"])
    assert outcome.manifest.tensors["model.norm.weight"].rows == 1


def test_rules_set_groups_per_tensor(family: Family, tmp_path: Path) -> None:
    rules = [{"match": "*layers.0.*", "groups": 4}, {"match": "*layers.*", "groups": 1}]
    outcome = merged(family.recipe(**{"merge.rules": rules}))
    found = rebuilt(outcome, "math", tmp_path)
    exact = {n for n in found if torch.equal(found[n], family.experts["math"][n])}
    assert all((".layers.1." in n and "norm" not in n) != (n in exact) for n in found)


def test_unchanged_experts_share_the_base_row(family: Family) -> None:
    """Special rows of the family: equal, unchanged and negative-zero rows are stored as often as they differ."""
    outcome = merged(family.recipe(**{"merge.groups": 3}))
    artifact = Artifact(outcome.path)
    tensor = "model.layers.0.mlp.up_proj.weight"
    rows = np.stack([artifact.expert_rows(name)[tensor] for name in NAMES], axis=1)
    assert rows[0, 0] == rows[0, 1]  # equal experts
    assert len(set(rows[1])) == 3
    assert rows[2, 2] == rows[2, 3]  # two unchanged, in a group of their own
    assert rows[2, 0] != rows[2, 2]
    assert len(set(rows[3])) == 1
    assert len(set(rows[4])) == 1
    assert len(set(rows[5])) == 2
    pool = artifact.rows(tensor, rows[:, 3].astype(np.int32)).view(np.uint16)
    base = family.base[tensor].view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(pool[[1, 2, 3, 5]], base[[1, 2, 3, 5]])


@pytest.fixture(scope="module")
def running() -> Any:
    """Four real worker processes, and one."""
    with (
        LocalCluster(n_workers=4, threads_per_worker=1, dashboard_address="127.0.0.1:0", silence_logs=50) as four,
        Client(four),
    ):
        yield four.scheduler_address


def fresh(family: Family) -> None:
    """Forget stored deltas and published versions."""
    shutil.rmtree(family.folder.parent / "deltas", ignore_errors=True)
    shutil.rmtree(family.folder.parent / "output", ignore_errors=True)


def test_same_bytes_wherever_it_runs(family: Family, running: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In process, on one and on four workers, tensors whole or in many blocks, a few rows of each at a time."""
    merge = {"merge.method": "dare", "router": router_of(family)}
    expected = merged(family.recipe(**merge))
    blocks: dict[str, int] = {}
    for title, elements, cluster in [
        ("four workers", layout.CHUNK_ELEMENTS, {"address": running}),
        ("one worker", layout.CHUNK_ELEMENTS, {"kind": "local", "workers": 1}),
        ("small blocks in process", 5 * 16, {"kind": "none", "memory": "16KB"}),
        ("small blocks on four workers", 5 * 16, {"address": running, "memory": "16KB"}),
        ("smaller blocks on four workers", 3 * 16, {"address": running, "memory": "8KB"}),
    ]:
        fresh(family)
        monkeypatch.setattr(layout, "CHUNK_ELEMENTS", elements)
        with Client(running) as client:
            client.run(partial(setattr, layout, "CHUNK_ELEMENTS", elements))  # pickled by name: the workers' own module
        recipe = family.recipe(**merge, cluster=cluster)
        plan = plan_recipe(load_recipe(recipe))
        blocks[title] = len(plan.blocks(plan.tensors.values()))
        found = merged(recipe)
        assert found.new
        assert digests(found) == digests(expected), title
        assert found.version == expected.version
    assert blocks["four workers"] == blocks["one worker"] == 5
    assert 30 < blocks["small blocks on four workers"] < blocks["smaller blocks on four workers"]


@pytest.mark.parametrize(
    "merge",
    [
        {"merge.method": "ties", "merge.trim_scope": "model", "merge.density": 0.6},
        {"merge.method": "ties", "merge.trim_scope": "row", "merge.metric": "manhattan"},
        {"merge.method": "dare_ties", "merge.rescale": "l1", "merge.clustering": "sign"},
        {"merge.method": "slerp", "merge.groups": 3, "merge.clustering": "random"},
        {"merge.method": "byom", "merge.groups": 1, "merge.residual": "delta"},
        {"merge.method": "average", "merge.clustering": "sign", "merge.sign": "mass", "merge.granularity": "layer"},
        {"merge.method": "task_arithmetic", "merge.groups": "auto", "merge.budget": 0.6},
        {"merge.method": "dare", "merge.granularity": "model", "merge.metric": "euclidean"},
    ],
    ids=lambda merge: "-".join(map(str, merge.values())),
)
def test_every_option_gives_the_same_bytes_in_any_pieces(
    family: Family, merge: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is found over whole rows, tensors or the model does not depend on blocks, slices or threads."""
    expected = merged(family.recipe(**merge))
    for elements, workers in ((5 * 16, 1), (3 * 16, 3)):
        fresh(family)
        monkeypatch.setattr(layout, "CHUNK_ELEMENTS", elements)
        monkeypatch.setattr(memory, "SLICE_ELEMENTS", elements)
        monkeypatch.setattr(labels, "TABLE_ENTRIES", 16 * workers)
        found = merged(family.recipe(**merge, cluster={"kind": "none", "memory": "16KB", "workers": workers}))
        assert found.new
        assert digests(found) == digests(expected)


def router_of(family: Family) -> dict[str, Any]:
    """Queries for every expert, in files beside the family."""
    queries = {}
    for name in family.experts:
        path = family.folder / f"{name}.jsonl"
        lines = [json.dumps({"text": f"{name} question number {i} about {name[::-1]} {i * 7}"}) for i in range(80)]
        path.write_text("\n".join(lines))
        queries[name] = f"./{path.name}"
    return {"kind": "linear", "queries": queries}


def test_one_row_at_a_time_gives_the_bytes_of_whole_tensors(monkeypatch: pytest.MonkeyPatch, family: Family) -> None:
    expected = merged(family.recipe(**{"merge.method": "dare"}))
    fresh(family)
    monkeypatch.setattr(memory, "SLICE_ELEMENTS", 16)
    found = merged(family.recipe(**{"merge.method": "dare"}))
    assert found.new
    assert digests(found) == digests(expected)


def test_order_and_paths_of_experts_do_not_matter(family: Family, tmp_path: Path) -> None:
    expected = merged(family.recipe())
    moved = tmp_path / "elsewhere"
    shutil.copytree(family.folder, moved)
    other = Family(moved, family.base, dict(reversed(family.experts.items())))
    recipe = other.recipe(output=str(tmp_path / "second"), name="another", deltas=str(tmp_path / "new-deltas"))
    assert list(load_recipe(recipe).experts) == list(reversed(NAMES))
    found = merged(recipe)
    assert found.new
    assert digests(found) == digests(expected)
    assert found.manifest.inputs == expected.manifest.inputs


def test_every_tensor_is_accounted_for(family: Family) -> None:
    outcome = merged(family.recipe())
    tensors = outcome.manifest.tensors
    assert tensors.keys() == family.base.keys()
    artifact = Artifact(outcome.path)
    for name in NAMES:
        rows = artifact.expert_rows(name)
        assert rows.keys() == family.experts[name].keys()
        for tensor, indices in rows.items():
            assert indices.min() >= 0
            owners = {
                i for span in tensors[tensor].spans if name in span.experts for i in range(span.start, span.start + span.rows)
            }
            assert owners == set(indices.tolist())
    for record in tensors.values():
        assert sum(span.rows for span in record.spans) == record.rows
    expected = sum(t.numel() for expert in family.experts.values() for t in expert.values())
    assert outcome.manifest.parameters.experts == expected


def test_tied_experts_of_an_untied_base(family: Family, tmp_path: Path) -> None:
    """An expert that ties its head lacks lm_head; it is exported without one, its tie in its own config."""
    shutil.rmtree(family.folder / "instruct")
    tied = {name: tensor for name, tensor in family.experts["instruct"].items() if name != "lm_head.weight"}
    write_checkpoint(family.folder / "instruct", tied, {"tie_word_embeddings": True})
    outcome = merged(family.recipe(**{"merge.groups": 4}))
    assert_same_bits(rebuilt(outcome, "instruct", tmp_path), tied)
    assert_same_bits(rebuilt(outcome, "code", tmp_path), family.experts["code"])


def test_untied_expert_of_a_tied_base(family: Family, tmp_path: Path) -> None:
    shutil.rmtree(family.folder / "base")
    base = {name: tensor for name, tensor in family.base.items() if name != "lm_head.weight"}
    write_checkpoint(family.folder / "base", base, {"tie_word_embeddings": True})
    outcome = merged(family.recipe(**{"merge.groups": 4}))
    for name in NAMES:
        assert_same_bits(rebuilt(outcome, name, tmp_path), family.experts[name])


def test_tied_tensors_are_stored_and_exported_once(family: Family, tmp_path: Path) -> None:
    """Experts that tie and yet store both: the head is named as tied, kept once, and left out of the export."""
    for name in ("code", "math"):
        shutil.rmtree(family.folder / name)
        tensors = family.experts[name]
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        write_checkpoint(family.folder / name, tensors, {"tie_word_embeddings": True})
    outcome = merged(family.recipe(**{"merge.groups": 4}))
    assert outcome.manifest.experts["math"].tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert outcome.manifest.experts["chinese"].tied == {}
    found = rebuilt(outcome, "math", tmp_path)
    assert_same_bits(found, {n: t for n, t in family.experts["math"].items() if n != "lm_head.weight"})
    plan = plan_recipe(load_recipe(family.recipe()))
    assert "expert code: lm_head.weight is tied to model.embed_tokens.weight and is stored once" in plan.notes


def test_a_merged_head_of_a_tied_base_reads_its_partner(family: Family, tmp_path: Path) -> None:
    shutil.rmtree(family.folder / "base")
    base = {name: tensor for name, tensor in family.base.items() if name != "lm_head.weight"}
    write_checkpoint(family.folder / "base", base, {"tie_word_embeddings": True})
    rules = [{"match": "lm_head*", "policy": "merge", "groups": 1}]
    outcome = merged(family.recipe(**{"merge.rules": rules, "merge.singleton": "scale"}))
    partner = as_float64(family.base["model.embed_tokens.weight"])
    rows = len(partner)
    plain = partner + sum(as_float64(family.experts[n]["lm_head.weight"][:rows]) - partner for n in NAMES) / len(NAMES)
    assert ulps(rebuilt(outcome, "code", tmp_path)["lm_head.weight"], plain).max() <= 1


def test_a_head_no_expert_has_is_noted(family: Family) -> None:
    for name in NAMES:
        shutil.rmtree(family.folder / name)
        tied = {n: tensor for n, tensor in family.experts[name].items() if n != "lm_head.weight"}
        write_checkpoint(family.folder / name, tied, {"tie_word_embeddings": True})
    plan = plan_recipe(load_recipe(family.recipe()))
    assert "base: lm_head.weight is used by no expert and is left out" in plan.notes
    assert "lm_head.weight" not in merged(family.recipe()).manifest.tensors


def test_error_of_merged_embeddings_counts_the_bases_rows(family: Family, tmp_path: Path) -> None:
    rules = [{"match": "*embed_tokens*", "policy": "merge", "groups": 1}, {"match": "*", "policy": "private"}]
    outcome = merged(family.recipe(**{"merge.rules": rules}))
    name, rows = "model.embed_tokens.weight", len(family.base["model.embed_tokens.weight"])
    own, base = family.experts["chinese"][name][:rows].double(), family.base[name].double()
    found = rebuilt(outcome, "chinese", tmp_path)[name][:rows].double()
    expected = float((found - own).norm() / (own - base).norm())
    assert outcome.manifest.experts["chinese"].reconstruction_error == pytest.approx(expected, rel=1e-6)


def test_mixed_data_types_are_cast_once(tmp_path: Path) -> None:
    """An fp32 expert of a bf16 base: its exact rows are its values rounded once to the base's type."""
    family = write_family(tmp_path / "family")
    wide = {n: t.float() + 1e-4 * torch.linspace(-1, 1, t.numel()).reshape(t.shape) for n, t in family.experts["code"].items()}
    shutil.rmtree(family.folder / "code")
    write_checkpoint(family.folder / "code", wide)
    outcome = merged(family.recipe(**{"merge.groups": 4}))
    assert_same_bits(rebuilt(outcome, "code", tmp_path), {n: t.to(torch.bfloat16) for n, t in wide.items()})


def test_second_run_publishes_nothing_and_sweeps_reuse_deltas(family: Family) -> None:
    first = merged(family.recipe())
    stored = {
        p: p.stat().st_mtime_ns for p in (family.folder.parent / "deltas").rglob("*") if p.is_file() and p.suffix != ".lock"
    }
    again = merged(family.recipe())
    assert not again.new
    assert again.version == first.version
    other = merged(family.recipe(**{"merge.groups": 3}))
    assert other.new
    assert other.version != first.version
    assert {p: p.stat().st_mtime_ns for p in stored} == stored
    assert other.manifest.moved["ingest read"] == 0
    back = merged(family.recipe())
    assert (back.version, back.new) == (first.version, False)
    assert Artifact(family.folder.parent / "output").manifest.version == first.version


def test_a_file_edited_during_a_run_stops_it(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of another content never go by the id of what was hashed."""
    path = family.folder / "math" / "model.safetensors"
    original = path.read_bytes()
    before_all(monkeypatch, lambda: path.write_bytes(original[:-1] + bytes([original[-1] ^ 1])))
    with pytest.raises(CheckpointError, match=r"expert math: .*model.safetensors changed while the run read it. Run again"):
        merged(family.recipe(**{"merge.groups": 4}))
    monkeypatch.undo()
    path.write_bytes(original)
    outcome = merged(family.recipe(**{"merge.groups": 4}))
    assert_same_bits(rebuilt(outcome, "math", family.folder / "exports"), family.experts["math"])


def test_other_inputs_with_the_same_bytes_are_remembered(family: Family) -> None:
    """A seed that task arithmetic does not use: the same version, found at once from the second time on."""
    first = merged(family.recipe())
    second = merged(family.recipe(**{"merge.seed": 1}))
    assert (second.version, second.new) == (first.version, False)
    shutil.rmtree(family.folder.parent / "deltas")
    third = merged(family.recipe(**{"merge.seed": 1}))
    assert (third.version, third.new) == (first.version, False)
    assert not (family.folder.parent / "deltas").exists()


def test_a_table_with_other_tensors_is_extended_not_replaced(family: Family) -> None:
    """A run with fewer merged tensors leaves a table that a run with more adds to, while others may read it."""
    merged(family.recipe(**{"merge.rules": [{"match": "*layers.1.*", "policy": "private"}]}))
    (table,) = (family.folder.parent / "deltas").glob("*/tables/*/complete.json")
    arrays = {p: p.stat().st_mtime_ns for p in table.parent.glob("gram/model.layers.0.*/c.*")}
    assert len(arrays) == 7
    merged(family.recipe())
    assert {p: p.stat().st_mtime_ns for p in arrays} == arrays
    assert len(list(table.parent.glob("gram/model.layers.*"))) == 14


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"merge.scaling": 1e39}, r"tensor model.layers.\d.*: \d+ merged or cast values are not finite in BF16"),
        ({"merge.scaling": 1e39, "merge.method": "dare"}, r"lower merge.scaling or the experts' weights"),
    ],
)
def test_values_that_overflow_are_never_published(family: Family, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        merged(family.recipe(**changes))
    assert list((family.folder.parent / "output").glob("*/*.safetensors")) == []


def test_a_private_tensor_that_overflows_when_cast_is_named(tmp_path: Path) -> None:
    family = write_family(tmp_path / "family", torch.float16)
    shutil.rmtree(family.folder / "code")
    wide = {n: t.bfloat16() for n, t in family.experts["code"].items()}
    wide["model.norm.weight"][0] = 1e5
    write_checkpoint(family.folder / "code", wide)
    with pytest.raises(CheckpointError, match=r"tensor model.norm.weight: 1 merged or cast values are not finite in F16"):
        merged(family.recipe())


def test_an_edited_checkpoint_is_noticed(family: Family) -> None:
    """Same name, same size, other bytes: a new source, new deltas, a new version."""
    first = merged(family.recipe())
    path = family.folder / "math" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    second = merged(family.recipe())
    assert second.new
    assert second.version != first.version
    assert read_checkpoint(family.folder / "math")["model.norm.weight"].shape == (16,)
