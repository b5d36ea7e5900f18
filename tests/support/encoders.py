"""Encoders of a few thousand parameters, and labelled queries as preparation leaves them, for tests of the BERT router."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import WordPieceTrainer
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from tests.support.prepared import Written, written

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = {
    "code": "function return import class loop print variable",
    "math": "plus minus times equals fraction root sum",
    "prose": "river mountain valley evening garden window voice",
}


def domain_texts(count: int) -> dict[str, list[str]]:
    """Different short texts per domain, told apart by any of their words."""
    found = {}
    for name, words in WORDS.items():
        combinations = itertools.product(words.split(), repeat=5)
        found[name] = [" ".join(words) for words in itertools.islice(combinations, 11, 11 + 31 * count, 31)]
    return found


def write_encoder(folder: Path, texts: Iterable[str], *, positions: int = 64, hidden: int = 32, layers: int = 2) -> Path:
    """A BERT with random weights and a WordPiece tokenizer trained on the texts, as a folder that transformers loads."""
    tokenizer = Tokenizer(WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer()
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.train_from_iterator(texts, WordPieceTrainer(vocab_size=400, special_tokens=list(SPECIAL), show_progress=False))
    ends = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=positions, **names)
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=2 * hidden, max_position_embeddings=positions, pad_token_id=0,
        initializer_range=0.2,  # with 0.02, right for widths of 768, texts look alike at 32 and some trainings stay at chance
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


def write_queries(folder: Path, queries: Mapping[str, Sequence[str]], *, validation: int = 20) -> Written:
    """Prepared queries of these texts per expert, mixed; of every expert the first few are for validation."""
    experts = tuple(sorted(queries))
    together = zip(*(queries[name] for name in experts), strict=True)
    rows = [(text, label) for texts in together for label, text in enumerate(texts)]
    return written(folder, experts, rows[validation * len(experts) :], rows[: validation * len(experts)])


@dataclass(frozen=True)
class Settings:
    """A recipe's router section, as far as the BERT router goes."""

    encoder: str
    epochs: int = 1
    batch: int = 16
    learning_rate: float = 3e-3
    warmup: float = 0.1
    weight_decay: float = 0.01
    max_length: int = 512
    accumulate: int = 1
    early_stop: int | None = None
