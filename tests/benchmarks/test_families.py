from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import families
from benchmarks.families import BASE, SHAPES, Shape, weights, write_family


def whole(of: str, tensor: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor made at once, by the formula of the module's first line."""

    def normal(whose: str) -> torch.Tensor:
        raw = hashlib.sha256(f"0/{whose}/{tensor}".encode()).digest()
        return torch.randn(shape, generator=torch.Generator().manual_seed(int.from_bytes(raw[:7], "little")))

    base = (normal("base") * 0.02 + (1.0 if len(shape) == 1 else 0.0)).bfloat16()
    return base if of == BASE else (normal(of) * 0.001 + base).bfloat16()


def test_what_is_written_is_what_safetensors_reads(tmp_path: Path) -> None:
    shape = SHAPES["tiny"]
    family = write_family(tmp_path, shape, 2)
    for name, folder in {BASE: family.base, **family.experts}.items():
        found = load_file(folder / "model.safetensors")
        assert {tensor: tuple(values.shape) for tensor, values in found.items()} == dict(shape.tensors())
        for tensor, size in shape.tensors():
            assert torch.equal(found[tensor].view(torch.int16), whole(name, tensor, size).view(torch.int16)), tensor
        assert json.loads((folder / "config.json").read_text())["hidden_size"] == shape.hidden


def test_a_family_is_found_again(tmp_path: Path) -> None:
    first = write_family(tmp_path, SHAPES["tiny"], 2)
    before = (first.base / "model.safetensors").stat().st_mtime_ns
    assert write_family(tmp_path, SHAPES["tiny"], 2) == first
    assert (first.base / "model.safetensors").stat().st_mtime_ns == before
    assert write_family(tmp_path, SHAPES["tiny"], 3).base != first.base


@pytest.mark.parametrize("of", [BASE, "expert1"])
def test_pieces_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch, of: str) -> None:
    """However large a tensor, only a piece of it is in memory."""
    monkeypatch.setattr(families, "PIECE_ENTRIES", 1024)
    pieces = list(weights(0, of, "model.layers.0.mlp.up_proj.weight", (50, 100)))
    assert [len(piece) for piece in pieces] == [1024] * 4 + [904]
    expected = whole(of, "model.layers.0.mlp.up_proj.weight", (50, 100)).reshape(-1)
    assert torch.equal(torch.cat(pieces).view(torch.int16), expected.view(torch.int16))


def test_the_named_shapes_have_their_models_parameters() -> None:
    assert SHAPES["1b"].parameters == 1_100_048_384  # TinyLlama-1.1B's
    assert SHAPES["full"].parameters == 270_040_064
    assert Shape(4096, 14336, 32, 32, 8, 32000).parameters == 7_241_732_096  # Mistral-7B's
    assert all(math.gcd(shape.hidden, shape.heads) == shape.heads for shape in SHAPES.values())
