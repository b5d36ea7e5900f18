from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pipeline.roles import Role, Shape, is_head, is_vocabulary, layer_of, natural_order, roles, tie_partner

HIDDEN, INNER, VOCABULARY = 24, 40, 61
SIZES = {"hidden_size": HIDDEN, "intermediate_size": INNER, "vocab_size": VOCABULARY, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4}
DECODER = {**SIZES, **HEADS, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDE = {**DECODER, "head_dim": 10}  # heads * head_dim is not the hidden size
SMALL_EXPERTS = {"moe_intermediate_size": 14, "num_experts": 3, "num_experts_per_tok": 2}
GPT2 = {"n_embd": HIDDEN, "n_inner": INNER, "vocab_size": VOCABULARY, "n_layer": 2, "n_head": 4, "n_positions": 16}
BERT = {**SIZES, **HEADS, "max_position_embeddings": 16}
VISION = {**SIZES, **HEADS, "hidden_size": 32, "intermediate_size": 36, "image_size": 16, "patch_size": 4}
T5 = {"d_model": HIDDEN, "d_ff": INNER, "d_kv": 10, "vocab_size": VOCABULARY, "num_layers": 2, "num_heads": 4}
GATED_T5 = {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
MAMBA = {"hidden_size": HIDDEN, "vocab_size": VOCABULARY, "num_hidden_layers": 2, "state_size": 6, "expand": 2}
LLAMA4 = {**WIDE, "intermediate_size_mlp": 44, "num_local_experts": 3, "interleave_moe_layer_step": 2}
LLAMA4_VISION = {**VISION, "vision_output_dim": 20, "projector_input_dim": 20, "projector_output_dim": 20}

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", DECODER),
    "llama with biases": ("LlamaForCausalLM", "LlamaConfig", {**DECODER, "attention_bias": True, "mlp_bias": True}),
    "llama, classifier": ("LlamaForSequenceClassification", "LlamaConfig", DECODER),
    "mistral": ("MistralForCausalLM", "MistralConfig", DECODER),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", DECODER),
    "qwen2-moe": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", {**DECODER, **SMALL_EXPERTS, "shared_expert_intermediate_size": 22}),
    "qwen2.5-vl": (
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        {"text_config": DECODER, "vision_config": {**VISION, "depth": 1, "num_heads": 4, "out_hidden_size": HIDDEN}},
    ),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", WIDE),
    "qwen3-moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**WIDE, **SMALL_EXPERTS}),
    "qwen3-vl-moe": (
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3VLMoeConfig",
        {
            "text_config": {**WIDE, **SMALL_EXPERTS},
            "vision_config": {
                "hidden_size": 32, "intermediate_size": 36, "depth": 1, "num_heads": 4, "patch_size": 4,
                "out_hidden_size": HIDDEN, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
            },
        },
    ),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**DECODER, "num_local_experts": 3}),
    "granite-moe": ("GraniteMoeForCausalLM", "GraniteMoeConfig", {**DECODER, "num_local_experts": 3}),
    "deepseek-v3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            **DECODER, "num_key_value_heads": 4, "moe_intermediate_size": 14, "n_routed_experts": 4, "n_group": 2,
            "topk_group": 1, "num_experts_per_tok": 2, "q_lora_rank": 9, "kv_lora_rank": 7, "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8, "v_head_dim": 6, "first_k_dense_replace": 1,
        },
    ),
    "gpt-oss": ("GptOssForCausalLM", "GptOssConfig", {**WIDE, "num_local_experts": 3, "num_experts_per_tok": 2}),
    "llama4": ("Llama4ForCausalLM", "Llama4TextConfig", LLAMA4),
    "llama4 with images": (
        "Llama4ForConditionalGeneration", "Llama4Config", {"text_config": LLAMA4, "vision_config": LLAMA4_VISION}
    ),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", WIDE),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", WIDE),
    "gemma3 with images": (
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {"text_config": WIDE, "vision_config": VISION, "mm_tokens_per_image": 4},
    ),
    "phi-2": ("PhiForCausalLM", "PhiConfig", DECODER),
    "phi-3": ("Phi3ForCausalLM", "Phi3Config", DECODER),
    "cohere": ("CohereForCausalLM", "CohereConfig", {**DECODER, "use_qk_norm": True}),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", DECODER),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "gpt2 with cross attention": ("GPT2LMHeadModel", "GPT2Config", {**GPT2, "add_cross_attention": True}),
    "gpt2, classifier": ("GPT2ForSequenceClassification", "GPT2Config", GPT2),
    "openai-gpt": ("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", GPT2),
    "gpt-bigcode": ("GPTBigCodeForCausalLM", "GPTBigCodeConfig", GPT2),
    "gpt-neo": (
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {
            "hidden_size": HIDDEN, "intermediate_size": INNER, "vocab_size": VOCABULARY, "num_layers": 2, "num_heads": 4,
            "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 16,
        },
    ),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**SIZES, **HEADS}),
    "gpt-j": ("GPTJForCausalLM", "GPTJConfig", {**GPT2, "rotary_dim": 4}),
    "bloom": ("BloomForCausalLM", "BloomConfig", {"hidden_size": HIDDEN, "vocab_size": VOCABULARY, "n_layer": 2, "n_head": 4}),
    "falcon": ("FalconForCausalLM", "FalconConfig", {**SIZES, **HEADS}),
    "mpt": ("MptForCausalLM", "MptConfig", {"d_model": HIDDEN, "vocab_size": VOCABULARY, "n_layers": 2, "n_heads": 4}),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {**DECODER, "ffn_dim": INNER, "max_position_embeddings": 16, "word_embed_proj_dim": 20},
    ),
    "mamba": ("MambaForCausalLM", "MambaConfig", {**MAMBA, "time_step_rank": 5}),
    "mamba2": ("Mamba2ForCausalLM", "Mamba2Config", {**MAMBA, "num_heads": 4, "head_dim": 12, "n_groups": 1}),
    "rwkv": ("RwkvForCausalLM", "RwkvConfig", SIZES),
    "bert": ("BertForMaskedLM", "BertConfig", BERT),
    "bert, nothing tied": ("BertForPreTraining", "BertConfig", {**BERT, "tie_word_embeddings": False}),
    "bert, classifier": ("BertForSequenceClassification", "BertConfig", BERT),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", BERT),
    "roberta, classifier": ("RobertaForSequenceClassification", "RobertaConfig", BERT),
    "distilbert": (
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {"dim": HIDDEN, "hidden_dim": INNER, "vocab_size": VOCABULARY, "n_layers": 2, "n_heads": 4},
    ),
    "albert": ("AlbertForMaskedLM", "AlbertConfig", {**BERT, "embedding_size": 12}),
    "deberta": (
        "DebertaV2ForMaskedLM",
        "DebertaV2Config",
        {**BERT, "relative_attention": True, "position_buckets": 8, "pos_att_type": ["c2p", "p2c"]},
    ),
    "modernbert": ("ModernBertForMaskedLM", "ModernBertConfig", {**DECODER, "cls_token_id": 1, "sep_token_id": 2}),
    "vit": ("ViTForImageClassification", "ViTConfig", {**VISION, "num_labels": 5}),
    "clip": ("CLIPModel", "CLIPConfig", {"text_config": BERT, "vision_config": VISION, "projection_dim": 18}),
    "llava": (
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "text_config": {**DECODER, "model_type": "llama"},
            "vision_config": {**VISION, "model_type": "clip_vision_model"},
        },
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            "d_model": HIDDEN, "encoder_ffn_dim": INNER, "decoder_ffn_dim": INNER, "vocab_size": VOCABULARY,
            "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
            "max_source_positions": 16, "max_target_positions": 18, "pad_token_id": 0, "decoder_start_token_id": 1,
        },
    ),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "t5 v1.1": ("T5ForConditionalGeneration", "T5Config", GATED_T5),
}  # fmt: skip

MATMULS = {
    # torch.nn.functional.linear(x, weight[expert]): (experts, out, in)
    ("MixtralExperts", "gate_up_proj"): 1,
    ("MixtralExperts", "down_proj"): 1,
    ("Qwen2MoeExperts", "gate_up_proj"): 1,
    ("Qwen2MoeExperts", "down_proj"): 1,
    ("Qwen3MoeExperts", "gate_up_proj"): 1,
    ("Qwen3MoeExperts", "down_proj"): 1,
    ("Qwen3VLMoeTextExperts", "gate_up_proj"): 1,
    ("Qwen3VLMoeTextExperts", "down_proj"): 1,
    ("DeepseekV3Experts", "gate_up_proj"): 1,
    ("DeepseekV3Experts", "down_proj"): 1,
    ("GraniteMoeExperts", "gate_up_proj"): 1,
    ("GraniteMoeExperts", "down_proj"): 1,
    # x @ weight[expert], torch.bmm(x, weight): (experts, in, out)
    ("GptOssExperts", "gate_up_proj"): 2,
    ("GptOssExperts", "down_proj"): 2,
    ("Llama4TextExperts", "gate_up_proj"): 2,
    ("Llama4TextExperts", "down_proj"): 2,
    # torch.matmul(x, weight): (in, out)
    ("Gemma3MultiModalProjector", "mm_input_projection_weight"): 1,
    # torch.nn.functional.linear(x, weight): (out, in)
    ("MultiheadAttention", "in_proj_weight"): 0,
}
"""The axis of the output channels of parameters that are no module of their own, by how their modules' ``forward`` use them."""


@dataclass(frozen=True)
class Truth:
    kinds: frozenset[str]
    axis: int | None
    """Of the output channels; None for what is private."""


def truth(model: PreTrainedModel, path: str) -> Truth:
    """What a live parameter is, by the module it belongs to."""
    owner, _, parameter = path.rpartition(".")
    module = model.get_submodule(owner)
    name = type(module).__name__
    if "Norm" in name:
        return Truth(frozenset({"norm"}), None)
    if "Router" in name or owner.endswith("shared_expert_gate"):
        return Truth(frozenset({"router", "bias"}), None)
    if parameter.endswith("bias"):
        return Truth(frozenset({"bias", "buffer"}), None)
    if (name, parameter) in MATMULS:
        axis = MATMULS[name, parameter]
        kind = "experts" if name.endswith("Experts") else "conv1d" if axis else "fused"
        return Truth(frozenset({kind}), axis)
    if isinstance(module, nn.Embedding):
        return Truth(frozenset({"embedding", "position"}), None)
    if isinstance(module, Conv1D):
        return Truth(frozenset({"conv1d"}), 1)
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return Truth(frozenset({"convolution"}), None)
    if isinstance(module, nn.Linear):
        heads = {"classifier", "score", "seq_relationship"}
        if module is model.get_output_embeddings() or heads & set(owner.split(".")):
            return Truth(frozenset({"head"}), None)
        return Truth(frozenset({"linear", "fused"}), 0)
    return Truth(frozenset({"other", "position", "norm", "buffer"}), None)


def key(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.contiguous().numpy().tobytes()


def known(model: PreTrainedModel) -> dict[tuple[Any, ...], Truth]:
    """The truth of every tensor, and of every expert's matrices, by what is in it: names change when a model is saved."""
    found: dict[tuple[Any, ...], Truth] = {}
    for path, tensor in model.state_dict().items():
        right = truth(model, path)
        if key(tensor) in found:
            right = Truth(right.kinds | found[key(tensor)].kinds, right.axis)  # tied: one tensor is two modules
        found[key(tensor)] = right
        if right.kinds == {"experts"}:
            for expert in tensor:
                rows = expert if right.axis == 1 else expert.T
                for part in (rows, *rows.chunk(2)):
                    found[key(part)] = Truth(frozenset({"expert"}), 0)
    return found


@pytest.fixture(params=MODELS, scope="module")
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    """A model with different values in every tensor, and where it was saved."""
    model_class, config_class, sizes = MODELS[request.param]
    torch.manual_seed(0)
    model: PreTrainedModel = getattr(transformers, model_class)(getattr(transformers, config_class)(**sizes))
    for tensor in model.state_dict().values():
        tensor.normal_()
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    return model, folder


def test_roles_are_what_the_live_modules_are(saved: tuple[PreTrainedModel, Path]) -> None:
    model, folder = saved
    right = known(model)
    config = json.loads((folder / "config.json").read_text())
    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    found = roles({name: tuple(tensor.shape) for name, tensor in tensors.items()}, config)
    assert found.keys() == tensors.keys()
    wrong = {}
    for name, tensor in tensors.items():
        expected, role = right[key(tensor)], found[name]
        policy, axis = ("private", min(role.channel_axis, 0)) if expected.axis is None else ("merge", expected.axis)
        if role.kind not in expected.kinds or (role.policy, role.channel_axis) != (policy, axis):
            wrong[name] = (tuple(tensor.shape), role, expected)
    assert not wrong
    assert not {name: role.note for name, role in found.items() if role.note}
    with_tokens = {name for name, tensor in tensors.items() if tensor.shape[:1] == (VOCABULARY,)}
    assert {name for name in tensors if is_vocabulary(name)} == with_tokens - {"head.weight"}  # may as well be a classifier


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


def test_tensors_that_a_tie_left_out_are_found_again(saved: tuple[PreTrainedModel, Path]) -> None:
    model, folder = saved
    with safe_open(folder / "model.safetensors", "pt") as file:
        stored = set(file.keys())
    state = model.state_dict()
    places = {state[name].data_ptr(): name for name in stored & state.keys()}
    for name in state.keys() - stored:
        original = places.get(state[name].data_ptr())
        assert tie_partner(name, stored) == original or original is None


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
