"""``channel-merge plan``: everything that cannot work at once, what it would cost, and that a run keeps to it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flows.planning import document, judge, tensor_rows
from pipeline.recipe import load_recipe
from tests.support.running import command, merged
from tests.support.tiny_experts import NAMES, Family, write_checkpoint

Damage = Callable[[Path], None]
UP = "model.layers.0.mlp.up_proj.weight"


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def configured(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def quantised(method: str) -> Damage:
    def damage(folder: Path) -> None:
        configured(folder, quantization_config={"quant_method": method, "bits": 4})
        edit(folder, lambda tensors: tensors.update({UP: torch.ones(24, 16, dtype=torch.uint8)}))

    return damage


def gptq_without_config(folder: Path) -> None:
    def pack(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[UP]
        tensors[UP.replace("weight", "qweight")] = torch.ones(2, 24, dtype=torch.int32)

    edit(folder, pack)


def fp8(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({UP: tensors[UP].to(torch.float8_e4m3fn)}))


def gguf(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.Q4_K_M.gguf")


def pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def twice(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        save_file(tensors, folder / name)


def index(folder: Path, placed: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))


def other_shape(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({UP: torch.ones(24, 18, dtype=torch.bfloat16)}))


def other_family(folder: Path) -> None:
    configured(folder, model_type="llama", hidden_size=18)


@pytest.mark.parametrize(
    ("damage", "messages"),
    [
        (quantised("gptq"), ["its weights are quantised (quantization_config of method 'gptq', tensor", "dequantize()"]),
        (quantised("awq"), ["method 'awq'"]),
        (quantised("bitsandbytes"), ["method 'bitsandbytes'"]),
        (gptq_without_config, ["its weights are quantised (names of a quantised model, tensor", "up_proj.qweight is I32"]),
        (fp8, [f"tensor {UP}: data type F8_E4M3 cannot be read", "Save the checkpoint in bf16, fp16 or fp32"]),
        (gguf, ["holds GGUF files, which are quantised", "Use the checkpoint it was quantised from"]),
        (pointer, ["model.safetensors", "git lfs pull"]),
        (no_config, ["has no config.json; is it a checkpoint's folder?"]),
        (twice, [f"tensor {UP}: it is stored in two files, model-00001-of-00002.safetensors and model-00002", "keep one"]),
        (lambda folder: index(folder, {UP: "../base/model.safetensors"}), ["names files outside its folder"]),
        (lambda folder: index(folder, {UP: "gone.safetensors"}), ["shards that are not there: gone.safetensors (with " + UP]),
        (lambda folder: index(folder, {"x": "model.safetensors"}), ["model.safetensors: tensor x: the index says it is there"]),
        (other_shape, [f"tensor {UP}: expected shape [24, 16], got [24, 18]; is it an expert of this base?"]),
        (other_family, ["model_type: expected 'mistral' as in the base, got 'llama'", "hidden_size: expected 16"]),
    ],
)
def test_what_cannot_work_is_refused_by_expert_and_reason(family: Family, damage: Damage, messages: list[str]) -> None:
    damage(family.expert("math"))
    recipe = family.recipe()
    planned, run = command("plan", recipe), command("run", recipe)
    for done in (planned, run):
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        assert "expert math" in done.stderr
        for message in messages:
            assert message in done.stderr
    assert not (family.folder.parent / "deltas").exists()
    assert not list((family.folder.parent / "output").rglob("*.safetensors"))


def test_a_configuration_left_over_from_training_on_a_quantised_base_is_noted(family: Family) -> None:
    configured(family.expert("math"), quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    notes = merged(family.recipe()).manifest.notes
    told = "expert math: config.json names a quantisation (bitsandbytes), but no weight is quantised; it is taken as it is"
    assert told in notes


def test_everything_is_listed_at_once_and_the_rest_is_still_shown(family: Family) -> None:
    other_shape(family.expert("math"))
    fp8(family.expert("instruct"))
    found = command("plan", family.recipe(), "--json")
    assert found.returncode == 2
    told = json.loads(found.stdout)
    assert not told["possible"]
    assert len(told["problems"]) == 2
    refused = {entry["tensor"]: entry["why"] for entry in told["tensors"] if entry["policy"] == "refused"}
    assert list(refused) == [UP]
    assert sorted(why.split(":")[0] for why in refused[UP]) == ["expert instruct", "expert math"]
    assert len(told["tensors"]) == len(family.base)
    shown = command("plan", family.recipe()).stdout
    assert "refused" in shown
    assert "model.layers.*.self_attn.q_proj.weight" in shown


def test_layers_are_shown_as_one_line_or_each(family: Family) -> None:
    found = judge(load_recipe(family.recipe()))
    together, every = tensor_rows(found, every=False), tensor_rows(found, every=True)
    assert ["model.layers.*.mlp.up_proj.weight", "x2", "merge", "linear", "2", "BF16", "24x16", "axis 0"] in together
    assert len(every) == len(family.base)
    assert sum(int(row[1].removeprefix("x") or 1) for row in together) == len(family.base)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"merge.groups": 1},
        {"merge.groups": 4},
        {"merge.groups": "auto", "merge.budget": 0.5},
        {"merge.groups": "auto"},
        {"merge.method": "byom", "merge.groups": 1},
        {"merge.rules": [{"match": "*embed*", "policy": "merge"}, {"match": "*.1.*", "policy": "base"}]},
    ],
)
def test_a_run_keeps_to_what_the_plan_says(family: Family, settings: dict[str, Any]) -> None:
    recipe = family.recipe(**settings)
    totals = document(judge(load_recipe(recipe)))["totals"]
    outcome = merged(recipe)
    parameters = outcome.manifest.parameters
    assert parameters.experts == totals["experts"]
    assert parameters.pool + parameters.residue <= totals["pool"]
    stored = [path for path in outcome.path.rglob("*.safetensors") if path.name != "router.safetensors"]
    headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in stored)
    assert sum(path.stat().st_size for path in stored) - headers <= totals["artifact"]
    assert totals["artifact"] <= 1.2 * sum(path.stat().st_size for path in stored)
    chunks = [path for path in (family.folder.parent / "deltas").rglob("c.*") if path.is_file()]
    assert sum(path.stat().st_size for path in chunks) <= totals["deltas"]
    assert totals["peak"] <= totals["budget"]
    assert totals["fetch"] == 0


def test_blocks_are_those_of_a_first_run(family: Family) -> None:
    done = command("run", family.recipe())
    stages = {
        line.split(":")[0]: int(line.split(": ")[1].split()[0]) for line in done.stderr.splitlines() if "blocks in" in line
    }
    weighed = sum(count for stage, count in stages.items() if stage.startswith(("ingest", "similarity", "merge")))
    assert weighed == document(judge(load_recipe(family.recipe())))["totals"]["blocks"]


def test_a_file_named_like_a_hub_id_is_one_and_a_folder_is_not(family: Family, tmp_path: Path) -> None:
    """What exists beside the recipe is a folder; what does not is asked of the Hub, and offline that is said."""
    write_checkpoint(family.folder / "org" / "expert", family.experts["math"])
    assert judge(load_recipe(family.recipe(experts={"a": "org/expert", "b": "./math"}))).problems == ()
    found = command("plan", family.recipe(experts={"a": "org/expertt", "b": "./math"}))
    assert found.returncode == 2
    assert "expert a: org/expertt" in found.stderr
    assert "HF_HUB_OFFLINE" in found.stderr


def test_sources_that_are_none_are_refused_with_the_recipe(family: Family) -> None:
    experts = {
        "a": {"source": "./math", "revision": "main"},
        "b": {"source": "org/name@one", "revision": "two"},
        "c": "ftp://host/x",
        "d": "s3://bucket/x?key=1",
    }
    found = command("plan", family.recipe(experts=experts))
    assert found.returncode == 2
    for message in (
        "experts.a.revision: only sources on the Hub have revisions, got ./math; leave it out",
        "experts.b.revision: org/name@one names a revision already; keep one",
        "experts.c: sources are a Hub id, a folder, or a URL of s3, gs or az; got the scheme 'ftp'",
        "experts.d: a URL is a bucket and a prefix; credentials and options come from the environment",
    ):
        assert message in found.stderr


def test_names_of_experts_are_those_of_the_family(family: Family) -> None:
    assert document(judge(load_recipe(family.recipe())))["experts"] == list(NAMES)
