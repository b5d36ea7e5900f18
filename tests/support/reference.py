"""The method written down slowly, in float64 numpy with loops over channels, from the paper's formulas alone.

Nothing of the project is imported: clustering goes through centroids, not Gram matrices; the mask generator is written
with Python integers; data types are decoded by hand.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def as_float64(tensor: torch.Tensor) -> Floats:
    if tensor.dtype == torch.bfloat16:
        bits = tensor.view(torch.int16).numpy().view(np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32).astype(np.float64)
    return tensor.numpy().astype(np.float64)


def set_partitions(items: Sequence[int], groups: int) -> list[tuple[tuple[int, ...], ...]]:
    """All partitions into exactly ``groups`` blocks, each block sorted, blocks by first member."""
    found = set()
    for labels in itertools.product(range(groups), repeat=len(items)):
        if len(set(labels)) == groups:
            blocks = [tuple(i for i, label in zip(items, labels, strict=True) if label == g) for g in range(groups)]
            found.add(tuple(sorted(blocks)))
    return sorted(found)


def growth_string(blocks: Sequence[Sequence[int]], count: int) -> tuple[int, ...]:
    labels = [0] * count
    for label, block in enumerate(sorted(blocks, key=min)):
        for item in block:
            labels[item] = label
    return tuple(labels)


def spread(rows: Floats, blocks: Sequence[Sequence[int]]) -> float:
    """k-means' objective: squared distances of rows to the centroids of their blocks."""
    return sum(float(((rows[list(b)] - rows[list(b)].mean(axis=0)) ** 2).sum()) for b in blocks)


def nearness(rows: Floats, blocks: Sequence[Sequence[int]]) -> float:
    """k-medoids' objective: L1 distances of rows to the best member of their blocks."""
    return sum(min(float(np.abs(rows[list(b)] - rows[m]).sum()) for m in b) for b in blocks)


def cost(rows: Floats, blocks: Sequence[Sequence[int]], kind: str, metric: str) -> tuple[float, float]:
    """What a clustering minimises, and the score whose 1e-5th is a tie."""
    if metric == "manhattan" and kind == "kmeans":
        value = nearness(rows, blocks)
        return value, value
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True) if metric == "cosine" else rows
    if kind == "spherical":
        length = sum(float(np.linalg.norm(rows[list(b)].sum(axis=0))) for b in blocks)
        return -length, length
    value = spread(rows, blocks)
    return value, float((rows**2).sum()) - value


def by_mass(deltas: Floats) -> tuple[tuple[int, ...], float]:
    """Two groups by the sign of the sum, 0 counting as +; zero deltas are one of the two where there are any."""
    changed = deltas.any(axis=1)
    sums = deltas.sum(axis=1)
    sides = changed if not changed.all() else sums < 0
    blocks = [block for block in (np.flatnonzero(sides).tolist(), np.flatnonzero(~sides).tolist()) if block]
    margin = np.inf if not changed.all() else float((np.abs(sums) / np.abs(deltas).sum(axis=1)).min())
    return growth_string(blocks, len(deltas)), margin


def cluster_channel(
    deltas: Floats, groups: int, kind: str = "kmeans", metric: str = "cosine", draw: int = 0, sign: str = "vector"
) -> tuple[tuple[int, ...], float]:
    """Growth string of one channel's best grouping, and its relative margin over the second best (inf without one).

    ``deltas``: (experts, width); ``draw``: 32 random bits for kind random; ``sign``: how kind sign reads a delta.
    """
    count = len(deltas)
    if groups >= count:
        return tuple(range(count)), np.inf
    if groups == 1:
        return (0,) * count, np.inf
    changed = [n for n in range(count) if deltas[n].any()]
    zeros = [n for n in range(count) if n not in changed]
    if not changed:
        return (0,) * count, np.inf
    if kind == "sign" and sign == "mass":
        return by_mass(deltas)
    rows = np.sign(deltas[changed]) if kind == "sign" else deltas[changed]
    remaining = min(groups - bool(zeros), len(changed))
    scored = []
    for blocks in set_partitions(range(len(changed)), remaining):
        named = [[changed[i] for i in block] for block in blocks] + ([zeros] if zeros else [])
        inner = growth_string(blocks, len(changed))
        scored.append((*cost(rows, blocks, kind, metric), inner, growth_string(named, count)))
    if kind == "random":
        in_order = sorted(scored, key=lambda entry: entry[2])
        return in_order[draw * len(in_order) >> 32][3], np.inf
    scored.sort(key=lambda entry: entry[0])
    best, score = scored[0][0], scored[0][1]
    tied = [entry for entry in scored if entry[0] - best <= 1e-5 * score]
    # without a score, which clusters of one row each have under medoids, any difference is clear
    others = [(entry[0] - best) / (score or 1e-300) for entry in scored if entry not in tied]
    return min(tied, key=lambda entry: entry[2])[3], min(others, default=np.inf)


def philox_words(counter: int, key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 for one counter."""
    c = [counter & 0xFFFFFFFF, counter >> 32, 0, 0]
    k = list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c[0], c[1], c[2], c[3]


def key_of(seed: int, expert: str, tensor: str) -> tuple[int, int]:
    raw = hashlib.sha256(f"{seed}\x00{expert}\x00{tensor}".encode()).digest()
    return int.from_bytes(raw[:4], "little"), int.from_bytes(raw[4:8], "little")


def dare_mask(seed: int, expert: str, tensor: str, shape: tuple[int, int], density: float) -> NDArray[np.bool_]:
    key = key_of(seed, expert, tensor)
    count = shape[0] * shape[1]
    words = [word for block in range(-(-count // 4)) for word in philox_words(block, key)][:count]
    return (np.array(words) < int(density * 2**32)).reshape(shape)


@dataclass(frozen=True)
class Options:
    """The merge section of a recipe; the weights of its experts too."""

    groups: int
    method: str = "task_arithmetic"
    scaling: float | str = "mean"
    combine: str | None = None
    density: float = 0.7
    trim_scope: str = "tensor"
    rescale: str = "density"
    t: float = 0.5
    keep: float = 0.3
    residual: str = "merged"
    singleton: str = "keep"
    seed: int = 0
    weights: Mapping[str, float] | None = None
    granularity: str = "channel"
    clustering: str = "kmeans"
    metric: str = "cosine"
    sign: str = "vector"


def group_channels(
    name: str, deltas: Floats, options: Options, model: Floats | None
) -> tuple[list[tuple[int, ...]], list[float]]:
    """Growth string and margin of every channel. ``deltas``: (experts, rows, width); ``model``: (experts, all entries)."""
    rows = deltas.shape[1]
    tensor = "" if options.granularity == "model" else name
    draws = [philox_words(channel, key_of(options.seed, "", tensor))[0] for channel in range(rows)]

    def grouped(rows: Floats, draw: int) -> tuple[tuple[int, ...], float]:
        return cluster_channel(rows, options.groups, options.clustering, options.metric, draw, options.sign)

    if options.granularity == "channel":
        found = [grouped(deltas[:, channel], draws[channel]) for channel in range(rows)]
    else:
        everything = deltas.reshape(len(deltas), -1) if options.granularity == "layer" else model
        assert everything is not None
        found = [grouped(everything, draws[0])] * rows
    return [labels for labels, _ in found], [margin for _, margin in found]


def bits_of(row: torch.Tensor) -> torch.Tensor:
    return row.contiguous().view(torch.int16 if row.element_size() == 2 else torch.int32)


def ulps(found: torch.Tensor, expected: Floats) -> NDArray[np.int64]:
    """Distance in units of the last place of the found tensor's type to the rounded expectation."""
    rounded = torch.from_numpy(expected).to(found.dtype)

    def ordered(tensor: torch.Tensor) -> NDArray[np.int64]:
        bits = bits_of(tensor).numpy().astype(np.int64)
        low = -(1 << (8 * tensor.element_size() - 1))
        return np.where(bits < 0, low - bits, bits)

    return np.asarray(np.abs(ordered(found) - ordered(rounded)))
