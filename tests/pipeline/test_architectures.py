"""Real architectures, small: merged along their output channels however they are stored, exported and loaded again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from serving.lookup import export
from storage import layout
from storage.artifact import Artifact
from tests.support.running import merged
from tests.support.tiny_experts import Tensors, read_checkpoint

EXPERTS = ("a", "b", "c")
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}
GROUPED = {**SIZES, "num_key_value_heads": 1, "head_dim": 8}
MIXED = {**GROUPED, "num_local_experts": 3, "num_experts_per_tok": 2}
MODELS: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "qwen2": GROUPED,
    "qwen3": {**GROUPED, "tie_word_embeddings": True},
    "gemma2": GROUPED,
    "phi3": {**GROUPED, "pad_token_id": 0},
    "gpt2": {"n_embd": 16, "n_inner": 24, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 32},
    "gpt_bigcode": {"n_embd": 16, "n_inner": 24, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 32},
    "gpt_neox": SIZES,
    "mixtral": MIXED,
    "qwen3_moe": {**GROUPED, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12},
    "gpt_oss": {**MIXED, "layer_types": ["full_attention", "sliding_attention"]},
    "llama4_text": {
        **GROUPED,
        "num_local_experts": 3,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 20,
        "interleave_moe_layer_step": 1,
        "pad_token_id": 0,
    },
    "bert": {**SIZES, "max_position_embeddings": 32},
}


def class_of(kind: str) -> Any:
    return AutoModelForMaskedLM if kind == "bert" else AutoModelForCausalLM


def model_of(kind: str) -> PreTrainedModel:
    """A random model with a head where the architecture has one."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **MODELS[kind], torch_dtype="float32")
    found: PreTrainedModel = class_of(kind).from_config(config)
    with torch.no_grad():  # biases and norms are made constant, which would hide a mistake
        for parameter in found.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return found


def linear_channels(model: nn.Module) -> Iterator[tuple[str, int]]:
    """The weights of blocks with the axis of their output channels, by what the live modules are."""
    for name, module in model.named_modules():
        if any(part.isdigit() for part in name.split(".")):
            if isinstance(module, nn.Linear):
                yield f"{name}.weight", 0
            elif isinstance(module, Conv1D):
                yield f"{name}.weight", 1


def paired(weight: torch.Tensor, axis: int, seed: int) -> list[torch.Tensor]:
    """Deltas of three experts: in even output channels a and b go one way and c another, in odd ones b and c go together."""
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(weight.shape, generator=generator) * 0.01 for _ in range(2))
    channels = torch.arange(weight.shape[axis]).reshape([-1 if a == axis else 1 for a in range(weight.dim())])
    return [first, torch.where(channels % 2 == 0, 1.5 * first, second), 1.25 * second]


def write_family(folder: Path, model: PreTrainedModel, change: Callable[[str, int, torch.Tensor], torch.Tensor]) -> Path:
    """Base and experts as transformers writes them; ``change`` gives an expert's parameter from the base's."""
    model.save_pretrained(folder / "base")
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for n, expert in enumerate(EXPERTS):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(change(name, n, start[name]))
        model.save_pretrained(folder / expert)
    recipe = {
        "name": "family", "base": "./base", "experts": {name: f"./{name}" for name in EXPERTS}, "output": "../output",
        "deltas": "../deltas", "merge": {"groups": 2, "method": "task_arithmetic"}, "cluster": {"kind": "none"},
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def noisy(name: str, expert: int, weight: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, name)) * 10 + expert)
    return weight + torch.randn(weight.shape, generator=generator) * 0.01


def rebuilt(artifact: Artifact, expert: str, folder: Path) -> Tensors:
    export(artifact, expert, folder)
    return read_checkpoint(folder)


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_every_expert_comes_back_bit_for_bit_and_loads(kind: str, tmp_path: Path) -> None:
    recipe = write_family(tmp_path / "family", model_of(kind), noisy)
    outcome = merged(recipe, {"merge.groups": 3})
    for name in EXPERTS:
        original = read_checkpoint(tmp_path / "family" / name)
        found = rebuilt(Artifact(outcome.path), name, tmp_path / "export" / name)
        assert found.keys() == original.keys()
        for tensor, weight in original.items():
            assert found[tensor].shape == weight.shape, tensor
            assert torch.equal(found[tensor].view(torch.int32), weight.view(torch.int32)), tensor
    loaded, expected = (class_of(kind).from_pretrained(tmp_path / part / "b") for part in ("export", "family"))
    for name, weight in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_groups_follow_the_output_channels(kind: str, tmp_path: Path) -> None:
    """Experts that go together in a channel share its row, whichever axis of the stored weight the channels are."""
    model = model_of(kind)
    axes = dict(linear_channels(model))

    def change(name: str, expert: int, weight: torch.Tensor) -> torch.Tensor:
        return weight + paired(weight, axes[name], len(name))[expert] if name in axes else weight

    outcome = merged(write_family(tmp_path / "family", model, change))
    found = {name: rebuilt(Artifact(outcome.path), name, tmp_path / "export" / name) for name in EXPERTS}
    records = outcome.manifest.tensors
    base = read_checkpoint(tmp_path / "family" / "base")
    checked = 0
    for tensor, axis in ((t, axes[t]) for t in base if t in axes and records[t].policy == "merge"):
        assert records[tensor].channel_axis == axis
        a, b, c = (found[name][tensor].movedim(axis, 0) for name in EXPERTS)
        assert torch.equal(a[0::2], b[0::2]), tensor
        assert not torch.equal(b[0::2], c[0::2]), tensor
        assert torch.equal(b[1::2], c[1::2]), tensor
        assert not torch.equal(a[1::2], b[1::2]), tensor
        one, two = (read_checkpoint(tmp_path / "family" / name)[tensor].movedim(axis, 0) for name in "ab")
        torch.testing.assert_close(a[0::2], (one[0::2] + two[0::2]) / 2, rtol=0, atol=1e-6)  # scaling: mean
        checked += 1
    assert checked >= 4, records.keys()


def test_packed_experts_of_both_layouts_are_merged_by_output_channel(tmp_path: Path) -> None:
    """gpt-oss stores [E, I, O]: channel o of expert e is a column of one of its matrices."""
    model = model_of("gpt_oss")
    names = [name for name, weight in model.named_parameters() if weight.dim() == 3]
    assert names

    def change(name: str, expert: int, weight: torch.Tensor) -> torch.Tensor:
        return weight + paired(weight, 2, len(name))[expert] if name in names else weight

    outcome = merged(write_family(tmp_path / "family", model, change))
    found = {name: rebuilt(Artifact(outcome.path), name, tmp_path / "export" / name) for name in EXPERTS}
    for tensor in names:
        record = outcome.manifest.tensors[tensor]
        assert (record.policy, record.channel_axis) == ("merge", 2)
        a, b, c = (found[name][tensor] for name in EXPERTS)
        assert torch.equal(a[..., 0::2], b[..., 0::2])
        assert torch.equal(b[..., 1::2], c[..., 1::2])
        assert not torch.equal(a[..., 1::2], b[..., 1::2])


def test_a_bare_base_and_an_expert_with_a_head_go_together(tmp_path: Path) -> None:
    """A base saved without head stores its body without the prefix that the experts' names have; exports keep their own."""
    model = model_of("gpt2")
    recipe = write_family(tmp_path / "family", model, noisy)
    folder = tmp_path / "family" / "base"
    body = AutoModel.from_pretrained(folder)
    for path in folder.iterdir():
        path.unlink()
    body.save_pretrained(folder)
    assert not set(read_checkpoint(folder)) & set(read_checkpoint(tmp_path / "family" / "a"))
    outcome = merged(recipe)
    assert any("go by the base's names" in note for note in outcome.manifest.notes)
    assert sum(record.policy == "merge" for record in outcome.manifest.tensors.values()) == 8
    for name in EXPERTS:
        assert (
            rebuilt(Artifact(outcome.path), name, tmp_path / "export" / name).keys()
            == read_checkpoint(tmp_path / "family" / name).keys()
        )


@pytest.mark.parametrize("kind", ["gpt2", "gpt_oss"])
def test_matrices_stored_in_out_are_cut_into_chunks_like_any(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of five channels, which end inside matrices and reach from one packed expert into the next."""
    monkeypatch.setattr(layout, "CHUNK_ELEMENTS", 5 * 16)
    recipe = write_family(tmp_path / "family", model_of(kind), noisy)
    outcome = merged(recipe, {"merge.groups": 3})
    for name in EXPERTS:
        found = rebuilt(Artifact(outcome.path), name, tmp_path / "export" / name)
        for tensor, weight in read_checkpoint(tmp_path / "family" / name).items():
            assert torch.equal(found[tensor].view(torch.int32), weight.view(torch.int32)), tensor


@pytest.mark.parametrize("kind", ["gpt2", "gpt_oss"])
def test_workers_and_another_recipe_read_the_stored_base(kind: str, tmp_path: Path) -> None:
    """The base's rows are in the store: workers find them there, and a later run does not make them again."""
    recipe = write_family(tmp_path / "family", model_of(kind), noisy)
    alone = merged(recipe)
    spread = merged(
        recipe,
        {
            "cluster": {"kind": "local", "workers": 2},
            "output": str(tmp_path / "spread"),
            "deltas": str(tmp_path / "spread-deltas"),
        },
    )
    assert spread.version == alone.version
    stored = list((tmp_path / "deltas").glob("*/base/complete.json"))
    assert len(stored) == 1
    before = stored[0].stat().st_mtime_ns
    merged(recipe, {"merge.groups": 1})
    assert stored[0].stat().st_mtime_ns == before
