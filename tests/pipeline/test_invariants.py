"""What must hold for every run: exactness at K=N, the plain merge at K=1, and the same bytes wherever it runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import Client, LocalCluster

from flows.run import Outcome
from pipeline import memory
from storage import layout
from storage.artifact import Artifact
from tests.support.reference import as_float64, ulps
from tests.support.running import merged, rebuilt
from tests.support.tiny_experts import NAMES, Family, Tensors, read_checkpoint, write_checkpoint, write_family


def digests(outcome: Outcome) -> dict[str, str]:
    return {name: record.sha256 for name, record in outcome.manifest.files.items() if name != layout.CARD}


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


def variations(address: str) -> list[tuple[str, dict[str, Any]]]:
    return [
        ("four workers", {"cluster": {"address": address}}),
        ("one worker", {"cluster": {"kind": "local", "workers": 1}}),
        ("small blocks", {"cluster": {"kind": "none", "memory": "512KiB"}}),
        ("tiny blocks on four workers", {"cluster": {"address": address, "memory": "100KB"}}),
    ]


def test_same_bytes_wherever_it_runs(family: Family, running: str) -> None:
    """Workers, block sizes and the process change no byte; every run starts from an empty delta store."""
    merge = {"merge.method": "dare", "router": router_of(family)}
    expected = merged(family.recipe(**merge))
    for title, cluster in variations(running):
        shutil.rmtree(family.folder.parent / "deltas")
        shutil.rmtree(family.folder.parent / "output")
        found = merged(family.recipe(**merge, **cluster))
        assert found.new
        assert digests(found) == digests(expected), title
        assert found.version == expected.version


def router_of(family: Family) -> dict[str, Any]:
    """Queries for every expert, in files beside the family."""
    queries = {}
    for name in family.experts:
        path = family.folder / f"{name}.jsonl"
        lines = [json.dumps({"text": f"{name} question number {i} about {name[::-1]} {i * 7}"}) for i in range(80)]
        path.write_text("\n".join(lines))
        queries[name] = f"./{path.name}"
    return {"kind": "linear", "queries": queries}


def test_small_budgets_cut_blocks_and_slices(monkeypatch: pytest.MonkeyPatch, family: Family) -> None:
    """Many chunks per tensor and one row at a time in the kernels give the bytes of whole tensors."""
    expected = merged(family.recipe(**{"merge.method": "dare"}))
    shutil.rmtree(family.folder.parent / "deltas")
    shutil.rmtree(family.folder.parent / "output")
    monkeypatch.setattr(layout, "CHUNK_ELEMENTS", 5 * 16)
    monkeypatch.setattr(memory, "SLICE_ELEMENTS", 16)
    found = merged(family.recipe(**{"merge.method": "dare", "cluster.memory": "30KB"}))
    assert found.new
    assert digests(found) == digests(expected)


def test_order_and_paths_of_experts_do_not_matter(family: Family, tmp_path: Path) -> None:
    expected = merged(family.recipe())
    moved = tmp_path / "elsewhere"
    shutil.copytree(family.folder, moved)
    other = Family(moved, family.base, dict(reversed(family.experts.items())))
    found = merged(other.recipe(output=str(tmp_path / "second"), name="another", deltas=str(tmp_path / "new-deltas")))
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
