"""Families of checkpoints for timing: a base and its experts in bf16, Mistral-style, of random numbers.

An expert is the base plus noise. Nothing is learnt in them, so they serve for time, memory and arithmetic, not for quality.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

BASE_SD, DELTA_SD = 0.02, 0.001
BASE = "base"
COMPLETE = "complete.json"


@dataclass(frozen=True)
class Shape:
    """Sizes of a Mistral-style model with a head of its own."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of all weights."""
        wide, narrow = self.hidden, self.hidden // self.heads * self.key_value_heads
        yield "model.embed_tokens.weight", (self.vocabulary, wide)
        for layer in range(self.layers):
            at = f"model.layers.{layer}"
            yield f"{at}.self_attn.q_proj.weight", (wide, wide)
            yield f"{at}.self_attn.k_proj.weight", (narrow, wide)
            yield f"{at}.self_attn.v_proj.weight", (narrow, wide)
            yield f"{at}.self_attn.o_proj.weight", (wide, wide)
            yield f"{at}.mlp.gate_proj.weight", (self.intermediate, wide)
            yield f"{at}.mlp.up_proj.weight", (self.intermediate, wide)
            yield f"{at}.mlp.down_proj.weight", (wide, self.intermediate)
            yield f"{at}.input_layernorm.weight", (wide,)
            yield f"{at}.post_attention_layernorm.weight", (wide,)
        yield "model.norm.weight", (wide,)
        yield "lm_head.weight", (self.vocabulary, wide)

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for _, shape in self.tensors())

    def config(self) -> dict[str, Any]:
        """What transformers' MistralConfig reads."""
        return {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }


SHAPES = {"small": Shape(256, 896, 5, 8, 2, 8000), "full": Shape(1024, 3584, 15, 16, 4, 32000)}


@dataclass(frozen=True)
class Family:
    """Folders of a base and of its experts by name."""

    shape: Shape
    base: Path
    experts: dict[str, Path]

    @property
    def checkpoints(self) -> tuple[Path, ...]:
        return self.base, *self.experts.values()


def _normal(seed: int, of: str, tensor: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal numbers that depend on seed, checkpoint and tensor alone."""
    raw = hashlib.sha256(f"{seed}/{of}/{tensor}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(raw[:7], "little"))
    return torch.randn(shape, generator=generator)


def _weight(seed: int, of: str, tensor: str, shape: tuple[int, ...]) -> torch.Tensor:
    """One tensor of the base or of an expert; norms lie around 1, everything else around 0."""
    values = _normal(seed, BASE, tensor, shape).mul_(BASE_SD).add_(1.0 if len(shape) == 1 else 0.0).to(torch.bfloat16)
    if of == BASE:
        return values
    return _normal(seed, of, tensor, shape).mul_(DELTA_SD).add_(values).to(torch.bfloat16)


def write_family(work: Path, shape: Shape, experts: int, seed: int = 0) -> Family:
    """The family of these parameters below ``work``; made once, one checkpoint after the other, then found again."""
    names = [f"expert{i}" for i in range(1, experts + 1)]
    settings = {**asdict(shape), "experts": experts, "seed": seed, "sd": [BASE_SD, DELTA_SD]}
    content = json.dumps(settings, sort_keys=True)
    folder = work / f"family-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
    if not (folder / COMPLETE).is_file():
        shutil.rmtree(folder, ignore_errors=True)
        for name in (BASE, *names):
            (folder / name).mkdir(parents=True)
            weights = {tensor: _weight(seed, name, tensor, size) for tensor, size in shape.tensors()}
            save_file(weights, folder / name / "model.safetensors", metadata={"format": "pt"})
            (folder / name / "config.json").write_text(json.dumps(shape.config(), indent=2))
        (folder / COMPLETE).write_text(content)
    return Family(shape, folder / BASE, {name: folder / name for name in names})
