from __future__ import annotations

import json
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.kernels.bits import to_float
from pipeline.kernels.lowrank import added, delta_rows, embedding_delta_rows
from storage.adapters import ADAPTER_CONFIG, adapter_notes, adapter_tensors, check_base_copies
from storage.errors import CheckpointError
from storage.files import LocalFile
from storage.tensors import BaseRows, FileRows, LowRank, TensorInfo

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the imports of peft warn of depends on what else is installed
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import (
        BertConfig,
        BertForMaskedLM,
        BertModel,
        BloomConfig,
        BloomForCausalLM,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        LlamaForSequenceClassification,
        T5Config,
        T5ForConditionalGeneration,
    )

NUMBERS = {"F32": torch.float32, "BF16": torch.bfloat16}
Infos = dict[str, TensorInfo]


def header(path: Path, transposed: Callable[[str], bool] | None = None) -> Infos:
    """The tensors of a safetensors file, by its format: a length, JSON, data."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    entries = json.loads(raw[8 : 8 + length])
    file = LocalFile(path, len(raw))
    return {
        name: TensorInfo(
            name,
            e["dtype"],
            tuple(e["shape"]),
            FileRows(file, 8 + length + e["data_offsets"][0]),
            int(bool(transposed and transposed(name))),
        )
        for name, e in entries.items()
        if name != "__metadata__"
    }


def is_conv1d(name: str) -> bool:
    """GPT-2's linear layers, which store (in, out)."""
    return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def llama(tied: bool = False) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=53, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=tied, attention_bias=True,
        )
    )  # fmt: skip


def tied_llama() -> LlamaForCausalLM:
    return llama(tied=True)


def gpt2() -> GPT2LMHeadModel:
    sizes = {"vocab_size": 53, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config.from_dict({**sizes, "bos_token_id": 0, "eos_token_id": 0}))


def classifier(folder: Path, dtype: torch.dtype) -> Any:
    return LlamaForSequenceClassification.from_pretrained(folder, dtype=dtype, num_labels=3, pad_token_id=0)


@dataclass(frozen=True)
class Case:
    lora: dict[str, Any]
    model: Callable[[], Any] = llama
    """What the base's checkpoint is written by."""
    opened: Callable[[Path, torch.dtype], Any] | None = None
    """How peft gets its base, when not by the class that wrote it."""
    base: str = "F32"
    adapter: str = "F32"
    vocabulary: int | None = None
    """What training resizes the vocabulary to."""
    own: tuple[str, ...] = field(default=())
    """Tensors the adapter is to hold whole."""


BERT: dict[str, Any] = {
    "vocab_size": 53,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
LINEAR = ["q_proj", "v_proj", "down_proj"]
CASES = {
    "plain": Case({"r": 4, "lora_alpha": 7, "target_modules": LINEAR}),
    "all linear layers": Case({"r": 3, "lora_alpha": 5, "target_modules": "all-linear"}),
    "head": Case({"r": 4, "lora_alpha": 7, "target_modules": ["lm_head", "o_proj"]}),
    "rank stabilised": Case({"r": 6, "lora_alpha": 7, "use_rslora": True, "target_modules": LINEAR}),
    "patterns": Case(
        {
            "r": 4,
            "lora_alpha": 7,
            "target_modules": LINEAR,
            "rank_pattern": {"down_proj": 9, r"layers\.1\.self_attn\..*": 2},
            "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 11, "v_proj": 3},
        }
    ),
    "rank stabilised patterns": Case(
        {"r": 4, "lora_alpha": 7, "use_rslora": True, "target_modules": LINEAR, "rank_pattern": {"q_proj": 5}}
    ),
    "head saved": Case({"r": 4, "target_modules": LINEAR, "modules_to_save": ["lm_head"]}, own=("lm_head.weight",)),
    "tokens added": Case(
        {"r": 4, "target_modules": LINEAR, "modules_to_save": ["embed_tokens", "lm_head"]},
        vocabulary=59,
        own=("model.embed_tokens.weight", "lm_head.weight"),
    ),
    "tokens added, frozen": Case(
        {"r": 4, "target_modules": LINEAR}, vocabulary=59, own=("model.embed_tokens.weight", "lm_head.weight")
    ),
    "tied tokens added, frozen": Case(
        {"r": 4, "target_modules": LINEAR}, tied_llama, vocabulary=59, own=("model.embed_tokens.weight",)
    ),
    "tied embedding": Case({"r": 4, "target_modules": ["embed_tokens"]}, tied_llama),
    "tied embedding and head saved": Case(
        {"r": 4, "target_modules": LINEAR, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        tied_llama,
        own=("model.embed_tokens.weight",),
    ),
    "tied embedding and head saved, tokens added": Case(
        {"r": 4, "target_modules": LINEAR, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        tied_llama,
        vocabulary=59,
        own=("model.embed_tokens.weight",),
    ),
    "embedding saved": Case(
        {"r": 4, "target_modules": LINEAR, "modules_to_save": ["embed_tokens"]}, own=("model.embed_tokens.weight",)
    ),
    "embedding of a bare encoder saved": Case(
        {"r": 4, "target_modules": ["query"], "modules_to_save": ["word_embeddings"]},
        lambda: BertModel(BertConfig(**BERT)),
        own=("embeddings.word_embeddings.weight",),
    ),
    "tied embedding saved by a classifier": Case(
        {"r": 4, "target_modules": LINEAR, "modules_to_save": ["embed_tokens"], "task_type": "SEQ_CLS"},
        tied_llama,
        opened=classifier,
        own=("model.embed_tokens.weight", "score.weight"),
    ),
    "norm saved": Case(
        {"r": 4, "target_modules": LINEAR, "modules_to_save": ["input_layernorm"]},
        own=tuple(f"model.layers.{layer}.input_layernorm.weight" for layer in (0, 1)),
    ),
    "embedding": Case({"r": 4, "lora_alpha": 7, "target_modules": ["embed_tokens", "q_proj"]}),
    "biases": Case(
        {"r": 4, "target_modules": ["q_proj"], "bias": "all"},
        own=tuple(f"model.layers.{layer}.self_attn.{which}_proj.bias" for layer in (0, 1) for which in "qkvo"),
    ),
    "biases of targets": Case(
        {"r": 4, "target_modules": ["q_proj"], "bias": "lora_only"},
        own=tuple(f"model.layers.{layer}.self_attn.q_proj.bias" for layer in (0, 1)),
    ),
    "new head": Case(
        {"r": 4, "target_modules": LINEAR, "modules_to_save": ["score"]}, opened=classifier, own=("score.weight",)
    ),
    "Conv1D": Case({"r": 4, "lora_alpha": 7, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}, gpt2),
    "Conv1D with biases": Case(
        {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "lora_only"},
        gpt2,
        own=tuple(f"transformer.h.{layer}.attn.c_attn.bias" for layer in (0, 1)),
    ),
    "Conv1D and an embedding": Case({"r": 4, "target_modules": ["wte", "c_fc"], "fan_in_fan_out": True}, gpt2),
    "adapter in bf16": Case({"r": 4, "lora_alpha": 7, "target_modules": LINEAR}, adapter="BF16"),
    "base in bf16": Case({"r": 4, "lora_alpha": 7, "target_modules": LINEAR}, base="BF16"),
    "both in bf16": Case({"r": 4, "lora_alpha": 7, "target_modules": LINEAR}, base="BF16", adapter="BF16"),
    "Conv1D in bf16": Case({"r": 4, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}, gpt2, base="BF16"),
}


def write(case: Case, folder: Path) -> dict[str, torch.Tensor]:
    """A base and an adapter of it as peft writes them; the state of the model that peft merges of what it reads from there."""
    torch.manual_seed(0)
    dtype = NUMBERS[case.base]
    written = case.model().to(dtype)
    for name, parameter in written.named_parameters():
        if name.endswith("bias"):  # zeros otherwise
            parameter.data.normal_(0, 0.02)
    written.save_pretrained(folder / "base")

    def base() -> Any:
        torch.manual_seed(1)  # of rows and heads that the file lacks
        opened: Any = type(written).from_pretrained
        model = case.opened(folder / "base", dtype) if case.opened else opened(folder / "base", dtype=dtype)
        if case.vocabulary:
            model.resize_token_embeddings(case.vocabulary, mean_resizing=False)
        return model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # peft's remarks on ties, embeddings and Conv1D
        warnings.simplefilter("ignore", FutureWarning)  # names of transformers that peft still calls
        model = get_peft_model(base(), LoraConfig(**case.lora))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.normal_(0, 0.08).to(NUMBERS[case.adapter])
            elif parameter.requires_grad:
                parameter.data += torch.randn_like(parameter) * 0.01
        model.save_pretrained(str(folder / "adapter"))
        merged = PeftModel.from_pretrained(base(), folder / "adapter").merge_and_unload()
    state: dict[str, torch.Tensor] = merged.state_dict()
    return state


def opened(case: Case, folder: Path) -> tuple[dict[str, Any], Infos, Infos]:
    """Configuration and headers of the adapter, headers of the base."""
    axis = is_conv1d if case.model is gpt2 else None
    config = json.loads((folder / "adapter" / ADAPTER_CONFIG).read_bytes())
    stored = header(folder / "adapter" / "adapter_model.safetensors")
    return config, stored, header(folder / "base" / "model.safetensors", axis)


def numbers(info: TensorInfo, start: int = 0, stop: int | None = None) -> Any:
    return to_float(info.read(start, info.rows if stop is None else stop), info.dtype).numpy()


def delta(rows: LowRank) -> Any:
    computed = embedding_delta_rows if rows.transposed else delta_rows
    return computed(numbers(rows.a), numbers(rows.b), rows.scale)


def rebuilt(info: TensorInfo, base: Infos) -> torch.Tensor:
    """A tensor of the expert, in the file's layout."""
    if isinstance(info.data, LowRank):
        bits = added(base[info.name].read(0, info.rows), info.dtype, delta(info.data))
    elif isinstance(info.data, BaseRows):
        bits = base[info.name].read(0, info.rows)
    else:
        bits = info.read(0, info.rows)
    signed = torch.from_numpy(bits.view(f"<i{bits.itemsize}")).view(NUMBERS[info.dtype])
    return signed.T if len(info.shape) > 1 and info.channel_axis == 1 else signed.reshape(info.shape)


def ordered(tensor: torch.Tensor) -> torch.Tensor:
    """Integers that count bf16 numbers in order."""
    bits = tensor.view(torch.int16).to(torch.int32)
    return torch.where(bits < 0, -32768 - bits, bits)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_experts_have_the_bits_of_peft(case: Case, tmp_path: Path) -> None:
    state = write(case, tmp_path)
    config, stored, base = opened(case, tmp_path)
    tensors = adapter_tensors("expert x", config, stored, base)
    check_base_copies("expert x", stored, base)
    assert list(tensors)[: len(base)] == list(base)
    assert {name for name, info in tensors.items() if isinstance(info.data, FileRows)} == set(case.own)
    low_rank = {name for name, info in tensors.items() if isinstance(info.data, LowRank)}
    assert len(low_rank) == sum(".lora_A." in key or key.endswith("lora_embedding_A") for key in stored)
    for name, info in tensors.items():
        if name not in state:  # a head that the classifier does without
            assert name == "lm_head.weight"
            continue
        assert info.name == name
        assert info.shape == state[name].shape
        assert torch.equal(rebuilt(info, base), state[name]), name


def test_a_bf16_embedding_is_rounded_once_where_peft_rounds_twice(tmp_path: Path) -> None:
    case = Case({"r": 4, "lora_alpha": 7, "target_modules": ["embed_tokens"]}, base="BF16")
    state = write(case, tmp_path)
    config, stored, base = opened(case, tmp_path)
    info = adapter_tensors("expert x", config, stored, base)["model.embed_tokens.weight"]
    assert isinstance(info.data, LowRank)
    ours, theirs, moved = rebuilt(info, base), state[info.name], torch.from_numpy(delta(info.data))
    # peft's bits, when its first rounding is made too
    weight = load_file(tmp_path / "base" / "model.safetensors")[info.name]
    assert torch.equal(weight + moved.to(torch.bfloat16), theirs)
    steps = (ordered(ours) - ordered(theirs)).abs()
    small = moved.abs() <= torch.minimum(ours.abs(), theirs.abs()).float()
    assert steps[small].max() == 1
    # where base and delta cancel, half a step of the delta is more than one of the sum
    assert ((ours.float() - theirs.float()).abs() <= moved.abs() * 2**-7)[~small].all()


def test_deltas_equal_a_float64_reference(tmp_path: Path) -> None:
    case = CASES["patterns"]
    write(case, tmp_path)
    config, stored, base = opened(case, tmp_path)
    tensors = adapter_tensors("expert x", config, stored, base)
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    scales = {  # by the recipe of the case, by hand
        "model.layers.0.self_attn.q_proj": 11 / 4,
        "model.layers.0.self_attn.v_proj": 3 / 4,
        "model.layers.0.mlp.down_proj": 7 / 9,
        "model.layers.1.self_attn.q_proj": 7 / 2,
        "model.layers.1.self_attn.v_proj": 3 / 2,
        "model.layers.1.mlp.down_proj": 7 / 9,
    }
    assert {f"{module}.weight" for module in scales} == {n for n, i in tensors.items() if isinstance(i.data, LowRank)}
    for module, scale in scales.items():
        rows = tensors[f"{module}.weight"].data
        assert isinstance(rows, LowRank)
        assert rows.scale == scale
        a, b = (factors[f"base_model.model.{module}.lora_{side}.weight"].numpy().astype(np.float64) for side in "AB")
        np.testing.assert_allclose(delta(rows), scale * np.einsum("or,ri->oi", b, a), rtol=0, atol=1e-6)


def test_factors_of_a_resized_vocabulary_are_refused(tmp_path: Path) -> None:
    write(Case({"r": 4, "target_modules": ["embed_tokens"]}, vocabulary=59), tmp_path)
    config, stored, base = opened(CASES["plain"], tmp_path)
    with pytest.raises(CheckpointError, match=r"copies.*embed_tokens.*expected F32 \[53, 32\], got F32 \[59, 32\].*resized"):
        adapter_tensors("expert x", config, stored, base)


def test_an_embedding_that_left_its_tied_head_behind_is_refused(tmp_path: Path) -> None:
    lora = {"r": 4, "target_modules": LINEAR, "modules_to_save": ["embed_tokens"]}
    state = write(Case(lora, tied_llama, vocabulary=59), tmp_path)
    _, stored, base = opened(CASES["plain"], tmp_path)
    assert not torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"]), "peft trains the one alone"
    with pytest.raises(CheckpointError, match=r"copies.*lm_head.weight \(rows 0 to 59 differ from .*embed_tokens.weight\)"):
        check_base_copies("expert x", stored, base)


def bert() -> BertForMaskedLM:
    return BertForMaskedLM(BertConfig(**BERT))


def bloom() -> BloomForCausalLM:
    return BloomForCausalLM(BloomConfig(vocab_size=53, hidden_size=32, n_layer=1, n_head=4))


def t5() -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(T5Config(vocab_size=53, d_model=32, d_kv=8, d_ff=40, num_layers=1, num_heads=4))


LEFT_BEHIND: dict[str, tuple[Callable[[], Any], dict[str, Any], str, str]] = {
    "llama": (
        tied_llama, {"target_modules": LINEAR, "modules_to_save": ["embed_tokens"]},
        "model.embed_tokens.weight", "lm_head.weight",
    ),
    "gpt2": (
        gpt2, {"target_modules": ["c_attn"], "modules_to_save": ["wte"], "fan_in_fan_out": True},
        "transformer.wte.weight", "lm_head.weight",
    ),
    "bloom": (
        bloom, {"target_modules": ["query_key_value"], "modules_to_save": ["word_embeddings"]},
        "transformer.word_embeddings.weight", "lm_head.weight",
    ),
    "bert": (
        bert, {"target_modules": ["query"], "modules_to_save": ["word_embeddings"]},
        "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight",
    ),
    "t5": (t5, {"target_modules": ["q"], "modules_to_save": ["shared"]}, "shared.weight", "encoder.embed_tokens.weight"),
}  # fmt: skip


@pytest.mark.parametrize(("model", "lora", "name", "head"), LEFT_BEHIND.values(), ids=LEFT_BEHIND)
def test_a_trained_embedding_without_what_is_tied_to_it_is_refused(
    model: Callable[[], Any], lora: dict[str, Any], name: str, head: str, tmp_path: Path
) -> None:
    case = Case({"r": 4, **lora}, model)
    state = write(case, tmp_path)
    assert torch.equal(state[head], load_file(tmp_path / "base" / "model.safetensors")[name]), "peft leaves it the base's"
    assert not torch.equal(state[head], state[name])
    config, stored, base = opened(case, tmp_path)
    assert head not in base
    with pytest.raises(
        CheckpointError, match=rf"expert x: an embedding of its own, {name}, .*with peft, untie the merged model"
    ):
        adapter_tensors("expert x", config, stored, base)


@pytest.mark.parametrize("tied", [True, False])
def test_factors_of_a_tied_embedding_are_noted_as_peft_merges_them_to_another_model(tied: bool, tmp_path: Path) -> None:
    case = Case({"r": 4, "lora_alpha": 7, "target_modules": ["embed_tokens"]}, tied_llama if tied else llama)
    write(case, tmp_path)
    tokens = torch.arange(9)[None]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # peft's remarks on ties
        live = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
        before = live(input_ids=tokens).logits
        after = live.merge_and_unload().eval()(input_ids=tokens).logits
    assert torch.allclose(before, after, atol=1e-5) is not tied
    config, stored, base = opened(case, tmp_path)
    notes = adapter_notes(config, str(tmp_path / "base"), adapter_tensors("expert x", config, stored, base))
    assert ["factors of model.embed_tokens.weight change the LM head too" in note for note in notes] == [True] * tied


def test_a_copy_that_is_not_the_bases_is_found(tmp_path: Path) -> None:
    case = CASES["embedding"]
    write(case, tmp_path)
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"][-1, -1] += 1
    save_file(tensors, path)
    _, stored, base = opened(case, tmp_path)
    with pytest.raises(CheckpointError, match=r"expert x: .*embed_tokens.base_layer.weight \(rows 0 to 53 differ from model"):
        check_base_copies("expert x", stored, base)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_a_copy_of_another_type_is_compared_by_value(kind: torch.dtype, tmp_path: Path) -> None:
    values = torch.linspace(-2, 2, 33).to(torch.float16).to(torch.bfloat16).to(torch.float32).reshape(11, 3)
    save_file({"model.embed_tokens.weight": values.to(torch.bfloat16)}, tmp_path / "base.safetensors")
    save_file({"model.embed_tokens.base_layer.weight": values.to(kind)}, tmp_path / "copy.safetensors")
    check_base_copies("expert x", header(tmp_path / "copy.safetensors"), header(tmp_path / "base.safetensors"))
