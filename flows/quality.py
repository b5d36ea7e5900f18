"""How good a checkpoint is on a text, in figures that compare across vocabularies."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

CONTEXT = 128


@dataclass(frozen=True)
class Quality:
    """Loss and accuracy of a checkpoint on a text."""

    loss: float
    """Bits per byte of UTF-8: comparable between tokenizers, where loss per token is not."""
    accuracy: float
    """Share of the text's bytes that lie in tokens predicted right (greedy, given the true text before them)."""


def measure(folder: Path, text: str) -> Quality:
    """Load a causal language model with transformers and measure it on a text, in windows of ``CONTEXT`` tokens.

    The first token of each window is given, not counted.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    sizes = torch.tensor(_token_bytes(text, encoded["offset_mapping"]))
    ids = torch.tensor(encoded["input_ids"])
    bits = right = counted = 0.0
    with torch.inference_mode():
        for start in range(0, len(ids), CONTEXT):
            window = ids[start : start + CONTEXT]
            if len(window) < 2:
                break
            logits = model(input_ids=window[None]).logits[0, :-1].double()
            target, weight = window[1:], sizes[start + 1 : start + len(window)]
            bits += float(torch.nn.functional.cross_entropy(logits, target, reduction="sum")) / math.log(2)
            right += float(weight[logits.argmax(dim=-1) == target].sum())
            counted += float(weight.sum())
    return Quality(bits / counted, right / counted)


def _token_bytes(text: str, offsets: list[tuple[int, int]]) -> list[float]:
    """Bytes each token stands for. Tokens that share one character (byte-level pieces of it) share its bytes."""
    sharing: dict[tuple[int, int], int] = {}
    for start, stop in offsets:
        sharing[start, stop] = sharing.get((start, stop), 0) + 1
    return [len(text[a:b].encode()) / sharing[a, b] for a, b in offsets]
