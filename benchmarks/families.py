"""Families of checkpoints for timing: a base and its experts in bf16, Mistral-style, of random numbers.

An expert is the base plus noise. Nothing is learnt in them, so they serve for time, memory and arithmetic, not for quality.
They are written piece by piece: a family of any size takes a few hundred MiB of memory to make.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

BASE_SD, DELTA_SD = 0.02, 0.001
PIECE_ENTRIES = 1 << 24
"""Entries of a tensor that are made at once; a multiple of 16, the step of torch's generator of normal numbers."""
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


SHAPES = {
    "tiny": Shape(64, 224, 2, 4, 2, 512),
    "small": Shape(256, 896, 5, 8, 2, 8000),
    "full": Shape(1024, 3584, 15, 16, 4, 32000),
    "1b": Shape(2048, 5632, 22, 32, 4, 32000),
}
"""0.2 M, 8 M and 0.27 B parameters, and those of TinyLlama-1.1B."""


@dataclass(frozen=True)
class Family:
    """Folders of a base and of its experts by name."""

    shape: Shape
    base: Path
    experts: dict[str, Path]

    @property
    def checkpoints(self) -> tuple[Path, ...]:
        return self.base, *self.experts.values()


def _generator(seed: int, of: str, tensor: str) -> torch.Generator:
    """Random numbers that depend on seed, checkpoint and tensor alone."""
    raw = hashlib.sha256(f"{seed}/{of}/{tensor}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(raw[:7], "little"))


def weights(seed: int, of: str, tensor: str, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
    """One tensor of the base or of an expert, bfloat16, flat, in pieces of at most ``PIECE_ENTRIES``.

    Norms lie around 1, everything else around 0.
    """
    base, own = _generator(seed, BASE, tensor), _generator(seed, of, tensor)
    entries = math.prod(shape)
    for start in range(0, entries, PIECE_ENTRIES):
        size = min(PIECE_ENTRIES, entries - start)
        values = torch.randn(size, generator=base).mul_(BASE_SD).add_(1.0 if len(shape) == 1 else 0.0).to(torch.bfloat16)
        if of != BASE:
            values = torch.randn(size, generator=own).mul_(DELTA_SD).add_(values).to(torch.bfloat16)
        yield values


def write_checkpoint(folder: Path, shape: Shape, seed: int, of: str) -> None:
    """One checkpoint, a safetensors file and its configuration, in a folder that is there."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor, size in shape.tensors():
        begin, end = end, end + 2 * math.prod(size)
        header[tensor] = {"dtype": "BF16", "shape": list(size), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor, size in shape.tensors():
            for piece in weights(seed, of, tensor, size):
                file.write(piece.view(torch.int16).numpy().data)
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=2))


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
            write_checkpoint(folder / name, shape, seed, name)
        (folder / COMPLETE).write_text(content)
    return Family(shape, folder / BASE, {name: folder / name for name in names})
