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
    """Share of the characters predicted right (greedy, given the true text before them); one made of
    several tokens is right when all of them are.
    """


def measure(folder: Path, text: str) -> Quality:
    """Load a causal language model with transformers and measure it on a text, in windows of ``CONTEXT`` tokens.

    The first token of each window is given, not counted.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    offsets = encoded["offset_mapping"]
    ids = torch.tensor(encoded["input_ids"])
    bits = 0.0
    wrong, seen = [False] * len(text), [False] * len(text)
    with torch.inference_mode():
        for start in range(0, len(ids), CONTEXT):
            window = ids[start : start + CONTEXT]
            if len(window) < 2:
                break
            logits = model(input_ids=window[None]).logits[0, :-1].double()
            bits += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum")) / math.log(2)
            right = (logits.argmax(dim=-1) == window[1:]).tolist()
            for (first, last), hit in zip(offsets[start + 1 : start + len(window)], right, strict=True):
                for character in range(first, last):
                    seen[character] = True
                    wrong[character] |= not hit
    read = [character for character, known in enumerate(seen) if known]
    size = sum(len(text[character].encode()) for character in read)
    return Quality(bits / size, 1 - sum(wrong[character] for character in read) / len(read))
