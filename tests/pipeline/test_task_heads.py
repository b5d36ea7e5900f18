"""Experts that were trained for other tasks than their base: heads that are missing, new, or of another size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
)

from storage.artifact import Artifact
from tests.pipeline.test_architectures import rebuilt
from tests.support.running import merged
from tests.support.tiny_experts import Tensors, read_checkpoint

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 40,
}


def written(folder: Path, model: PreTrainedModel, base: PreTrainedModel | None = None) -> None:
    """A model that shares the base's body, a little moved."""
    if base is not None:
        own, start = model.base_model.state_dict(), base.base_model.state_dict()
        with torch.no_grad():
            for name, weight in own.items():
                if name in start and start[name].shape == weight.shape and weight.is_floating_point():
                    weight.copy_(start[name] + torch.randn_like(weight) * 1e-3)
    model.save_pretrained(folder)


def recipe_of(folder: Path, experts: list[str], **merge: Any) -> Path:
    fields = {
        "name": "heads", "base": "./base", "experts": {name: f"./{name}" for name in experts}, "output": "../output",
        "deltas": "../deltas", "merge": {"groups": len(experts), "method": "task_arithmetic", **merge},
        "cluster": {"kind": "none"},
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


def assert_exact(folder: Path, recipe: Path, experts: list[str]) -> Artifact:
    artifact = Artifact(merged(recipe).path)
    for name in experts:
        assert_equal(rebuilt(artifact, name, folder.parent / "export" / name), read_checkpoint(folder / name))
    return artifact


def assert_equal(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for tensor, weight in expected.items():
        assert torch.equal(found[tensor], weight), tensor


@pytest.mark.parametrize("head", [False, True])
def test_classifiers_of_one_encoder(tmp_path: Path, head: bool) -> None:
    """Two, three and nine classes, of sequences and of tokens, on a base that has none, or a LM head in their place."""
    torch.manual_seed(0)
    folder = tmp_path / "family"
    base = (BertForMaskedLM if head else BertModel)(BertConfig(**SIZES))
    written(folder / "base", base)
    written(folder / "two", BertForSequenceClassification(BertConfig(**{**SIZES, "num_labels": 2})), base)
    written(folder / "three", BertForSequenceClassification(BertConfig(**{**SIZES, "num_labels": 3})), base)
    written(folder / "nine", BertForTokenClassification(BertConfig(**{**SIZES, "num_labels": 9})), base)
    names = ["two", "three", "nine"]
    artifact = assert_exact(folder, recipe_of(folder, names), names)
    assert artifact.manifest.tensors["classifier.weight"].rows == 14
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "export" / "three")
    assert torch.equal(loaded.classifier.weight, read_checkpoint(folder / "three")["classifier.weight"])
    merged(recipe_of(folder, names, groups=2))


def test_a_classifier_of_a_base_with_a_lm_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = tmp_path / "family"
    base = LlamaForCausalLM(LlamaConfig(**SIZES))
    written(folder / "base", base)
    written(folder / "text", LlamaForCausalLM(LlamaConfig(**SIZES)), base)
    written(folder / "reward", LlamaForSequenceClassification(LlamaConfig(**{**SIZES, "num_labels": 1})), base)
    artifact = assert_exact(folder, recipe_of(folder, ["reward", "text"]), ["reward", "text"])
    assert "expert reward: it has no lm_head.weight (head), and its export will have none" in artifact.manifest.notes


def test_a_causal_model_without_its_head_is_not_whole(tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = tmp_path / "family"
    base = LlamaForCausalLM(LlamaConfig(**SIZES))
    for name in ("base", "a", "b"):
        written(folder / name, base)
    path = folder / "a" / "model.safetensors"
    save_file({n: t for n, t in load_file(path).items() if n != "lm_head.weight"}, path)
    with pytest.raises(ValueError, match=r"expert a: tensor lm_head.weight is missing: expected shape \[40, 16\]; complete"):
        merged(recipe_of(folder, ["a", "b"]))


def test_a_grown_vocabulary_whose_head_has_a_bias(tmp_path: Path) -> None:
    """Phi's: the bias grows with the tokens."""
    torch.manual_seed(0)
    folder = tmp_path / "family"
    base = PhiForCausalLM(PhiConfig(**SIZES))
    written(folder / "base", base)
    for name, more in (("a", 0), ("b", 4)):
        written(folder / name, PhiForCausalLM(PhiConfig(**{**SIZES, "vocab_size": 40 + more})), base)
    artifact = assert_exact(folder, recipe_of(folder, ["a", "b"]), ["a", "b"])
    assert artifact.manifest.tensors["lm_head.bias"].channel_axis == -1


def test_a_head_that_configs_tie_by_default_may_be_stored_or_not(tmp_path: Path) -> None:
    """A base that stores its copy, experts that do not, and configs that leave it to the model's default."""
    torch.manual_seed(0)
    folder = tmp_path / "family"
    base = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))
    for name in ("base", "a", "b"):
        written(folder / name, base)
        path = folder / name / "config.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "tie_word_embeddings"}))
    path = folder / "base" / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path)
    assert_exact(folder, recipe_of(folder, ["a", "b"]), ["a", "b"])


def test_what_only_experts_have_is_kept_as_it_is_whoever_else_is_merged(tmp_path: Path) -> None:
    """A square matrix that a's bias would show to be stored (in, out): with and without a, b's rows are the same rows."""
    torch.manual_seed(0)
    folder = tmp_path / "family"
    base = LlamaForCausalLM(LlamaConfig(**SIZES))
    for name in ("base", "a", "b", "c"):
        written(folder / name, base)
        if name != "base":
            path = folder / name / "model.safetensors"
            extra = {"tower.h.0.mlp.c_proj.weight": torch.randn(8, 8)}
            if name == "a":
                extra |= {"tower.h.0.mlp.c_fc.weight": torch.randn(8, 12), "tower.h.0.mlp.c_fc.bias": torch.randn(12)}
            save_file({**load_file(path), **extra}, path)
    rules = [{"match": "tower.*", "policy": "private"}]
    assert_exact(folder, recipe_of(folder, ["a", "b"], rules=rules), ["a", "b"])
    artifact = Artifact(merged(recipe_of(folder, ["b", "c"], rules=rules)).path)
    assert_equal(rebuilt(artifact, "b", tmp_path / "again"), read_checkpoint(folder / "b"))


def test_an_old_base_calls_its_norms_otherwise(tmp_path: Path) -> None:
    """BERT's first checkpoints say gamma and beta, and store the body under a prefix; exports keep their own names."""
    torch.manual_seed(0)
    folder = tmp_path / "family"
    base = BertForMaskedLM(BertConfig(**SIZES))
    written(folder / "base", base)
    path = folder / "base" / "model.safetensors"
    old = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for n, t in load_file(path).items()
    }
    assert any(name.endswith("gamma") for name in old)
    save_file(old, path)
    written(folder / "two", BertForSequenceClassification(BertConfig(**{**SIZES, "num_labels": 2})), base)
    written(folder / "bare", BertModel(BertConfig(**SIZES)), base)
    artifact = assert_exact(folder, recipe_of(folder, ["two", "bare"]), ["two", "bare"])
    assert sum(record.policy == "merge" for record in artifact.manifest.tensors.values()) == 12


def test_old_and_new_names_side_by_side_are_two_tensors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = tmp_path / "family"
    base = LlamaForCausalLM(LlamaConfig(**SIZES))
    for name in ("base", "a", "b"):
        written(folder / name, base)
        path = folder / name / "model.safetensors"
        extra = {"x.LayerNorm.gamma": torch.randn(4)} | ({"x.LayerNorm.weight": torch.randn(4)} if name == "a" else {})
        save_file({**load_file(path), **extra}, path)
    assert_exact(folder, recipe_of(folder, ["a", "b"]), ["a", "b"])
