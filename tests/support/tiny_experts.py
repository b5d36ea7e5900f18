"""Small checkpoints with fixed, non-trivial values, written with safetensors' own writer and no framework of ours."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

from storage.checkpoint import Checkpoint, open_checkpoint
from storage.files import open_local

HIDDEN, INTERMEDIATE, VOCABULARY, LAYERS = 16, 24, 20, 2
CONFIG = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
NAMES = ("chinese", "code", "instruct", "math")
Tensors = dict[str, torch.Tensor]


def shapes(vocabulary: int = VOCABULARY) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, HIDDEN),
        "lm_head.weight": (vocabulary, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for layer in range(LAYERS):
        stem = f"model.layers.{layer}"
        found |= {
            f"{stem}.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            f"{stem}.self_attn.k_proj.weight": (HIDDEN // 2, HIDDEN),
            f"{stem}.self_attn.v_proj.weight": (HIDDEN // 2, HIDDEN),
            f"{stem}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{stem}.mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
            f"{stem}.mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
            f"{stem}.mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
            f"{stem}.input_layernorm.weight": (HIDDEN,),
            f"{stem}.post_attention_layernorm.weight": (HIDDEN,),
        }
    return found


def random_tensors(seed: int, vocabulary: int = VOCABULARY, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {n: (torch.randn(s, generator=generator) * 0.05).to(dtype) for n, s in shapes(vocabulary).items()}


def fine_tuned(base: Tensors, seed: int, vocabulary: int = VOCABULARY, size: float = 0.01) -> Tensors:
    """The base plus noise; rows beyond its vocabulary are new."""
    generator = torch.Generator().manual_seed(seed)
    tuned = random_tensors(seed + 1000, vocabulary, next(iter(base.values())).dtype)
    for name, weight in base.items():
        moved = weight.float() + torch.randn(weight.shape, generator=generator) * size
        tuned[name][: len(weight)] = moved.to(weight.dtype)
    return tuned


def write_checkpoint(
    folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any] | None = None, shards: int = 1
) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"name": folder.name}))
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def read_checkpoint(folder: Path) -> Tensors:
    """All tensors of a folder, read with safetensors itself."""
    tensors: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def open_at(label: str, folder: Path) -> Checkpoint:
    """A checkpoint of a local folder."""
    return open_checkpoint(label, open_local(label, folder))


@dataclass(frozen=True)
class Family:
    """Where a family lies and what is in it."""

    folder: Path
    base: Tensors
    experts: dict[str, Tensors]

    def expert(self, name: str) -> Path:
        return self.folder / name

    def recipe(self, **changes: Any) -> Path:
        """A recipe over the family, with dotted keys changed: recipe(**{"merge.groups": 3})."""
        fields: dict[str, Any] = {
            "name": "tiny",
            "base": "./base",
            "experts": {name: f"./{name}" for name in self.experts},
            "merge": {"groups": 2, "method": "task_arithmetic"},
            "router": {"kind": "none"},
            "deltas": "../deltas",
            "output": "../output",
            "cluster": {"kind": "none"},
        }
        for key, value in changes.items():
            target = fields
            *parents, last = key.split(".")
            for parent in parents:
                target = target.setdefault(parent, {})
            target[last] = value
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(fields, sort_keys=False))  # the order of experts is a test's to choose
        return path


def special_rows(base: Tensors, experts: dict[str, Tensors]) -> None:
    """Rows that need care: equal experts, unchanged experts, negative zeros."""
    name = "model.layers.0.mlp.up_proj.weight"
    first, second, third, fourth = (experts[expert][name] for expert in NAMES)
    origin = base[name]
    second[0] = first[0]  # two equal experts
    fourth[1] = origin[1]  # one expert unchanged
    third[2], fourth[2] = origin[2], origin[2]  # two unchanged
    for expert in (first, second, third, fourth):  # all unchanged
        expert[3] = origin[3]
    first[4] = second[4] = third[4] = fourth[4]  # all equal, and changed
    second[5], third[5], fourth[5] = origin[5], origin[5], origin[5]  # one changed alone
    origin[6, 0], first[6, 0], second[6, 0] = 0.0, -0.0, 0.0
    for expert in (first, second, third, fourth):
        expert[7] = origin[7]
    origin[7, 0], first[7, 0], second[7, 0], third[7, 0], fourth[7, 0] = 0.0, -0.0, 0.0, -0.0, 0.0


def write_family(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Family:
    """math has an added token, chinese an extended vocabulary, code several shards; some rows are special."""
    base = random_tensors(0, dtype=dtype)
    vocabularies = {"chinese": VOCABULARY + 12, "math": VOCABULARY + 1}
    experts = {name: fine_tuned(base, seed, vocabularies.get(name, VOCABULARY)) for seed, name in enumerate(NAMES, 1)}
    special_rows(base, experts)
    write_checkpoint(folder / "base", base)
    for name, tensors in experts.items():
        vocabulary = {"vocab_size": vocabularies.get(name, VOCABULARY)}
        write_checkpoint(folder / name, tensors, vocabulary, shards=3 if name == "code" else 1)
    return Family(folder, base, experts)
