"""Encoders that the BERT router is trained from: on the Hub, in an object store or in a folder, judged before the training.

An encoder is read as experts are: a revision pinned to its commit, tokens, cache and offline mode those of the Hub's client.
transformers then sees local files only, and only those that are read: a configuration, a tokenizer's files and safetensors. It
can run no code of a repository, unpickle nothing, and ask nobody.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from storage.digests import short_id
from storage.errors import CheckpointError
from storage.files import Folder, read_whole
from storage.sources import open_folder

MODEL_CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = re.compile(r"pytorch_model.*\.bin|.*\.(pt|pth|ckpt|pkl|pickle)")
TOKENIZERS = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "spm.model",
)
"""A tokenizer's vocabulary lies in one of these."""
SETTINGS = (
    *TOKENIZERS, "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
INDEX_BYTES = 50_000_000
"""A larger index of shards is none."""


@dataclass(frozen=True)
class Encoder:
    """An encoder whose configuration and tokenizer were read and fit. Its weights may not have been fetched yet."""

    label: str
    folder: Folder
    names: tuple[str, ...]
    """The files that are read, weights among them, in order."""

    @property
    def place(self) -> str:
        """As a resolved recipe names it."""
        return self.folder.place

    def identities(self) -> dict[str, str]:
        """What identifies the content of every file that is read."""
        return self.folder.identities(self.names)

    @property
    def source(self) -> str:
        """What identifies it wherever it lies: ``org/name@commit`` on the Hub, else a digest of its files."""
        return self.folder.place if self.folder.id else f"files:{short_id(self.identities())}"

    def link_into(self, folder: Path) -> Path:
        """A folder with a link to every file that is read, and to no other; weights are fetched where they are not local."""
        return _linked(self.folder, self.names, folder)


def check_encoder(label: str, place: str) -> Encoder:
    """The encoder at a place as a loaded recipe names it: an absolute path, a Hub id[@revision] or a URL of an object store.

    Fetches its configuration and tokenizer, not its weights. ``label`` is what errors begin with. CheckpointError when there is
    none, its weights are no safetensors, its tokenizer is missing or unreadable, or it is no encoder of sequences; SourceError
    when it cannot be reached.
    """
    folder = open_folder(label, place)
    names, subject = folder.names, f"{label}: {folder.place}"
    if MODEL_CONFIG not in names:
        raise CheckpointError(f"{subject} has no {MODEL_CONFIG}. Name the folder or repository of a transformers model.")
    weights = _weights(subject, folder)
    if not names.intersection(TOKENIZERS):
        raise CheckpointError(
            f"{subject} has no tokenizer: expected one of {', '.join(TOKENIZERS)}. Save the encoder's tokenizer beside it "
            "(tokenizer.save_pretrained), or name a repository that has one."
        )
    settings = tuple(name for name in (MODEL_CONFIG, *SETTINGS) if name in names)
    with TemporaryDirectory() as local:
        _check_settings(subject, _linked(folder, settings, Path(local)))
    return Encoder(label, folder, tuple(sorted((*settings, *weights))))


def _linked(source: Folder, names: tuple[str, ...], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in source.local(names).items():
        link = folder / name
        link.unlink(missing_ok=True)
        link.symlink_to(path.resolve())
    return folder


def _weights(subject: str, folder: Folder) -> tuple[str, ...]:
    """Names of the safetensors files, with that of their index."""
    names = folder.names
    if WEIGHTS in names:
        return (WEIGHTS,)
    if INDEX in names:
        try:
            placed = json.loads(read_whole(folder.file(INDEX), INDEX_BYTES))["weight_map"]
            shards = sorted(set(placed.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"{subject}/{INDEX} cannot be read ({error!r}). Download or save the encoder again."
            ) from None
        missing = [str(name) for name in shards if name not in names or not str(name).endswith(".safetensors")]
        if missing:
            raise CheckpointError(
                f"{subject}: {INDEX} names {', '.join(missing[:3])}, which it does not have as a safetensors file beside it. "
                "Download or save the encoder again."
            )
        return (INDEX, *shards)
    pickled = sorted(name for name in names if PICKLED.fullmatch(name))
    if pickled:
        raise CheckpointError(
            f"{subject} has its weights as a pickle only ({pickled[0]}), which can run code when it is read: only safetensors "
            "are. Save it again with save_pretrained, or name a revision that has model.safetensors."
        )
    raise CheckpointError(f"{subject} has no weights: expected {WEIGHTS}. Name the repository of a whole encoder.")


def _check_settings(subject: str, folder: Path) -> None:
    """CheckpointError unless these are the configuration of an encoder of sequences and a tokenizer that fits it."""
    from transformers import AutoConfig, AutoTokenizer
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    )

    from serving.encoder import quiet

    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    with quiet():
        try:
            config = AutoConfig.from_pretrained(folder, **local)
        except Exception as error:  # whatever a class of configuration makes of a foreign file
            raise _unreadable(
                f"{subject}/{MODEL_CONFIG} is no configuration transformers knows without code of its own", error
            ) from None
        kind = config.model_type
        known = kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES and kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        if not known or getattr(config, "is_encoder_decoder", False) or getattr(config, "is_decoder", False):
            raise CheckpointError(
                f"{subject} is a model of type {kind!r}: expected an encoder of sequences, as bert, xlm-roberta, deberta-v2 or "
                "modernbert are. Name one of these."
            )
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, **local)
            tokens = tokenizer("a")["input_ids"]
        except Exception as error:  # tokenizers raises it bare
            raise _unreadable(f"{subject}: its tokenizer cannot be read", error) from None
    size = getattr(config, "vocab_size", None)
    largest = max([*tokens, *tokenizer.get_vocab().values()], default=-1)
    if size is not None and largest >= size:
        raise CheckpointError(
            f"{subject}: its tokenizer has ids up to {largest}, its {MODEL_CONFIG} {size} rows of embeddings. "
            "They are not of one model: save both again."
        )
    if tokenizer.pad_token_id is None:
        raise CheckpointError(
            f"{subject}: its tokenizer has no padding token, so queries cannot be batched. Set one and save it."
        )


def _unreadable(what: str, error: Exception) -> CheckpointError:
    reason = " ".join(str(error).split())[:200]
    return CheckpointError(f"{what} ({type(error).__name__}: {reason}). Save the encoder again, or name another.")


def longest(model: Any, tokenizer: Any) -> int:
    """Tokens of the longest text that an encoder reads, by its table of positions and its tokenizer's own limit.

    Of RoBERTa's kin the rows up to the padding's are no positions. Encoders without a table have the limit of their
    configuration, where it has one.
    """
    limits = [tokenizer.model_max_length]
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and hasattr(module, "num_embeddings"):
            taken = 0 if module.padding_idx is None else module.padding_idx + 1
            limits.append(module.num_embeddings - taken)
    if (
        len(limits) == 1
        and isinstance(positions := getattr(model.config, "max_position_embeddings", None), int)
        and positions > 0
    ):
        limits.append(positions)
    return int(min(limits))
