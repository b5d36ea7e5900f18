"""Roles against what the live modules of many models are."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pipeline.roles import is_vocabulary, roles, tie_partner

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


def test_tensors_that_a_tie_left_out_are_found_again(saved: tuple[PreTrainedModel, Path]) -> None:
    model, folder = saved
    with safe_open(folder / "model.safetensors", "pt") as file:
        stored = set(file.keys())
    state = model.state_dict()
    places = {state[name].data_ptr(): name for name in stored & state.keys()}
    for name in state.keys() - stored:
        original = places.get(state[name].data_ptr())
        assert tie_partner(name, stored) == original or original is None
