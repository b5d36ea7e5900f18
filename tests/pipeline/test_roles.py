"""Roles by names and shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.roles import Role, Shape, is_head, layer_of, natural_order, roles, tie_partner

LINEAR = Role("linear", "merge")


def axes(tensors: Mapping[str, Shape], **config: Any) -> dict[str, int]:
    return {name: role.channel_axis for name, role in roles(tensors, config).items() if len(tensors[name]) > 1}


def test_biases_tell_conv1d_from_linear_of_the_same_names() -> None:
    square = {"h.0.attn.c_proj.weight": (24, 24), "h.0.attn.c_proj.bias": (24,)}
    gpt2 = {**square, "h.0.mlp.c_fc.weight": (24, 96), "h.0.mlp.c_fc.bias": (96,)}
    bigcode = {**square, "h.0.mlp.c_fc.weight": (96, 24), "h.0.mlp.c_fc.bias": (96,)}
    for model_type in ("gpt2", "gpt_bigcode", "new"):
        assert set(axes(gpt2, model_type=model_type).values()) == {1}
        assert set(axes(bigcode, model_type=model_type).values()) == {0}


def test_only_without_a_vote_the_model_type_decides() -> None:
    weight = {"transformer.h.0.attn.c_proj.weight": (24, 24)}
    name = next(iter(weight))
    assert roles(weight, {"model_type": "gpt2"})[name] == Role("conv1d", "merge", 1, "[in, out] by the model type")
    assert roles(weight, {"decoder": {"model_type": "gpt2"}})[name].channel_axis == 1
    assert roles(weight, {"model_type": "gpt_bigcode"})[name] == LINEAR


def test_unknown_layers_follow_their_own_biases() -> None:
    found = roles({"blocks.0.zig.weight": (8, 6), "blocks.0.zig.bias": (6,), "blocks.1.zig.weight": (8, 6)}, {})
    assert {name: (role.policy, role.channel_axis, role.note) for name, role in found.items()} == {
        "blocks.0.zig.weight": ("merge", 1, None),
        "blocks.0.zig.bias": ("private", 0, None),
        "blocks.1.zig.weight": ("merge", 1, None),
    }


def test_two_stacks_of_blocks_may_store_the_same_names_differently() -> None:
    found = axes(
        {
            "visual.resblocks.0.mlp.c_fc.weight": (96, 24),
            "visual.resblocks.0.mlp.c_fc.bias": (96,),
            "text.h.0.mlp.c_fc.weight": (16, 64),
            "text.h.0.mlp.c_fc.bias": (64,),
        }
    )
    assert found == {"visual.resblocks.0.mlp.c_fc.weight": 0, "text.h.0.mlp.c_fc.weight": 1}


def test_biases_that_disagree_are_noted() -> None:
    tensors = {
        "h.0.a.c_fc.weight": (8, 6), "h.0.a.c_fc.bias": (6,), "h.0.b.c_fc.weight": (8, 6), "h.0.b.c_fc.bias": (8,),
    }  # fmt: skip
    role = roles(tensors, {})["h.0.a.c_fc.weight"]
    assert role == Role("linear", "merge", 0, "biases disagree on the output axis; treated as [out, in]")


EXPERTS = "model.layers.0.mlp.experts"


@pytest.mark.parametrize(
    ("tensors", "config", "axis"),
    [
        # gpt-oss 20b: hidden and inner sizes are equal, so that only the first tensor shows it
        ({"gate_up_proj": (32, 2880, 5760), "down_proj": (32, 2880, 2880)}, {"hidden_size": 2880}, 2),
        ({"gate_up_proj": (32, 5760, 2880), "down_proj": (32, 2880, 2880)}, {"hidden_size": 2880}, 1),
        ({"gate_up_proj": (16, 5120, 16384), "down_proj": (16, 8192, 5120)}, {"text_config": {"hidden_size": 5120}}, 2),
        # GLU with an inner size of half the hidden size: all are square or say nothing, but a bias does
        ({"gate_up_proj": (4, 8, 8), "down_proj": (4, 4, 8), "down_proj_bias": (4, 8)}, {}, 2),
        ({"gate_up_proj": (4, 8, 8), "down_proj": (4, 8, 4), "down_proj_bias": (4, 8)}, {}, 1),
    ],
)
def test_the_axis_of_packed_experts(tensors: dict[str, Shape], config: dict[str, Any], axis: int) -> None:
    found = roles({f"{EXPERTS}.{name}": shape for name, shape in tensors.items()}, config)
    for name, role in found.items():
        assert role == (Role("bias", "private") if name.endswith("bias") else Role("experts", "merge", axis))


@pytest.mark.parametrize(
    ("config", "role"),
    [
        ({"model_type": "gpt_oss"}, Role("experts", "merge", 2, "[experts, in, out] by the model type gpt_oss")),
        (
            {"model_type": "llama4", "text_config": {"model_type": "llama4_text", "hidden_size": 8}},
            Role("experts", "merge", 2, "[experts, in, out] by the model type llama4"),
        ),
        (
            {"model_type": "mixtral", "hidden_size": 8},
            Role("experts", "private", 0, "nothing shows the output axis of the packed experts; kept private"),
        ),
    ],
)
def test_packed_experts_that_show_no_axis(config: dict[str, Any], role: Role) -> None:
    assert roles({f"{EXPERTS}.down_proj": (4, 8, 8)}, config) == {f"{EXPERTS}.down_proj": role}


def test_packed_experts_that_contradict_each_other_are_private() -> None:
    tensors: dict[str, Shape] = {f"{EXPERTS}.gate_up_proj": (4, 6, 8), f"{EXPERTS}.down_proj": (4, 4, 6)}
    note = "sizes and biases disagree on the output axis of the packed experts; kept private"
    assert set(roles(tensors, {"hidden_size": 6}).values()) == {Role("experts", "merge", 2)}
    tensors[f"{EXPERTS}.gate_up_proj_bias"] = (4, 6)
    found = roles(tensors, {"hidden_size": 6})
    assert found[f"{EXPERTS}.down_proj"] == Role("experts", "private", 0, note)


@pytest.mark.parametrize(
    ("name", "shape", "role"),
    [
        ("tok_embeddings.weight", (61, 24), Role("embedding", "private")),  # Mistral's own files
        ("layers.0.attention.wq.weight", (24, 24), LINEAR),
        ("layers.0.feed_forward.w2.weight", (24, 40), LINEAR),
        ("output.weight", (61, 24), Role("head", "private")),
        ("model.layers.0.output.weight", (61, 24), LINEAR),
        ("model.layers.61.embed_tokens.weight", (61, 24), Role("embedding", "private")),  # DeepSeek-V3's last block
        ("model.layers.61.shared_head.head.weight", (61, 24), Role("head", "private")),
        ("model.layers.61.eh_proj.weight", (24, 48), LINEAR),
        ("h.0.attn.bias", (1, 1, 16, 16), Role("buffer", "private")),  # OpenAI's GPT-2 on the Hub
        ("gpt_neox.layers.0.attention.masked_bias", (), Role("buffer", "private")),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", (8,), Role("buffer", "private")),
        ("model.layers.0.mlp.gate.weight", (40, 24), LINEAR),  # no experts beside it: an ordinary gate
        ("model.mm_projector.2.weight", (24, 32), LINEAR),  # LLaVA's own files
        ("model.image_newline", (24,), Role("other", "private")),
        ("model.layers.0.mlp.experts.gate_up_proj_blocks", (4, 80, 3, 16), None),  # gpt-oss in MXFP4
        ("bert.embeddings.LayerNorm.gamma", (24,), Role("norm", "private")),
        ("bert.encoder.layer.0.zig.weight", (24, 24), Role("unknown", "merge", note="not known; treated as [out, in]")),
        ("zig.weight", (30, 24), Role("unknown", "merge", note="not known; treated as [out, in]")),
        ("zig.weight", (3, 4, 5), Role("unknown", "private", note="not known; its 3 dimensions are kept private")),
        ("zig.weight", (61, 24), Role("embedding", "private", note="has a row per token: taken for an embedding or a head")),
        ("zig", (5,), Role("other", "private")),
    ],
)
def test_names_beyond_those_of_transformers(name: str, shape: Shape, role: Role | None) -> None:
    found = roles({name: shape}, {"vocab_size": 61})[name]
    assert found == (role or Role("unknown", "private", note=f"not known; its {len(shape)} dimensions are kept private"))


names = st.lists(
    st.sampled_from(
        ["model", "layers", "h", "0", "experts", "c_fc", "gate", "down_proj", "embed", "norm", "weight", "bias", ""]
    ),
    min_size=1,
).map(".".join)


@given(
    st.dictionaries(names | st.text(), st.lists(st.integers(0, 4), max_size=5).map(tuple)), st.sampled_from([{}, {"n_embd": 2}])
)
def test_every_tensor_has_a_role_with_an_axis_of_its_own(tensors: dict[str, Shape], config: dict[str, Any]) -> None:
    found = roles(tensors, config)
    assert found.keys() == tensors.keys()
    for name, role in found.items():
        assert role.channel_axis <= max(len(tensors[name]) - 1, 0)
        assert role.policy == "private" or len(tensors[name]) in (2, 3)
        assert role.policy == "merge" or role.channel_axis == 0 or (role.channel_axis == -1 and len(tensors[name]) == 1)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.3.mlp.down_proj.weight", "model.layers.3"),
        ("h.11.attn.c_attn.weight", "h.11"),
        ("encoder.block.2.layer.0.SelfAttention.q.weight", "encoder.block.2"),
        ("visual.transformer.resblocks.4.mlp.c_fc.weight", "visual.transformer.resblocks.4"),
        ("model.norm.weight", "model.norm.weight"),
    ],
)
def test_layers(name: str, layer: str) -> None:
    assert layer_of(name) == layer


def test_layers_sort_as_numbers() -> None:
    assert sorted(["l.10.w", "l.9.w"], key=natural_order) == ["l.9.w", "l.10.w"]


@pytest.mark.parametrize(
    ("name", "stored", "partner"),
    [
        ("lm_head.weight", ["model.embed_tokens.weight", "model.norm.weight"], "model.embed_tokens.weight"),
        ("model.embed_tokens.weight", ["lm_head.weight"], "lm_head.weight"),
        ("lm_head.weight", ["transformer.wte.weight", "transformer.wpe.weight"], "transformer.wte.weight"),
        ("embed_out.weight", ["gpt_neox.embed_in.weight"], "gpt_neox.embed_in.weight"),
        ("output.weight", ["tok_embeddings.weight"], "tok_embeddings.weight"),
        ("lm_head.weight", ["backbone.embeddings.weight"], "backbone.embeddings.weight"),
        ("encoder.embed_tokens.weight", ["shared.weight", "lm_head.weight"], "shared.weight"),
        ("decoder.embed_tokens.weight", ["shared.weight"], "shared.weight"),
        ("shared.weight", ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"], "decoder.embed_tokens.weight"),
        ("lm_head.weight", ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"], "decoder.embed_tokens.weight"),
        ("lm_head.weight", ["shared.weight", "encoder.embed_tokens.weight"], "shared.weight"),
        (
            "cls.predictions.decoder.weight",
            ["bert.embeddings.word_embeddings.weight", "bert.embeddings.position_embeddings.weight"],
            "bert.embeddings.word_embeddings.weight",
        ),
        ("cls.predictions.decoder.bias", ["cls.predictions.bias"], "cls.predictions.bias"),
        ("lm_head.decoder.bias", ["lm_head.bias", "lm_head.dense.bias"], "lm_head.bias"),
        ("lm_head.bias", ["lm_head.weight", "model.norm.bias"], None),
        ("lm_head.weight", ["model.embed_tokens.weight", "model.embed_tokens_per_layer.weight"], "model.embed_tokens.weight"),
        ("lm_head.weight", ["model.embed_tokens.weight", "model.layers.61.embed_tokens.weight"], "model.embed_tokens.weight"),
        (
            "thinker.lm_head.weight",
            ["thinker.model.embed_tokens.weight", "talker.model.embed_tokens.weight"],
            "thinker.model.embed_tokens.weight",
        ),
        ("lm_head.weight", ["a.embed_tokens.weight", "b.embed_tokens.weight"], None),
        ("lm_head.weight", ["lm_head.weight"], None),
        ("model.norm.weight", ["model.embed_tokens.weight"], None),
    ],
)
def test_tie_partners(name: str, stored: list[str], partner: str | None) -> None:
    assert tie_partner(name, stored) == partner
    assert tie_partner(name, dict.fromkeys(stored)) == partner


def test_what_a_tie_makes_a_copy() -> None:
    copies = ["lm_head.weight", "embed_out.weight", "cls.predictions.decoder.weight", "cls.predictions.decoder.bias"]
    originals = ["model.embed_tokens.weight", "shared.weight", "cls.predictions.bias", "lm_head.bias", "classifier.weight"]
    assert [is_head(name) for name in copies + originals] == [True] * 4 + [False] * 5


@pytest.mark.parametrize(
    ("name", "shape", "axis"),
    [
        ("lm_head.bias", (40,), -1),
        ("cls.predictions.bias", (40,), -1),
        ("classifier.bias", (3,), -1),
        ("score.bias", (3,), -1),
        ("model.norm.weight", (16,), 0),
        ("model.layers.0.mlp.up_proj.bias", (16,), 0),
        ("classifier.weight", (3, 16), 0),
    ],
)
def test_vectors_that_experts_may_have_in_other_lengths_are_rows_of_one_entry(name: str, shape: Shape, axis: int) -> None:
    assert roles({name: shape}, {})[name] == Role(roles({name: shape}, {})[name].kind, "private", axis)


@pytest.mark.parametrize("kind", [["x"], {"a": 1}, 5, None])
def test_a_model_type_that_is_no_string_is_none(kind: Any) -> None:
    assert roles({"h.0.attn.c_attn.weight": (8, 24)}, {"model_type": kind})["h.0.attn.c_attn.weight"].channel_axis == 0
