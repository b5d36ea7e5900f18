"""What is said of an expert before it is merged, against numpy's float64."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.roles import layer_of
from storage.errors import PlanError
from storage.manifest import Manifest
from tests.support.running import command, merged
from tests.support.tiny_experts import NAMES, Family, Tensors, random_tensors, write_family


def squares(tensors: Tensors, names: list[str]) -> float:
    return math.fsum(float((tensors[name].double() ** 2).sum()) for name in names)


def merged_names(manifest: Manifest, layer: str | None = None) -> list[str]:
    return [n for n, record in manifest.tensors.items() if record.policy == "merge" and layer in (None, layer_of(n))]


def replaced(family: Family, name: str, tensors: Tensors) -> None:
    save_file({**load_file(family.expert(name) / "model.safetensors"), **tensors}, family.expert(name) / "model.safetensors")


def test_ratios_are_those_of_float64(family: Family) -> None:
    manifest = merged(family.recipe()).manifest
    for name in NAMES:
        health = manifest.experts[name].health
        for found, names in [
            (health.delta_ratio, merged_names(manifest)),
            *((ratio, merged_names(manifest, layer)) for layer, ratio in health.layers.items()),
        ]:
            deltas = {t: family.experts[name][t].double() - family.base[t].double() for t in names}
            assert found == pytest.approx(math.sqrt(squares(deltas, names) / squares(family.base, names)), rel=1e-6)
        assert len(health.layers) == 2
        same = [(family.experts[name][t].view(torch.int16) == family.base[t].view(torch.int16)) for t in merged_names(manifest)]
        assert health.unchanged == pytest.approx(np.concatenate([s.numpy().ravel() for s in same]).mean())


def test_an_expert_of_another_base_is_refused(family: Family) -> None:
    replaced(family, "math", {n: t for n, t in random_tensors(77).items() if "layers" in n})
    with pytest.raises(
        PlanError, match=r"--allow-unrelated goes on: expert math: \S+math: \|expert - base\| is 1\.[34]\d of"
    ) as caught:
        merged(family.recipe())
    assert "Is " in str(caught.value)
    assert not (family.folder.parent / "output" / "latest.json").exists()


def test_a_stranger_is_found_before_anything_is_ingested(family: Family) -> None:
    replaced(family, "math", {n: t for n, t in random_tensors(77).items() if "layers" in n})
    with pytest.raises(PlanError, match="expert math"):
        merged(family.recipe())
    assert not list((family.folder.parent / "deltas").rglob("complete.json"))


def test_one_that_a_look_misses_is_found_when_it_is_whole(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """The row in the middle, which is looked at, is the base's; all others are another model's."""
    monkeypatch.setattr("pipeline.stages.health.PROBED_BYTES", 32)
    own = {n: t.clone() for n, t in random_tensors(77).items() if "layers" in n}
    for name, weight in own.items():
        middle = (len(weight) - 1) // 2
        weight[middle] = family.base[name][middle]
    replaced(family, "math", own)
    with pytest.raises(PlanError, match=r"expert math: \S+ \|expert - base\| is 1\.3\d of \|base\|.*trained from\?$"):
        merged(family.recipe())
    assert len(list((family.folder.parent / "deltas").glob("*/*/complete.json"))) == 4


def test_a_base_with_empty_matrices_does_not_make_strangers(family: Family) -> None:
    """Blocks added with zeros, as some train them: there every expert is far from the base, and elsewhere near."""
    base = load_file(family.folder / "base" / "model.safetensors")
    save_file(
        {n: t * 1e-3 if "k_proj" in n or "up_proj" in n else t for n, t in base.items()},
        family.folder / "base" / "model.safetensors",
    )
    manifest = merged(family.recipe()).manifest
    assert all(0 < (expert.health.delta_ratio or 0) < 1 for expert in manifest.experts.values())


def test_a_much_smaller_stranger_is_refused_too(family: Family) -> None:
    replaced(family, "math", {n: t * 0.05 for n, t in random_tensors(77).items() if "layers" in n})
    with pytest.raises(PlanError, match=r"expert math: \S+ \|expert - base\| is 1\.00 of"):
        merged(family.recipe())


def test_a_stranger_is_merged_when_that_is_asked_for(family: Family) -> None:
    replaced(family, "math", {n: t for n, t in random_tensors(77).items() if "layers" in n})
    recipe = family.recipe()
    refused = command("run", recipe)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "--allow-unrelated" in refused.stderr
    found = command("run", recipe, "--allow-unrelated", "--json")
    assert found.returncode == 0, found.stderr
    manifest = json.loads((Path(json.loads(found.stdout)["path"]) / "manifest.json").read_text())
    assert manifest["experts"]["math"]["health"]["delta_ratio"] == pytest.approx(math.sqrt(2), rel=0.05)
    assert any("Merged all the same" in note for note in manifest["notes"])


def test_hard_training_is_noted_and_merged(family: Family) -> None:
    generator = torch.Generator().manual_seed(5)
    far = {
        n: (t.float() + torch.randn(t.shape, generator=generator) * 0.025).bfloat16()
        for n, t in family.base.items()
        if "layers" in n
    }
    replaced(family, "math", far)
    notes = merged(family.recipe()).manifest.notes
    assert [note for note in notes if note.startswith("expert math: |expert - base| is 0.4")], notes


def test_an_expert_that_is_its_base_is_noted(tmp_path: Path) -> None:
    family = write_family(tmp_path / "family")
    replaced(family, "math", {n: t for n, t in family.base.items() if "layers" in n})
    assert "expert math: every merged weight is the base's" in merged(family.recipe()).manifest.notes
