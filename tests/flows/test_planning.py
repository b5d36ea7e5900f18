"""``channel-merge plan``: everything that cannot work at once, what it would cost, and that a run keeps to it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flows.planning import document, judge, tensor_table
from pipeline.recipe import load_recipe
from storage.errors import CheckpointError
from storage.layout import DOCUMENTS, MANIFEST
from tests.pipeline.test_invariants import router_of
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
    (folder / "model.safetensors").rename(folder / "part.safetensors")
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
        (
            twice,
            [
                "tensor lm_head.weight and 20 more: it is stored in two files, model-00001-of-",
                "keep one",
            ],
        ),
        (lambda folder: index(folder, {UP: "../base/model.safetensors"}), ["names files outside its folder"]),
        (lambda folder: index(folder, {UP: "gone.safetensors"}), ["shards that are not there: gone.safetensors (with " + UP]),
        (lambda folder: index(folder, {"x": "part.safetensors"}), ["part.safetensors: tensor x: the index says it is there"]),
        (other_shape, [f"tensor {UP}: expected shape [24, 16] as in the base, got [24, 18]; is it an expert of this base?"]),
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
    told = (
        "expert math: config.json names a quantisation (bitsandbytes), but no weight is quantised: exports leave that entry out"
    )
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
    (headings, together), (_, every) = tensor_table(found, every=False), tensor_table(found, every=True)
    assert headings == ["tensor", "", "policy", "why", "dtype", "shape"]  # no axes: it is the first of all tensors
    assert ["model.layers.*.mlp.up_proj.weight", "x2", "merge, K=2", "linear", "BF16", "24x16"] in together
    assert ["lm_head.weight", "", "private", "head", "BF16", "20-32x16"] in together  # rows of the shortest and the longest
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
    files = [path for path in outcome.path.rglob("*") if path.is_file() and path.name not in (MANIFEST, *DOCUMENTS)]
    stored = sum(path.stat().st_size for path in files)
    named = 200 * len(family.base) * (2 + len(NAMES))  # headers and indices, which are much of a small model
    assert stored <= totals["artifact"] <= 1.2 * stored + named
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


def test_axes_are_shown_where_they_are_not_all_the_first(tmp_path: Path) -> None:
    config = {"model_type": "gpt2", "hidden_size": 16, "n_embd": 16}
    for seed, name in enumerate(("base", "a", "b")):
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            f"h.{layer}.mlp.c_fc.{part}": torch.randn(shape, generator=generator)
            for layer in range(2)
            for part, shape in (("weight", (16, 64)), ("bias", (64,)))
        }
        write_checkpoint(tmp_path / "family" / name, tensors, config)
    recipe = Family(tmp_path / "family", {}, {}).recipe(experts={"a": "./a", "b": "./b"})
    headings, rows = tensor_table(judge(load_recipe(recipe)), every=False)
    assert headings[-1] == "channels"
    assert ["h.*.mlp.c_fc.weight", "x2", "merge, K=2", "conv1d", "F32", "16x64", "axis 1"] in rows


def test_refused_tensors_are_short_in_the_table_and_long_in_the_error(family: Family) -> None:
    other_shape(family.expert("math"))
    other_shape(family.expert("instruct"))
    done = command("plan", family.recipe())
    (row,) = [line for line in done.stdout.splitlines() if line.startswith("model.layers.0.mlp.up_proj")]
    assert row.split() == [UP, "refused", "-", "-", "2", "problems"]
    assert done.stderr.count("expected shape [24, 16] as in the base, got [24, 18]; is it an expert of this base?") == 2


def test_many_tensors_with_one_problem_are_a_line_of_the_text_and_all_of_the_document(family: Family) -> None:
    edit(family.expert("math"), lambda tensors: tensors.update({n: t.to(torch.float8_e4m3fn) for n, t in tensors.items()}))
    for verb in ("plan", "run"):
        done = command(verb, family.recipe(), "--json")
        assert done.returncode == 2
        problems = json.loads(done.stdout)["problems"]
        assert sorted(problem.split("tensor ")[1].split(":")[0] for problem in problems) == sorted(family.base)
        assert f"{len(family.base)} problems" in done.stderr
        listed = [line for line in done.stderr.splitlines() if line.startswith("  - ")]
        assert len(listed) == 1
        assert f"and {len(family.base) - 1} more: data type F8_E4M3 cannot be read" in listed[0]


def no_source(family: Family) -> Path:
    shutil.rmtree(family.expert("math"))
    return family.recipe()


def wrong_key(family: Family) -> Path:
    return family.recipe(**{"merge.goups": 2})


@pytest.mark.parametrize(
    ("breakage", "name", "problem"),
    [(no_source, "tiny", "expert math: there is no directory"), (wrong_key, None, "merge.goups: unknown key")],
)
def test_a_refusal_is_a_document_too(
    family: Family, breakage: Callable[[Family], Path], name: str | None, problem: str
) -> None:
    keys = json.loads(command("plan", family.recipe(), "--json").stdout).keys()
    recipe = breakage(family)
    planned = command("plan", recipe, "--json")
    document = json.loads(planned.stdout)
    assert document.keys() == keys
    assert (document["possible"], document["name"], planned.returncode) == (False, name, 2)
    assert [found.startswith(problem) for found in document["problems"]] == [True]
    assert planned.stderr.startswith("error: ")
    ran = command("run", recipe, "--json")
    failure = json.loads(ran.stdout)
    assert ran.returncode == 2
    assert failure["problems"] == document["problems"]
    assert ran.stderr.strip() == f"error: {failure['error']}"


def test_the_plan_refuses_what_a_run_refuses_at_once(family: Family, tmp_path: Path) -> None:
    """Places, queries, sources and tensors in one list, each with its expert."""
    router = router_of(family)
    (family.folder / "code.jsonl").unlink()
    (family.folder / "math.jsonl").write_text("no json\n")
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "notes.txt").write_text("mine")
    (tmp_path / "deltas").write_text("mine")
    recipe = family.recipe(router=router, deltas="../deltas")
    strange, file = r"output .* holds notes.txt", r"deltas .* is a file, not a folder"
    queries = [r"expert code: .*code.jsonl", r"expert math: .*line 1: expected"]
    elsewhere: list[str | Path] = ["--output", tmp_path / "new"]
    for extra, messages in (([], [strange, *queries]), (elsewhere, [file, *queries])):
        told = command("plan", recipe, "--json", *extra)
        assert told.returncode == 2
        found = json.loads(told.stdout)
        assert not found["possible"]
        assert len(found["tensors"]) == len(family.base)  # the rest of the plan is shown all the same
        for message in messages:
            assert [problem for problem in found["problems"] if re.match(message, problem)], message
            assert re.search(message, told.stderr)
    fp8(family.expert("instruct"))
    found = json.loads(command("plan", recipe, "--json").stdout)
    assert [p for p in found["problems"] if p.startswith(f"expert instruct: tensor {UP}: data type F8_E4M3 cannot be read")]
    pointer(family.expert("math"))  # the only source that cannot be opened is named beside the rest, too
    found = json.loads(command("plan", recipe, "--json").stdout)
    assert [p for p in found["problems"] if p.startswith("expert math: ") and "git lfs pull" in p]
    for message in [strange, *queries]:
        assert [problem for problem in found["problems"] if re.match(message, problem)], message


def test_a_damaged_tokenizer_does_not_hide_the_rest(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(*_: object) -> list[str]:
        raise CheckpointError("expert math: tokenizer.json cannot be read")

    monkeypatch.setattr("flows.planning.compare_vocabularies", damaged)
    other_shape(family.expert("instruct"))
    found = document(judge(load_recipe(family.recipe())))
    assert len(found["tensors"]) == len(family.base)
    assert [problem.split(":")[0] for problem in found["problems"]] == ["expert instruct", "expert math"]


def test_the_options_of_a_run_are_the_plans(family: Family, tmp_path: Path) -> None:
    options: list[str | Path] = [
        "--output",
        tmp_path / "o",
        "--deltas",
        tmp_path / "d",
        "--cluster",
        "none",
        "--allow-unrelated",
    ]
    done = command("plan", family.recipe(), *options, "--set", "merge.groups=1")
    assert done.returncode == 0, done.stderr
    assert "merge, K=1" in done.stdout
    assert not (tmp_path / "o").exists()
    wrong = command("plan", family.recipe(), "--cluster", "gpu", "--json")
    assert wrong.returncode == 2
    assert "--cluster: expected local, none" in json.loads(wrong.stdout)["problems"][0]


def test_totals_are_in_units_that_say_something(family: Family) -> None:
    shown = command("plan", family.recipe()).stdout
    assert " 0 MiB" not in shown
    assert re.search(r"a task holds at most [\d.]+ [KM]iB of 2\.00 GiB", shown)
    assert re.search(r"^artifact: at most [\d.]+ KiB \(beside its manifest and card\), ", shown, flags=re.MULTILINE)
