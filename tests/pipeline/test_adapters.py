"""LoRA adapters as experts, through whole runs, beside peft's own merge."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from storage.errors import CheckpointError
from tests.support.running import command, merged, rebuilt
from tests.support.tiny_experts import Tensors, read_checkpoint

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 40,
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "stable": {"r": 3, "lora_alpha": 7, "use_rslora": True, "target_modules": "all-linear"},
    "head": {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj", "up_proj"], "modules_to_save": ["lm_head"]},
}


def write_family(folder: Path, dtype: torch.dtype) -> Path:
    """A base, adapters by peft, and a full fine-tune beside them."""
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_key_value_heads=1, head_dim=8, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder / "base")
    for seed, (name, settings) in enumerate(ADAPTERS.items(), 1):
        torch.manual_seed(seed)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype), LoraConfig(**settings))
        with torch.no_grad():
            for tensor, weight in model.named_parameters():
                if "lora_B" in tensor:  # zero at the start of a training
                    weight.copy_(torch.randn_like(weight) * 0.01)
                elif "modules_to_save" in tensor:
                    weight.add_(torch.randn_like(weight) * 0.01)
        model.save_pretrained(str(folder / name))
    full = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)
    with torch.no_grad():
        for weight in full.parameters():
            weight.add_(torch.randn_like(weight) * 0.005)
    full.save_pretrained(folder / "full")
    recipe = {
        "name": "adapters", "base": "./base", "experts": {name: f"./{name}" for name in (*ADAPTERS, "full")},
        "output": "../output", "deltas": "../deltas", "merge": {"groups": 2, "method": "task_arithmetic"},
        "cluster": {"kind": "none"},
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def by_peft(folder: Path, name: str, dtype: torch.dtype) -> Tensors:
    """What peft merges an adapter to."""
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)
    found: Mapping[str, torch.Tensor] = PeftModel.from_pretrained(base, folder / name).merge_and_unload().state_dict()
    return {tensor: weight.contiguous() for tensor, weight in found.items()}


def ordered(bits: torch.Tensor) -> torch.Tensor:
    """Bits as integers in the order of the numbers: neighbours differ by 1."""
    signed = bits.view(torch.int16 if bits.element_size() == 2 else torch.int32).long()
    return torch.where(signed < 0, -(signed & (2 ** (8 * bits.element_size() - 1) - 1)), signed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_come_back_as_peft_merges_them(tmp_path: Path, dtype: torch.dtype) -> None:
    outcome = merged(write_family(tmp_path / "family", dtype), {"merge.groups": 4})
    for name in ADAPTERS:
        expected, found = by_peft(tmp_path / "family", name, dtype), rebuilt(outcome, name, tmp_path)
        assert found.keys() == expected.keys()
        for tensor, weight in expected.items():
            apart = (ordered(found[tensor]) - ordered(weight)).abs().max().item()
            assert apart <= (0 if dtype == torch.float32 else 1), (name, tensor, apart)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / f"{outcome.version}-{name}")
        assert torch.equal(loaded.state_dict()["lm_head.weight"].float(), found["lm_head.weight"].float())
    full = rebuilt(outcome, "full", tmp_path)
    for tensor, weight in read_checkpoint(tmp_path / "family" / "full").items():
        assert torch.equal(ordered(full[tensor]), ordered(weight)), tensor


def exact_delta(folder: Path, name: str, tensor: str) -> np.ndarray[Any, Any] | None:
    """scale * (B A) in float64; None where the adapter leaves the tensor alone."""
    config = json.loads((folder / name / "adapter_config.json").read_text())
    stored = {key: value.double().numpy() for key, value in read_checkpoint(folder / name).items()}
    stem = f"base_model.model.{tensor.removesuffix('.weight')}"
    if f"{stem}.lora_A.weight" not in stored:
        return None
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    found: np.ndarray[Any, Any] = scale * (stored[f"{stem}.lora_B.weight"] @ stored[f"{stem}.lora_A.weight"])
    return found


def test_deltas_are_merged_before_they_are_rounded(tmp_path: Path) -> None:
    """One merged model of a bf16 base is the float64 mean, rounded once: rounding each expert first would be further away."""
    recipe = write_family(tmp_path / "family", torch.bfloat16)
    outcome = merged(recipe, {"merge.groups": 1, "experts": {name: f"./{name}" for name in ADAPTERS}})
    base = read_checkpoint(tmp_path / "family" / "base")
    found = rebuilt(outcome, "plain", tmp_path)
    checked = 0
    for tensor in (name for name, record in outcome.manifest.tensors.items() if record.policy == "merge"):
        deltas = [exact_delta(tmp_path / "family", name, tensor) for name in ADAPTERS]
        total = sum(delta for delta in deltas if delta is not None) / len(ADAPTERS)
        expected = torch.from_numpy(base[tensor].double().numpy() + total).bfloat16()
        same = (ordered(found[tensor]) == ordered(expected)).double().mean().item()
        assert same > 0.999, tensor  # a sum in float32 may fall on the other side of a tie
        checked += 1
    assert checked == 14


@pytest.mark.parametrize("method", ["ties", "dare", "dare_ties", "byom", "average"])
def test_every_method_takes_adapters_beside_full_experts(tmp_path: Path, method: str) -> None:
    recipe = write_family(tmp_path / "family", torch.bfloat16)
    groups = 1 if method == "byom" else 2
    outcome = merged(recipe, {"merge.method": method, "merge.groups": groups, "merge.density": 0.5})
    record = outcome.manifest.experts["stable"]
    assert record.reconstruction_error is not None
    assert 0 < record.reconstruction_error < 2
    everything = merged(recipe, {"merge.method": method, "merge.groups": groups, "merge.density": 1.0, "merge.keep": 1.0})
    same = {"dare": "task_arithmetic", "average": "task_arithmetic", "dare_ties": "ties"}.get(method)
    if same:  # nothing is dropped, so both are one method
        assert everything.version == merged(recipe, {"merge.method": same, "merge.density": 1.0}).version
    if method == "byom":  # every entry kept: the expert itself
        for tensor, weight in by_peft(tmp_path / "family", "stable", torch.bfloat16).items():
            assert (ordered(rebuilt_once(everything, tmp_path)[tensor]) - ordered(weight)).abs().max() <= 1


def rebuilt_once(outcome: Any, folder: Path) -> Tensors:
    target = folder / f"{outcome.version}-stable"
    return read_checkpoint(target) if target.exists() else rebuilt(outcome, "stable", folder)


def test_workers_make_the_same_version_of_adapters(tmp_path: Path) -> None:
    recipe = write_family(tmp_path / "family", torch.bfloat16)
    alone = merged(recipe)
    cluster = {"kind": "local", "workers": 2}
    spread = merged(recipe, {"cluster": cluster, "output": str(tmp_path / "spread"), "deltas": str(tmp_path / "spread-deltas")})
    assert spread.version == alone.version


def test_tokens_that_an_adapter_adds_are_in_its_export(tmp_path: Path) -> None:
    """Embedding and head saved whole, with three rows more: the exported configuration says so, and the model loads."""
    recipe = write_family(tmp_path / "family", torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "family" / "base")
    model.resize_token_embeddings(SIZES["vocab_size"] + 3)
    settings = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    get_peft_model(model, settings).save_pretrained(str(tmp_path / "family" / "grown"), save_embedding_layers=True)
    outcome = merged(recipe, {"experts": {"grown": "./grown", "full": "./full"}})
    found = rebuilt(outcome, "grown", tmp_path)
    assert found["model.embed_tokens.weight"].shape == (43, 16)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / f"{outcome.version}-grown")
    assert loaded.config.vocab_size == 43
    assert torch.equal(loaded.state_dict()["model.embed_tokens.weight"], found["model.embed_tokens.weight"])
    assert json.loads((tmp_path / f"{outcome.version}-grown" / "config.json").read_text())["vocab_size"] == 43


def test_unchanged_counts_weights_not_deltas(tmp_path: Path) -> None:
    """A small update of a bf16 base leaves most weights as they are."""
    manifest = merged(write_family(tmp_path / "family", torch.bfloat16)).manifest
    base, own = read_checkpoint(tmp_path / "family" / "base"), by_peft(tmp_path / "family", "plain", torch.bfloat16)
    names = [name for name, record in manifest.tensors.items() if record.policy == "merge"]
    same = torch.cat([(ordered(base[name]) == ordered(own[name])).flatten() for name in names])
    assert manifest.experts["plain"].health.unchanged == pytest.approx(same.double().mean().item(), abs=1e-6)
    assert 0.3 < same.double().mean() < 1


def test_the_plan_says_what_an_adapter_is(tmp_path: Path) -> None:
    recipe = write_family(tmp_path / "family", torch.bfloat16)
    found = json.loads(command("plan", recipe, "--json").stdout)
    kinds = {source["label"]: source["kind"] for source in found["sources"]}
    assert kinds == {"base": "checkpoint", "expert full": "checkpoint"} | {f"expert {n}": "LoRA adapter" for n in ADAPTERS}
    assert found["possible"]


def test_an_adapter_is_no_base(tmp_path: Path) -> None:
    recipe = write_family(tmp_path / "family", torch.bfloat16)
    with pytest.raises(
        CheckpointError, match=r"base: \S+plain is a LoRA adapter; expected a whole model. Give the model it was"
    ):
        merged(recipe, {"base": "./plain"})


def test_a_variant_that_cannot_be_read_is_refused_by_the_plan(tmp_path: Path) -> None:
    recipe = write_family(tmp_path / "family", torch.bfloat16)
    path = tmp_path / "family" / "plain" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_dora": True}))
    found = command("plan", recipe)
    assert found.returncode == 2
    assert "expert plain: " in found.stderr
    assert "DoRA" in found.stderr
