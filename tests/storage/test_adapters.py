from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from storage.adapters import adapter_notes, adapter_tensors
from storage.errors import CheckpointError
from storage.files import File
from storage.layout import DTYPES
from storage.tensors import BaseRows, FileRows, LowRank, TensorInfo
from tests.support.tiny_experts import HIDDEN, INTERMEDIATE, VOCABULARY, shapes

Q, V, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj", "model.layers.1.mlp.down_proj"
Infos = dict[str, TensorInfo]


@dataclass(frozen=True)
class NoFile:
    """A file that must not be read."""

    place: str = "a file"
    size: int = 0

    def read_into(self, view: memoryview, offset: int) -> int:
        raise AssertionError("headers are enough")


def info(name: str, shape: tuple[int, ...], dtype: str = "BF16", file: File = NoFile()) -> TensorInfo:
    return TensorInfo(name, dtype, shape, FileRows(file, 0))


def base_infos() -> Infos:
    return {name: info(name, shape) for name, shape in shapes().items()}


RANK = 4
SIZES = {Q: (HIDDEN, HIDDEN), V: (HIDDEN // 2, HIDDEN), DOWN: (HIDDEN, INTERMEDIATE)}


def adapter_infos() -> Infos:
    found = {}
    for module, (outer, inner) in SIZES.items():
        for side, shape in (("A", (RANK, inner)), ("B", (outer, RANK))):
            key = f"base_model.model.{module}.lora_{side}.weight"
            found[key] = info(key, shape, "F32")
    return found


CONFIG: dict[str, Any] = {
    "peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "bias": "none",
    "use_rslora": False, "init_lora_weights": True, "fan_in_fan_out": False, "modules_to_save": None, "use_dora": False,
    "layer_replication": None, "megatron_core": "megatron.core", "megatron_config": None, "loftq_config": {},
    "rank_pattern": {}, "alpha_pattern": {}, "eva_config": None, "lora_bias": False, "trainable_token_indices": None,
    "target_parameters": None,
}  # fmt: skip


def targets(tensors: Mapping[str, TensorInfo]) -> dict[str, tuple[str, str, float]]:
    return {
        name: (found.data.a.name, found.data.b.name, found.data.scale)
        for name, found in tensors.items()
        if isinstance(found.data, LowRank)
    }


def test_headers_are_enough() -> None:
    base = base_infos()
    tensors = adapter_tensors("expert x", CONFIG, adapter_infos(), base)
    assert list(tensors) == list(base)
    assert {name: (i.dtype, i.shape, i.channel_axis) for name, i in tensors.items()} == {
        name: ("BF16", shape, 0) for name, shape in shapes().items()
    }
    assert targets(tensors) == {
        f"{module}.weight": (*(f"base_model.model.{module}.lora_{side}.weight" for side in "AB"), 2.0) for module in SIZES
    }
    assert all(isinstance(tensors[name].data, BaseRows) for name in base if name.removesuffix(".weight") not in SIZES)


def renamed(change: Callable[[str], str]) -> Callable[[Infos], Infos]:
    return lambda infos: {change(name): replace(found, name=change(name)) for name, found in infos.items()}


@pytest.mark.parametrize(
    "change",
    [
        lambda name: name.replace(".weight", ".default.weight"),
        lambda name: name.replace(".weight", ".my_adapter.weight"),
        lambda name: name.removeprefix("base_model.model."),
        lambda name: name.replace("base_model.model.model.", "base_model.model."),
        lambda name: name.replace("base_model.model.model.", "base_model.model.language_model.model."),
    ],
    ids=["default", "named", "no prefix of peft", "bare model", "inside another"],
)
def test_other_names_mean_the_same(change: Callable[[str], str]) -> None:
    tensors = adapter_tensors("expert x", CONFIG, renamed(change)(adapter_infos()), base_infos())
    assert targets(tensors).keys() == {f"{module}.weight" for module in SIZES}


def test_a_bare_base_is_found_by_suffix() -> None:
    base = renamed(lambda name: name.removeprefix("model."))(base_infos())
    tensors = adapter_tensors("expert x", CONFIG, adapter_infos(), base)
    assert targets(tensors).keys() == {f"{module}.weight".removeprefix("model.") for module in SIZES}


@pytest.mark.parametrize("form", ["{}.weight", "{}.modules_to_save.weight", "{}.modules_to_save.default.weight"])
def test_modules_to_save_in_every_form(form: str) -> None:
    key = f"base_model.model.{form.format('lm_head')}"
    stored = adapter_infos() | {key: info(key, (VOCABULARY + 3, HIDDEN), "F32")}
    tensors = adapter_tensors("expert x", CONFIG | {"modules_to_save": ["lm_head"]}, stored, base_infos())
    head = tensors["lm_head.weight"]
    assert (head.name, head.dtype, head.shape) == ("lm_head.weight", "F32", (VOCABULARY + 3, HIDDEN))
    assert isinstance(head.data, FileRows)


@pytest.mark.parametrize("form", ["classifier.dense.weight", "classifier.modules_to_save.default.dense.weight"])
def test_a_head_of_several_layers_is_the_experts_own(form: str) -> None:
    key = f"base_model.model.{form}"
    stored = adapter_infos() | {key: info(key, (3, HIDDEN))}
    tensors = adapter_tensors("expert x", CONFIG | {"modules_to_save": ["classifier", "score"]}, stored, base_infos())
    assert list(tensors)[-1] == "classifier.dense.weight"


def test_the_factors_of_conv1d_fit_its_output_channels() -> None:
    name = "h.0.mlp.c_fc.weight"
    base = {name: replace(info(name, (HIDDEN, INTERMEDIATE)), channel_axis=1)}
    stored = {
        f"h.0.mlp.c_fc.lora_{side}.weight": info(f"h.0.mlp.c_fc.lora_{side}.weight", shape)
        for side, shape in (("A", (RANK, HIDDEN)), ("B", (INTERMEDIATE, RANK)))
    }
    found = adapter_tensors("expert x", CONFIG | {"fan_in_fan_out": True}, stored, base)[name]
    assert (found.channel_axis, found.rows, found.width) == (1, INTERMEDIATE, HIDDEN)


@pytest.mark.parametrize("plain", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_initialisations_that_leave_the_base_alone(plain: Any) -> None:
    adapter_tensors("expert x", CONFIG | {"init_lora_weights": plain}, adapter_infos(), base_infos())


def test_scales() -> None:
    def scale(**changes: Any) -> float:
        tensors = adapter_tensors("expert x", CONFIG | changes, adapter_infos(), base_infos())
        return targets(tensors)[f"{Q}.weight"][2]

    assert scale(lora_alpha=6) == 1.5
    assert scale(lora_alpha=6, use_rslora=True) == 6 / math.sqrt(4)
    assert scale(alpha_pattern={"proj": 1}) == 2.0, "a pattern is the whole of the last parts of a name"
    assert scale(alpha_pattern={r"self_attn\.(q|k)_proj": 2.5, "q_proj": 9}) == 0.625, "the first that fits"
    assert scale(alpha_pattern={Q: 3, "q_proj": 9}) == 0.75
    assert scale(r=None, rank_pattern=None, alpha_pattern=None) == 2.0
    assert scale(r=9, rank_pattern={".*_proj": 4}) == 2.0


A_KEY, B_KEY = (f"base_model.model.{Q}.lora_{side}.weight" for side in "AB")
WRONG_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "IA3": ({"peft_type": "IA3"}, "expected peft_type LORA, got IA3. Merge it into its base with peft"),
    "no type": ({"peft_type": None}, "expected peft_type LORA, got None"),
    "DoRA": ({"use_dora": True}, "use_dora: DoRA also changes the length .*merge_and_unload"),
    "layers": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication: the expert has other layers.*Merge it"),
    "parameters": ({"target_parameters": ["experts.w1"]}, "target_parameters: LoRA of bare parameters"),
    "tokens": ({"trainable_token_indices": [1]}, "trainable_token_indices: single trained tokens"),
    "bias of factors": ({"lora_bias": True}, "lora_bias: biases of the factors"),
    "Megatron": ({"megatron_config": {"a": 1}}, "megatron_config: layers of Megatron"),
    "KaSA": ({"kasa_config": {"beta": 1}}, "kasa_config: KaSA truncates"),
    "block-diagonal": ({"use_bdlora": {"nblocks": 2}}, "use_bdlora: block-diagonal"),
    "aLoRA": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens: .*leave the adapter out"),
    "Arrow": ({"arrow_config": {"top_k": 2}}, "arrow_config: .*leave the adapter out"),
    "unheard of": ({"use_newlora": True, "warp_config": {"a": 1}}, "not understood: use_newlora, warp_config. Merge it"),
    "QALoRA": ({"use_qalora": True}, "not understood: use_qalora"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_16"}, "pissa_niter_16 changed the base.*path_initial_model_for_weight_conv"),
    "OLoRA": ({"init_lora_weights": "olora"}, "olora changed the base before training"),
    "CorDA": ({"init_lora_weights": "corda"}, "corda changed the base before training"),
    "LoftQ": ({"init_lora_weights": "loftq"}, "loftq changed the base before training.*or merge it"),
    "LoRA-GA": ({"init_lora_weights": "lora_ga"}, "lora_ga changed the base before training"),
    "unheard of start": ({"init_lora_weights": "dream"}, "init_lora_weights dream is not known"),
    "rank 0": ({"r": 0}, r"adapter_config.json: r: .*greater than 0, got 0\. Restore"),
    "rank -1": ({"r": -1}, "r: .*greater than 0, got -1"),
    "rank in words": ({"r": "four"}, "r: .*integer, got four"),
    "pattern of rank 0": ({"rank_pattern": {"q_proj": 0}}, "rank_pattern.q_proj: .*greater than 0"),
    "no pattern": ({"rank_pattern": {"q_proj(": 4}}, "'q_proj\\(' is no regular expression"),
    "no alpha": ({"lora_alpha": None}, "lora_alpha: .*number, got None"),
    "alpha without end": ({"lora_alpha": float("inf")}, "lora_alpha: .*finite"),
    "modules in a word": ({"modules_to_save": "lm_head"}, "modules_to_save: .*list"),
    "another rank": ({"r": 8}, "ranks that differ from adapter_config.json: .*expected 8, got 4"),
    "another rank by pattern": ({"rank_pattern": {"v_proj": 5}}, f"ranks that differ .*{V}: expected 5, got 4"),
    "module not saved": ({"modules_to_save": ["lm_head"]}, "modules_to_save without a tensor in the adapter: lm_head"),
    "Conv1D of a linear base": ({"fan_in_fan_out": True}, r"fan_in_fan_out .*\(in, out\), the base's .* is \(out, in\)"),
}


@pytest.mark.parametrize(("changes", "match"), WRONG_CONFIGS.values(), ids=WRONG_CONFIGS)
def test_configurations_that_are_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(CheckpointError, match=f"expert x: .*{match}"):
        adapter_tensors("expert x", CONFIG | changes, adapter_infos(), base_infos())


def plus(*tensors: tuple[str, tuple[int, ...]], dtype: str = "F32") -> Callable[[Infos], Infos]:
    return lambda stored: stored | {f"base_model.model.{key}": info(f"base_model.model.{key}", s, dtype) for key, s in tensors}


def head(rank: int = RANK) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return ("lm_head.lora_A.weight", (rank, HIDDEN)), ("lm_head.lora_B.weight", (VOCABULARY, rank))


def without(*keys: str) -> Callable[[Infos], Infos]:
    return lambda infos: {name: found for name, found in infos.items() if name not in keys}


def changed(key: str, **changes: Any) -> Callable[[Infos], Infos]:
    return lambda infos: infos | {key: replace(infos[key], **changes)}


def same(infos: Infos) -> Infos:
    return infos


def nothing(infos: Infos) -> Infos:
    return {}


def twice(infos: Infos) -> Infos:
    """A model inside which the base is, and another like it."""
    return {f"{side}.{name}": replace(i, name=f"{side}.{name}") for side in ("left", "right") for name, i in infos.items()}


ABSENT = "model.layers.7.self_attn.q_proj"
WRONG_TENSORS: dict[str, tuple[Callable[[Infos], Infos], Callable[[Infos], Infos], str]] = {
    "A alone": (without(B_KEY), same, f"A without B.*: {A_KEY}. The file is not whole"),
    "B alone": (without(A_KEY), same, f"A without B.*: {B_KEY}"),
    "A of another width": (changed(A_KEY, shape=(RANK, 9)), same, r"q_proj.weight \[16, 16\]: expected A \[rank, 16\].*4, 9"),
    "B of other rows": (changed(B_KEY, shape=(9, RANK)), same, r"expected .* B \[16, rank\], got A \[4, 16\] and B \[9, 4\]"),
    "two ranks": (changed(B_KEY, shape=(HIDDEN, 3)), same, r"do not fit the base: .*got A \[4, 16\] and B \[16, 3\]"),
    "rank 0": (changed(A_KEY, shape=(0, HIDDEN)), same, r"got A \[0, 16\]"),
    "flat": (changed(A_KEY, shape=(RANK * HIDDEN,)), same, r"got A \[64\]"),
    "convolution": (changed(A_KEY, shape=(RANK, HIDDEN, 1, 1)), same, r"got A \[4, 16, 1, 1\]"),
    "8 bits": (changed(A_KEY, dtype="F8_E4M3"), same, r"data type that is not read .*lora_A.weight \(F8_E4M3\).*Save"),
    "quantised base": (same, changed(f"{Q}.weight", dtype="U8", shape=(128, 1)), rf"{Q}.weight \(U8\). Give the base without"),
    "no such module": (
        plus((f"{ABSENT}.lora_A.weight", (RANK, HIDDEN)), (f"{ABSENT}.lora_B.weight", (HIDDEN, RANK))),
        same,
        f"target modules that the base does not have: {ABSENT}. Give the base that the adapter was trained on",
    ),
    "two such bases": (same, twice, f"fit several tensors of the base: {Q} .left.{Q}.weight, right"),
    "magnitudes": (plus((f"{Q}.lora_magnitude_vector", (HIDDEN,))), same, "not understood: .*magnitude_vector. Merge it"),
    "bias of B": (plus((f"{Q}.lora_B.bias", (HIDDEN,))), same, "not understood: .*lora_B.bias"),
    "tokens": (plus(("model.embed_tokens.token_adapter.trainable_tokens_delta", (2, HIDDEN))), same, "not understood: .*delta"),
    "original module": (plus(("lm_head.original_module.weight", (20, HIDDEN))), same, "not understood: .*original_module"),
    "undeclared": (plus(("score.weight", (3, HIDDEN))), same, "tensors that are not understood: base_model.model.score.weight"),
    "two adapters": (plus((f"{Q}.lora_A.other.weight", (RANK, HIDDEN))), same, f"same tensor .*: {A_KEY} and .*lora_A.other"),
    "factors and whole": (plus((f"{Q}.weight", (HIDDEN, HIDDEN))), same, f"same tensor of the base: {Q}.weight. Save"),
    "whole twice": (plus(("norm.weight", (16,)), ("model.norm.weight", (16,))), same, "norm.weight for model.norm.weight"),
    "two whole": (plus(("norm.weight", (16,)), ("norm.modules_to_save.weight", (8,))), same, "norm.modules_to_save.weight and"),
    "tied head as target": (plus(*head()), without("lm_head.weight"), "LM head of its own, lm_head, .*ties its head.*untie"),
    "tied head saved": (plus(("lm_head.weight", (20, 16))), without("lm_head.weight"), "LM head of its own, .*lm_head.weight"),
    "nothing": (nothing, same, "the adapter holds no tensor"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "change_base", "match"), WRONG_TENSORS.values(), ids=WRONG_TENSORS)
def test_tensors_that_are_refused(change: Callable[[Infos], Infos], change_base: Callable[[Infos], Infos], match: str) -> None:
    with pytest.raises(CheckpointError, match=f"expert x: .*{match}"):
        adapter_tensors("expert x", CONFIG, change(adapter_infos()), change_base(base_infos()))


def test_a_tied_head_that_is_saved_by_name_is_refused_too() -> None:
    stored = plus(("lm_head.weight", (VOCABULARY, HIDDEN)))(adapter_infos())
    with pytest.raises(CheckpointError, match=r"LM head of its own, base_model.model.lm_head.weight, which the base does not"):
        adapter_tensors("expert x", CONFIG | {"modules_to_save": ["lm_head"]}, stored, without("lm_head.weight")(base_infos()))


EMBEDDING = "model.embed_tokens.weight"
SAVED_EMBEDDING = CONFIG | {"modules_to_save": ["embed_tokens"]}


def test_an_embedding_of_its_own_for_a_base_without_head() -> None:
    untied = base_infos()
    tied = without("lm_head.weight")(untied)
    alone = plus((EMBEDDING, (VOCABULARY, HIDDEN)))(adapter_infos())
    for base in (tied, renamed(lambda name: name.removeprefix("model."))(tied)):
        with pytest.raises(CheckpointError, match=r"embedding of its own, (model\.)?embed_tokens.weight, for a base that ties"):
            adapter_tensors("expert x", SAVED_EMBEDDING, alone, base)
    adapter_tensors("expert x", SAVED_EMBEDDING, alone, untied)
    adapter_tensors("expert x", SAVED_EMBEDDING | {"ensure_weight_tying": True}, alone, tied)
    adapter_tensors("expert x", SAVED_EMBEDDING | {"task_type": "TOKEN_CLS"}, alone, tied)
    both = plus(("lm_head.weight", (VOCABULARY, HIDDEN)))(alone)
    adapter_tensors("expert x", SAVED_EMBEDDING, both, tied)


@pytest.mark.parametrize(
    ("stored", "saved", "is_refused"),
    [
        ([], "embeddings.word_embeddings", False),
        (["cls.predictions.bias"], "embeddings.word_embeddings", True),
        (["cls.predictions.bias", "cls.predictions.decoder.weight"], "embeddings.word_embeddings", False),
        (["lm_head.bias"], "embeddings.word_embeddings", True),
        (["decoder.bias"], "embeddings.tok_embeddings", True),
        (["lm_head.bias"], "embeddings.LayerNorm", False),
        (["lm_head.bias"], "embeddings.position_embeddings", False),
        ([], "word_embeddings", True),
        (["output_layer.weight"], "word_embeddings", False),
        ([], "embed_tokens_per_layer", False),
        ([], "embed_in", True),
        (["embed_out.weight"], "embed_in", False),
        (["lm_head.weight"], "shared", True),
    ],
)
def test_what_is_tied_is_told_by_names(stored: list[str], saved: str, is_refused: bool) -> None:
    name = f"{saved}.weight"
    base = {key: info(key, (VOCABULARY, HIDDEN)) for key in [name, *stored]}
    own = plus((name, (VOCABULARY, HIDDEN)))({})
    config = CONFIG | {"modules_to_save": [saved], "rank_pattern": {}}
    if is_refused:
        with pytest.raises(CheckpointError, match=f"embedding of its own, {name}, for a base that ties"):
            adapter_tensors("expert x", config, own, base)
    else:
        assert isinstance(adapter_tensors("expert x", config, own, base)[name].data, FileRows)


def test_all_problems_are_listed_at_once() -> None:
    stored = plus((f"{Q}.lora_magnitude_vector", (HIDDEN,)), ("score.weight", (3, HIDDEN)))(without(B_KEY)(adapter_infos()))
    config = CONFIG | {"use_dora": True, "init_lora_weights": "pissa", "rank_pattern": {"down_proj": 2}}
    with pytest.raises(CheckpointError, match="expert x: 5 problems") as caught:
        adapter_tensors("expert x", config, stored, base_infos())
    assert [
        any(word in problem for problem in caught.value.problems) for word in ("DoRA", "pissa", "ranks", "A without B")
    ] == [True] * 4
    assert any("magnitude_vector" in problem and "score.weight" in problem for problem in caught.value.problems)


def test_many_problems_of_a_kind_are_one() -> None:
    keys = [(f"model.layers.{n}.self_attn.q_proj.lora_{side}.weight", (RANK, RANK)) for n in range(2, 11) for side in "AB"]
    with pytest.raises(CheckpointError, match=r"does not have: model\.layers\.10.* and 5 more\. Give the base") as caught:
        adapter_tensors("expert x", CONFIG, plus(*keys)({}), base_infos())
    assert len(caught.value.problems) == 1


@dataclass(eq=False)
class Recorded:
    """A file of zeros that notes what is read."""

    size: int = 1 << 40
    place: str = "a file"
    reads: list[tuple[int, int]] = field(default_factory=list)

    def read_into(self, view: memoryview, offset: int) -> int:
        self.reads.append((offset, offset + len(view)))
        view[:] = bytes(len(view))
        return len(view)


def test_rows_of_a_delta_are_read_from_those_rows_of_b() -> None:
    file = Recorded()
    stored = {key: replace(found, data=FileRows(file, 1000)) for key, found in adapter_infos().items()}
    rows = adapter_tensors("expert x", CONFIG, stored, base_infos())[f"{DOWN}.weight"].data
    assert file.reads == []
    assert isinstance(rows, LowRank)
    assert rows.b.read(5, 9).shape == (4, RANK)
    row_bytes = RANK * DTYPES["F32"].size
    assert file.reads == [(1000 + 5 * row_bytes, 1000 + 9 * row_bytes)]


@pytest.mark.parametrize(
    ("recorded", "place"),
    [
        ("mistralai/Mistral-7B-v0.1", "mistralai/Mistral-7B-v0.1@" + "a" * 40),
        ("mistralai/mistral-7b-v0.1", "mistralai/Mistral-7B-v0.1"),
        ("/models/Mistral-7B-v0.1/", "mistralai/Mistral-7B-v0.1@main"),
        ("mistralai/Mistral-7B-v0.1", "/data/bases/mistral-7b-v0.1"),
        ("mistralai/Mistral-7B-v0.1", "s3://models/Mistral-7B-v0.1/"),
        (None, "mistralai/Mistral-7B-v0.1"),
        ("", "mistralai/Mistral-7B-v0.1"),
    ],
)
def test_nothing_to_note_of_the_same_base(recorded: str | None, place: str) -> None:
    assert adapter_notes({"base_model_name_or_path": recorded}, place) == []


@pytest.mark.parametrize(
    ("recorded", "place"),
    [
        ("mistralai/Mistral-7B-v0.2", "mistralai/Mistral-7B-v0.1"),
        ("unsloth/Mistral-7B-v0.1", "mistralai/Mistral-7B-v0.1@main"),
        ("/models/llama", "mistralai/Mistral-7B-v0.1"),
        ("mistralai/Mistral-7B-v0.1", "/data/bases/base"),
    ],
)
def test_another_base_is_noted(recorded: str, place: str) -> None:
    (note,) = adapter_notes({"base_model_name_or_path": recorded}, place)
    assert recorded in note
    assert place in note


def test_another_revision_of_the_base_is_noted() -> None:
    name, mine, theirs = "org/model", "a" * 40, "b" * 40
    config = {"base_model_name_or_path": name, "revision": theirs}
    assert theirs in adapter_notes(config, f"{name}@{mine}")[0]
    assert adapter_notes(config, f"{name}@{theirs}") == []
    assert adapter_notes(config | {"revision": "main"}, f"{name}@{mine}") == []
