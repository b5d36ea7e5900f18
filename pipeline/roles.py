"""What a tensor is, by its name and shape: the table behind the default policy. Pure.

Weight matrices of the transformer's blocks are merged. Embeddings, the LM head, norms and biases are private: merging
them ruins every method, and beside the matrices they are small.
"""

from __future__ import annotations

import re
from typing import Any

BLOCK = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.")
VOCABULARY = re.compile(r"(?:^|\.)(?:embed_tokens|lm_head|wte|word_embeddings|embed_out)\.weight$")
EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|wte|word_embeddings)\.weight$")
HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out)\.weight$")

TRANSPOSED_MODELS = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
"""Model types whose linear layers store (in, out): their output channels are columns."""


def default_policy(name: str, shape: tuple[int, ...]) -> str:
    """'merge' for matrices inside transformer blocks, 'private' for everything else."""
    return "merge" if len(shape) == 2 and BLOCK.search(name) and not VOCABULARY.search(name) else "private"


def is_vocabulary(name: str) -> bool:
    """Whether the rows are tokens, so that an expert may have more of them than the base."""
    return bool(VOCABULARY.search(name))


def is_head(name: str) -> bool:
    """Whether this is the LM head, the tensor that a tie makes a copy."""
    return bool(HEAD.search(name))


def layer_of(name: str) -> str:
    """The block a tensor belongs to, for example ``model.layers.3``; its own name outside of blocks."""
    match = BLOCK.search(name)
    return name[: match.end() - 1] if match else name


def natural_order(name: str) -> list[Any]:
    """Sort key that puts layer 2 before layer 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def tie_partner(name: str, tensors: Any) -> str | None:
    """The stored tensor that a tied LM head or embedding, absent from the checkpoint, is read as."""
    other = EMBEDDING if HEAD.search(name) else HEAD if EMBEDDING.search(name) else None
    found = [candidate for candidate in tensors if other and other.search(candidate)]
    return found[0] if len(found) == 1 else None
