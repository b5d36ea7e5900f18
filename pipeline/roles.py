"""What a tensor is, by its name and shape, not by the model's class: its output channels and its default policy. Pure.

Weight matrices of the transformer's blocks are merged. Embeddings, heads, norms and biases are private: merging them
ruins every method, and beside the matrices they are small. Names are those of Hugging Face checkpoints (also Mistral's
and OpenAI's own); tensors of other names are classed by their shapes, with a note.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from storage.layout import ENTRIES

Kind = Literal[
    "embedding", "head", "position", "linear", "fused", "conv1d", "experts", "expert", "router", "norm", "bias", "convolution",
    "buffer", "other", "unknown",
]  # fmt: skip
Policy = Literal["merge", "private"]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Role:
    """What one tensor is."""

    kind: Kind
    """``position`` is also token types and relative biases; ``fused`` several linears over one input, their rows below each
    other; ``conv1d`` any matrix stored (in, out), as GPT-2's; ``experts`` all experts' matrices in one tensor; ``expert`` one
    of them; ``other`` vectors, scalars and parameters of state spaces and recurrences."""
    policy: Policy
    """The default one; a recipe's rules may say otherwise."""
    channel_axis: int = 0
    """The axis of the output channels: 0 in ``[O, I]``, 1 in ``[I, O]`` and ``[E, O, I]``, 2 in ``[E, I, O]``; -1 of vectors
    whose entries are channels, as those of a head's bias."""
    note: str | None = None
    """What was assumed about it, if anything was."""


def _ends(*names: str) -> re.Pattern[str]:
    """A pattern of the last components of a name."""
    return re.compile(rf"(?:^|\.)(?:{'|'.join(names)})$")


BLOCK = re.compile(r"(?:^|\.)(?:\w*layers?|h|\w*blocks?)\.(\d+)\.")

EMBEDDING = _ends(
    r"(?:embed_tokens|wte|word_embeddings|embed_in|tokens_embed|tok_embeddings|token_embedding|shared"
    r"|embeddings)\.weight"
)
HEAD = re.compile(
    r"(?:^|\.)(?:\w*lm_head(?:\.decoder|\.linear)?|embed_out|predictions\.decoder|vocab_projector|shared_head\.head|output_layer)"
    r"\.weight$|^(?:output|decoder|proj_out)\.weight$"
)
PER_LAYER = _ends(r"embed_tokens_per_layer\.weight")
"""Gemma 3n's second table of tokens, which is tied to nothing."""
HEAD_BIAS = re.compile(
    r"(?:^|\.)(?:\w*lm_head(?:\.decoder|\.linear)?|embed_out|predictions(?:\.decoder)?|vocab_projector)\.bias$|^decoder\.bias$"
)
COPIED_BIAS = _ends(r"(?:predictions|lm_head)\.decoder\.bias")
"""BERT's and RoBERTa's LM heads have a second name for their bias."""

PRIVATE: tuple[tuple[Kind, re.Pattern[str]], ...] = (
    ("buffer", _ends(
        r"\w*inv_freq", r"masked_bias", r"position_ids", r"token_type_ids", r"num_batches_tracked", r"running_(?:mean|var)",
        r"\w*(?:cos|sin)_cached", r"relative_position_index", r"final_logits_bias",
    )),
    ("router", re.compile(r"(?:^|\.)(?:\w*router\w*|shared_expert_gate)(?:\.|$)")),
    ("norm", _ends(r"(?:\w*(?i:norm)\w*|(?:\w+_)?ln(?:_\w+|\d*))\.(?:weight|bias|gamma|beta|scale)")),
    ("bias", _ends(r"(?:\w+_)?bias")),
    ("position", _ends(
        r"(?:wpe|positions_embed|embed_positions|\w*position(?:al)?_embed\w*|\w*pos_emb\w*|token_type_embeddings|segment_embeddings"
        r"|relative_attention_bias|rel_embeddings|rel_pos\w*|\w*relative_position\w*)(?:\.weight)?"
    )),
    ("embedding", EMBEDDING),
    ("embedding", PER_LAYER),
    ("head", HEAD),
    ("head", re.compile(
        r"^head\.weight$|(?:^|\.)(?:\w*classifier|score|qa_outputs|seq_relationship|classification_head|(?:\w+_)?(?:reward"
        r"|value|regression|v)_head|multiple_choice_head|\w*summary|discriminator_predictions)(?:\.[A-Za-z_]+)*\.weight$"
    )),
    ("embedding", _ends(r"(?!\w*patch)\w*embed(?:s|ding|dings)?(?:\.\d+)?\.weight")),
    ("other", _ends(r"A_log", r"D", r"time_(?:mix|decay|first|maa|faaaa)\w*", r"\w+_tokens?", r"latents", r"sinks")),
)  # fmt: skip
"""What is private by its name, the first match counts."""

GATE = re.compile(r"(?:^|\.)gate(?:\.wg)?\.weight$")
"""A router where experts lie beside it, else an ordinary matrix."""
EXPERTS = re.compile(r"(?:^|\.)experts\.")
ONE_EXPERT = re.compile(r"(?:^|\.)experts\.\d+\.")
PACKED = re.compile(
    r"(?:^|\.)(?:experts\.|(?=input_linear|output_linear))"
    r"(?:(?P<into>gate_up_proj|gate_proj|up_proj|w1|w3|input_linear)|down_proj|w2|output_linear)(?:\.weight)?$"
)
"""All experts' matrices in one tensor, from (``into``) or to the hidden states."""

WEIGHT = re.compile(r"(?P<module>[^.]*?)(?:\.\d+)?[._]weight$")
FUSED = _ends(r"(?:\w*qkv\w*|query_key_value|c_attn|W_pack|gate_up_proj|in_proj_ba|Wi)\.weight", r"in_proj_weight")
LINEAR = re.compile(
    r"\w*(?:proj|linear|dense|lin\d?|fc_?(?:\d|in|out)?|ffn(?:_output)?|attn)\w*|(?:query|key|value|receptance|output)\w*"
    r"|[qkvo]|[wW](?:[qkvo]|i(?:_\d)?|\d)|gate"
)
"""Names of linear layers inside blocks."""
OUTSIDE = re.compile(
    r"proj|pool|transform(?!er)|connector|merger|adapter|align|resampler|perceiver|dense|linear|mapping|patch_embed"
)
"""Parts of names of linear layers outside of blocks: poolers, projectors between towers, transforms before a head."""

CONV1D = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})
"""GPT-2's matrices, stored (in, out). GPT-BigCode and GPT-Neo use the same names for [out, in]: biases tell them apart."""
TRANSPOSED_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
"""Model types with such matrices, where no bias shows it."""
TRANSPOSED = _ends("mm_input_projection_weight")
"""Matrices stored (in, out) whatever the model: Gemma 3's projector."""
TRANSPOSED_EXPERTS = frozenset({"gpt_oss", "llama4", "llama4_text"})
"""Model types with packed experts ``[E, I, O]``, where no size shows it."""
TEXT_CONFIGS = ("text_config", "thinker_config", "llm_config", "language_config", "decoder")
"""Where the configuration of a language model lies in that of a model with several parts."""


def is_vocabulary(name: str) -> bool:
    """Whether the rows (of a vector: the entries) are tokens, so that an expert may have more of them than the base."""
    return any(pattern.search(name) for pattern in (EMBEDDING, PER_LAYER, HEAD, HEAD_BIAS))


TASK = re.compile(
    r"(?:^|\.)(?:pooler|cls|predictions|lm_head\.(?:dense|layer_norm)|vocab_(?:transform|layer_norm|projector)|\w*classifier|score"
    r"|qa_outputs|seq_relationship|classification_head|pre_classifier|(?:\w+_)?(?:reward|value|regression|v)_head)(?:\.|$)"
)
"""What models of one family have for one task and not for another: poolers, heads and what stands before them."""


def is_task_part(name: str) -> bool:
    """Whether a checkpoint may lack it, or have it in another size, for what it was trained to do. The LM head is none."""
    return bool(TASK.search(name)) and not is_head(name)


def is_head(name: str) -> bool:
    """Whether this is the LM head, or its bias' second name: the tensor that a tie makes a copy."""
    return bool(HEAD.search(name) or COPIED_BIAS.search(name))


def layer_of(name: str) -> str:
    """The block a tensor belongs to, for example ``model.layers.3``; its own name outside of blocks."""
    match = BLOCK.search(name)
    return name[: match.end() - 1] if match else name


def natural_order(name: str) -> list[Any]:
    """Sort key that puts layer 2 before layer 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


SHARED = _ends(r"shared\.weight")
ENCODER, DECODER = _ends(r"encoder\.embed_tokens\.weight"), _ends(r"decoder\.embed_tokens\.weight")
TIES: tuple[tuple[re.Pattern[str], tuple[re.Pattern[str], ...]], ...] = (
    (HEAD, (SHARED, DECODER, EMBEDDING)),
    (SHARED, (DECODER, ENCODER, HEAD)),
    (EMBEDDING, (SHARED, HEAD)),
)
"""What a tensor can be tied to, in order of preference."""


def _common(left: str, right: str) -> int:
    """How many components two names share at their beginnings."""
    pairs = list(zip(left.split("."), right.split("."), strict=False))
    return next((number for number, (a, b) in enumerate(pairs) if a != b), len(pairs))


def tie_partner(name: str, tensors: Iterable[str]) -> str | None:
    """The stored tensor that a tied LM head or embedding, absent from the checkpoint, is read as.

    Among several the one of the same part of the model, by the longest common prefix; None when that is not one. Tensors of
    a block (heads that predict several tokens) are nobody's partner.
    """
    stored = [other for other in tensors if other != name and not BLOCK.search(other)]
    if COPIED_BIAS.search(name):
        original = name.removesuffix("decoder.bias") + "bias"
        return original if original in stored else None
    if HEAD_BIAS.search(name):
        copy = name.removesuffix("bias") + "decoder.bias"
        return copy if copy in stored else None
    wanted = next((others for pattern, others in TIES if pattern.search(name)), ())
    for other in wanted:
        found = [candidate for candidate in stored if other.search(candidate)]
        nearest = max((_common(name, candidate) for candidate in found), default=0)
        best = [candidate for candidate in found if _common(name, candidate) == nearest]
        if best:
            return best[0] if len(best) == 1 else None
    return None


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration of the language model."""
    inner = next((config[key] for key in TEXT_CONFIGS if isinstance(config.get(key), Mapping)), None)
    return config if inner is None else _text(inner)


def _size(config: Mapping[str, Any], *keys: str) -> int | None:
    """The first of these keys that the language model's configuration, or else the whole, has."""
    return next((found[key] for found in (_text(config), config) for key in keys if isinstance(found.get(key), int)), None)


def _model_types(config: Mapping[str, Any]) -> set[Any]:
    return {kind for kind in (config.get("model_type"), _text(config).get("model_type")) if isinstance(kind, str)}


def _side(size: int | None, shape: Shape) -> int | None:
    """Which of two axes has this size; None when both or neither have."""
    return None if shape[0] == shape[1] or size not in shape else shape.index(size)


def _bias(name: str, tensors: Mapping[str, Shape]) -> Shape:
    """Shape of the bias that belongs to a weight; () when there is none."""
    return tensors.get(name.removesuffix("weight") + "bias") or tensors.get(f"{name}_bias") or ()


def _family(name: str) -> tuple[str, str]:
    """Matrices that are surely stored the same way: those of one name, or all of GPT-2's names, in one stack of blocks."""
    block, weight = BLOCK.search(name), WEIGHT.search(name)
    stack = name[: block.start()] if block else name.rpartition(".")[0]
    module = weight["module"] if weight else name
    return stack, "" if module in CONV1D else module


def _matrix_votes(tensors: Mapping[str, Shape]) -> dict[tuple[str, str], set[int]]:
    """The output axes that biases show, per family: a bias has as many entries as its weight has output channels."""
    votes: dict[tuple[str, str], set[int]] = {}
    for name, shape in tensors.items():
        bias = _bias(name, tensors) if len(shape) == 2 and WEIGHT.search(name) else ()
        axis = _side(bias[0], shape) if len(bias) == 1 else None
        if axis is not None:
            votes.setdefault(_family(name), set()).add(axis)
    return votes


def _packed_axis(tensors: Mapping[str, Shape], config: Mapping[str, Any]) -> tuple[int | None, str | None]:
    """The output axis of all packed experts of a checkpoint, and what was assumed.

    Shown by the axis that has the size of the hidden states (``[E, 2I, H]``, ``[E, H, I]`` or their transposes) and by biases
    ``[E, O]``; the model's type is asked only when none shows it. None when they contradict each other or none is known.
    """
    hidden = _size(config, "hidden_size", "d_model", "n_embd")
    votes = set()
    for name, shape in tensors.items():
        match = PACKED.search(name) if len(shape) == 3 else None
        if not match:
            continue
        side, bias = _side(hidden, shape[1:]), _bias(name, tensors)
        if side is not None:
            votes.add(2 - side if match["into"] else 1 + side)
        side = _side(bias[1], shape[1:]) if len(bias) == 2 else None
        if side is not None:
            votes.add(1 + side)
    if len(votes) == 1:
        return votes.pop(), None
    if votes:
        return None, "sizes and biases disagree on the output axis of the packed experts; kept private"
    known = sorted(_model_types(config) & TRANSPOSED_EXPERTS)
    if known:
        return 2, f"[experts, in, out] by the model type {known[0]}"
    return None, "nothing shows the output axis of the packed experts; kept private"


@dataclass(frozen=True)
class _Facts:
    """What is known of a checkpoint as a whole."""

    votes: Mapping[tuple[str, str], set[int]]
    packed: tuple[int | None, str | None]
    moe: Collection[str]
    """Prefixes of the modules that have experts."""
    transposed: bool
    """Whether the model type says that GPT-2's names are stored (in, out)."""
    vocabulary: int | None


def _matrix(name: str, shape: Shape, facts: _Facts) -> Role:
    """The role of a 2-D tensor that is not private by its name."""
    weight = WEIGHT.search(name)
    module = weight["module"] if weight else ""
    if TRANSPOSED.search(name):
        return Role("conv1d", "merge", 1)
    if not BLOCK.search(name) and shape[0] == facts.vocabulary:
        return Role("embedding", "private", note="has a row per token: taken for an embedding or a head")
    kind: Kind = "expert" if ONE_EXPERT.search(name) else "fused" if FUSED.search(name) else "linear"
    found = facts.votes.get(_family(name), set()) if weight else set()
    if len(found) == 2:
        return Role(kind, "merge", note="biases disagree on the output axis; treated as [out, in]")
    if 1 in found:
        return Role(kind if kind == "expert" else "conv1d", "merge", 1)
    if not found and module in CONV1D and facts.transposed:
        return Role("conv1d", "merge", 1, "[in, out] by the model type")
    known = weight and (LINEAR.fullmatch(module) if BLOCK.search(name) else OUTSIDE.search(name))
    if found or known or kind != "linear":
        return Role(kind, "merge")
    return Role("unknown", "merge", note="not known; treated as [out, in]")


def _role(name: str, shape: Shape, facts: _Facts) -> Role:
    kind = next((kind for kind, pattern in PRIVATE if pattern.search(name)), None)
    gate = GATE.search(name)
    if gate and name[: gate.start()] in facts.moe:
        kind = "router"
    if kind == "bias" and len(shape) > 2:  # causal masks of old GPT-2 and GPT-NeoX checkpoints
        kind = "buffer"
    if kind:
        own_length = len(shape) == 1 and (is_vocabulary(name) or is_task_part(name))
        return Role(kind, "private", ENTRIES if own_length else 0)
    if len(shape) < 2:
        return Role("norm" if name.endswith(".weight") else "other", "private")
    if len(shape) == 2:
        return _matrix(name, shape, facts)
    if len(shape) == 3 and PACKED.search(name):
        axis, note = facts.packed
        return Role("experts", "private", note=note) if axis is None else Role("experts", "merge", axis, note)
    if all(size == 1 for size in shape[:-1]):
        return Role("other", "private")
    if WEIGHT.search(name) and (len(shape) > 3 or "conv" in name):
        return Role("convolution", "private")
    return Role("unknown", "private", note=f"not known; its {len(shape)} dimensions are kept private")


def roles(tensors: Mapping[str, Shape], config: Mapping[str, Any]) -> dict[str, Role]:
    """The role of every tensor of a checkpoint, by names and shapes and, where these leave something open, its config.json."""
    facts = _Facts(
        votes=_matrix_votes(tensors),
        packed=_packed_axis(tensors, config),
        moe={name[: match.start()] for name in tensors if (match := EXPERTS.search(name))},
        transposed=bool(_model_types(config) & TRANSPOSED_MODELS),
        vocabulary=_size(config, "vocab_size"),
    )
    return {name: _role(name, shape, facts) for name, shape in tensors.items()}
