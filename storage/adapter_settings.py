"""What ``adapter_config.json`` says of a LoRA adapter; what of it is refused or noted (arXiv 2106.09685; peft 0.21)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from storage.places import HUB_ID, scheme_of, split_revision
from storage.tensors import LowRank, TensorInfo

ADAPTER_CONFIG = "adapter_config.json"
MERGE = (
    "Merge it into its base with peft (PeftModel.from_pretrained(...).merge_and_unload().save_pretrained(...)) and give the "
    "merged model as the expert"
)

_REFUSED_SETTINGS = {
    "use_dora": "DoRA also changes the length of weight vectors",
    "layer_replication": "the expert has other layers than the base",
    "target_parameters": "LoRA of bare parameters is not understood",
    "trainable_token_indices": "single trained tokens are not understood",
    "lora_bias": "biases of the factors are not understood",
    "megatron_config": "layers of Megatron are not understood",
    "kasa_config": "KaSA truncates the base's weights before training",
    "use_bdlora": "block-diagonal factors are not understood",
    "alora_invocation_tokens": "aLoRA changes some tokens of a text only",
    "arrow_config": "Arrow mixes adapters token by token",
}
_UNMERGEABLE = {"alora_invocation_tokens", "arrow_config"}
_KNOWN_SETTINGS = {
    "use_rslora", "runtime_config", "eva_config", "corda_config", "lora_ga_config", "loftq_config", "velora_config",
}  # fmt: skip
"""Settings named like those of variants that leave ``scale * (B A)`` what it is, or act through ``init_lora_weights``."""
_PLAIN_INITS = {"true", "false", "none", "gaussian", "eva", "orthogonal", "mica"}
"""Initialisations that leave the base as it is."""
_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")

EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|wte|word_embeddings|embed_in)\.weight$")
_SHARED = re.compile(r"(?:^|\.)shared\.weight$")
"""The embedding of encoders and decoders, which their own are tied to even where the head is not."""
_OF_ENCODER = re.compile(r"(?:^|\.)embeddings\.(?:word|tok)_embeddings\.weight$")
_OUTPUT = re.compile(
    r"(?:^|\.)(?:\w*lm_head(?:\.decoder|\.linear)?|embed_out|predictions\.decoder|vocab_projector|output_layer)\.weight$"
    r"|^(?:output|decoder|proj_out)\.weight$"
)
_OUTPUT_BIAS = re.compile(
    r"(?:^|\.)(?:\w*lm_head(?:\.decoder)?|predictions(?:\.decoder)?|vocab_projector)\.bias$|^decoder\.bias$"
)
"""Of an encoder's LM head, stored even when its matrix is tied."""
_HEADLESS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
"""Tasks of peft whose models have no LM head."""


def _whole_module(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def _compiles(pattern: str) -> str:
    try:
        re.compile(_whole_module(pattern))
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression ({error})") from None
    return pattern


_Pattern = Annotated[str, AfterValidator(_compiles)]
_Rank = Annotated[int, Field(gt=0)]


class Settings(BaseModel):
    """What ``adapter_config.json`` says about factors and whole tensors, with peft's own names."""

    model_config = ConfigDict(frozen=True, strict=True)

    r: _Rank | None = None
    lora_alpha: FiniteFloat
    use_rslora: bool = False
    rank_pattern: dict[_Pattern, _Rank] | None = None
    alpha_pattern: dict[_Pattern, FiniteFloat] | None = None
    modules_to_save: list[Annotated[str, Field(min_length=1)]] | None = None
    fan_in_fan_out: bool = False

    def rank_of(self, module: str) -> int | None:
        """The rank that a module's factors should have; None where the configuration says nothing."""
        patterns = self.rank_pattern or {}
        return patterns.get(_pattern_key(patterns, module), self.r)

    def scale(self, module: str, rank: int) -> float:
        """What B A is multiplied with."""
        patterns = self.alpha_pattern or {}
        alpha = patterns.get(_pattern_key(patterns, module), self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def saves(self, name: str) -> bool:
        """Whether a tensor is inside one of ``modules_to_save``: by peft's rule, a module whose name ends with its letters."""
        return any(is_in(name, entry) for entry in self.modules_to_save or ())


def _pattern_key(patterns: Iterable[str], module: str) -> str:
    """The pattern that a module goes by, or its own name: ``peft.utils.other.get_pattern_key``."""
    return next((pattern for pattern in patterns if re.match(_whole_module(pattern), module)), module)


def is_in(name: str, entry: str) -> bool:
    """Whether a tensor is inside a module whose name ends with these letters."""
    parts = name.split(".")
    return any(".".join(parts[:length]).endswith(entry) for length in range(1, len(parts)))


def read_settings(config: Mapping[str, Any]) -> tuple[Settings | None, list[str]]:
    """What the configuration says, or what is wrong with it."""
    try:
        return Settings.model_validate(dict(config)), []
    except ValidationError as error:
        return None, [
            f"{ADAPTER_CONFIG}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}, got {str(problem['input'])[:40]}. "
            "Restore the file that was saved beside these tensors"
            for problem in error.errors()
        ]


def variant_problems(config: Mapping[str, Any]) -> list[str]:
    """Settings under which an adapter is more than ``scale * (B A)`` on the base."""
    found = [
        f"{setting}: {reason}. {'No weights hold that: leave the adapter out' if setting in _UNMERGEABLE else MERGE}"
        for setting, reason in _REFUSED_SETTINGS.items()
        if config.get(setting)
    ]
    unknown = sorted(
        setting
        for setting, value in config.items()
        if value and (setting.startswith("use_") or setting.endswith("_config"))
        if setting not in _KNOWN_SETTINGS | _REFUSED_SETTINGS.keys()
    )
    if unknown:
        found.append(f"variants of LoRA that are not understood: {', '.join(unknown)}. {MERGE}")
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(_CHANGING_INITS):
        found.append(
            f"init_lora_weights {start} changed the base before training, so that the factors do not belong to the base's own "
            "weights. Save the adapter with save_pretrained(..., path_initial_model_for_weight_conversion=...) where peft can "
            "convert it (PiSSA, OLoRA, CorDA, LoRA-GA), or merge it into its base with peft and give the merged model"
        )
    elif start not in _PLAIN_INITS:
        found.append(f"init_lora_weights {start} is not known; it may change the base before training. {MERGE}")
    return found


def is_tied(name: str, config: Mapping[str, Any], names: Iterable[str]) -> bool:
    """Whether something that a base of these names does not store is tied to its embedding, as far as names tell.

    What its own configuration says of it decides nothing: Gemma's and GPT-2's leave it out. A bare encoder ties nothing.
    """
    if _SHARED.search(name):
        return True
    if not (EMBEDDING.search(name) or _OF_ENCODER.search(name)) or config.get("task_type") in _HEADLESS:
        return False
    stored = list(names)
    if any(map(_OUTPUT.search, stored)):
        return False
    return not _OF_ENCODER.search(name) or any(map(_OUTPUT_BIAS.search, stored))


def _is_hub_id(place: str) -> bool:
    return bool(HUB_ID.fullmatch(place)) and place.count("/") == 1


def adapter_notes(
    config: Mapping[str, Any], base_place: str, tensors: Mapping[str, TensorInfo] = MappingProxyType({})
) -> list[str]:
    """What a user should look at in an adapter that was accepted: above all whether it was trained on this base. Pure.

    ``base_place`` as a resolved recipe has it: a path, ``org/name@commit`` or a URL. Two Hub ids are compared whole, in any
    case of letters; where one of both is a path or a URL, their last parts are. ``tensors``: what ``adapter_tensors`` returned.
    """
    notes = []
    recorded = config.get("base_model_name_or_path")
    place, commit = split_revision(base_place) if not scheme_of(base_place) else (base_place, None)
    if isinstance(recorded, str) and recorded:
        theirs, ours = (name.rstrip("/").lower() for name in (recorded, place))
        if not (_is_hub_id(recorded) and _is_hub_id(place)):
            theirs, ours = theirs.rpartition("/")[2], ours.rpartition("/")[2]
        if theirs != ours:
            notes.append(
                f"the adapter was trained on {recorded}, the recipe's base is {base_place}: are their weights the same?"
            )
    revision = config.get("revision")
    if commit and isinstance(revision, str) and re.fullmatch(r"[0-9a-f]{40}", revision) and revision != commit:
        notes.append(f"the adapter was trained on revision {revision} of its base, the recipe's base is {base_place}")
    for name, info in tensors.items():
        if isinstance(info.data, LowRank) and info.data.transposed and is_tied(name, config, tensors):
            notes.append(
                f"the adapter's factors of {name} change the LM head too where the base ties it to the embedding: this is what "
                "peft merges it to, but before it is merged peft leaves the head as the base has it"
            )
    return notes
