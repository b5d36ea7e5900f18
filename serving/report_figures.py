"""The figures of a report that are sums over an artifact's tensors: who shares rows with whom, and where they lie. Pure.

All come from the manifest's spans. A span lists the experts that use its rows. Rows are shared within one channel only, and
a channel's groups are the sets of users of its rows: a span of n rows is n channels in which just these experts are a group.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.layout import DTYPES, as_rows
from storage.manifest import Manifest, TensorRecord

MERGE = "merge"
POLICIES = (MERGE, "private", "base")


def natural_order(name: str) -> list[int | str]:
    """Sort key that puts layer 2 before layer 10."""
    return [int(part) if place % 2 else part for place, part in enumerate(re.split(r"(\d+)", name))]


def layer_of(tensor: str, layers: Collection[str]) -> str:
    """The layer of a tensor: the longest of ``layers`` that its name begins with.

    Of a tensor in none of them, its name up to the first component that is a number; its own name where there is none.
    """
    parts = tensor.split(".")
    stems = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    known = next((stem for stem in stems if stem in layers), None)
    if known is not None:
        return known
    return next((".".join(parts[: place + 1]) for place, part in enumerate(parts) if part.isdecimal()), tensor)


def _width(record: TensorRecord) -> int:
    return as_rows(record.shape, record.channel_axis)[1]


def _share(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None


class Sharing:
    """Sums over the spans of some tensors, for experts in a given order."""

    def __init__(self, experts: Sequence[str]) -> None:
        self.experts = tuple(experts)
        count = len(experts)
        self.tensors = 0
        self.together: NDArray[np.int64] = np.zeros((count, count), np.int64)
        """Channels in which two experts use the same row; in the diagonal an expert's channels."""
        self.both: NDArray[np.int64] = np.zeros((count, count), np.int64)
        """Channels that both have: an expert's are the first ones, so as many as the one with fewer has."""
        self.channels = 0
        self.pool_rows = 0
        self.sizes: NDArray[np.int64] = np.zeros((count, count + 1), np.int64)
        """(experts, sizes) an expert's rows by the number of their users, itself counted."""

    def add(self, record: TensorRecord) -> None:
        """Count a tensor in."""
        place = {name: number for number, name in enumerate(self.experts)}
        uses = np.zeros((len(record.spans), len(self.experts)))
        for number, span in enumerate(record.spans):
            uses[number, [place[name] for name in span.experts if name in place]] = 1
        rows = np.array([span.rows for span in record.spans], np.float64)
        # whole numbers below 2^53 are exact in float64, whose products are fast
        together = (uses.T @ (uses * rows[:, None])).astype(np.int64)
        own, users = np.diag(together), uses.sum(axis=1).astype(np.int64)
        self.tensors += 1
        self.together += together
        self.both += np.minimum(own[:, None], own)
        self.channels += int(own.max(initial=0))
        self.pool_rows += int(rows.sum())
        for count in np.unique(users):
            self.sizes[:, count] += (rows * (users == count) @ uses).astype(np.int64)

    def share(self, a: int, b: int) -> float | None:
        """Of the channels that both experts have, the share in which they use the same row; None when there are none."""
        return _share(self.together[a, b], self.both[a, b])

    @property
    def expert_rows(self) -> int:
        """Rows of all experts together, which the pool's stand for."""
        return int(np.trace(self.together))

    def group_sizes(self) -> list[float | None]:
        """Of all experts' rows, the shares that lie in groups of 1, 2, … N."""
        return _shares(self.sizes.sum(axis=0))

    def group_sizes_of(self, expert: int) -> list[float | None]:
        """The same of one expert's rows."""
        return _shares(self.sizes[expert])


def _shares(sizes: NDArray[np.int64]) -> list[float | None]:
    whole = sizes.sum()
    return [_share(found, whole) for found in sizes[1:]]


def merged_sharing(manifest: Manifest, experts: Sequence[str]) -> tuple[Sharing, dict[str, Sharing]]:
    """The sums over all merged tensors, and over those of each layer, in the layers' order."""
    known = {layer for record in manifest.experts.values() for layer in record.health.layers}
    whole = Sharing(experts)
    layers = {layer: Sharing(experts) for layer in sorted(known, key=natural_order)}
    for name, record in sorted(manifest.tensors.items(), key=lambda item: natural_order(item[0])):
        if record.policy == MERGE:
            whole.add(record)
            layers.setdefault(layer_of(name, known), Sharing(experts)).add(record)
    return whole, layers


def alike(whole: Sharing, layers: Mapping[str, Sharing]) -> dict[str, Any]:
    """How often two experts share a row: the matrix, and per layer the pairs."""
    count = len(whole.experts)
    pairs = [(a, b) for a in range(count) for b in range(a + 1, count)]
    return {
        "experts": list(whole.experts),
        "channels": whole.channels,
        "matrix": [[whole.share(a, b) for b in range(count)] for a in range(count)],
        "pairs": [[whole.experts[a], whole.experts[b]] for a, b in pairs],
        "layers": [
            {"layer": layer, "shares": [sharing.share(a, b) for a, b in pairs]} for layer, sharing in layers.items()
        ],
    }  # fmt: skip


def layer_figures(manifest: Manifest, layers: Mapping[str, Sharing]) -> list[dict[str, Any]]:
    """Per layer of merged tensors: its size, how its channels are grouped, how far each expert is from its base."""
    whole = manifest.parent is None
    return [
        {
            "layer": layer,
            "tensors": sharing.tensors,
            "channels": sharing.channels,
            "pool_rows": sharing.pool_rows,
            "expert_rows": sharing.expert_rows,
            "kept": _share(sharing.pool_rows, sharing.expert_rows),
            "groups_per_channel": _share(sharing.pool_rows, sharing.channels) if whole else None,
            "group_sizes": sharing.group_sizes() if whole else [],
            "delta_ratio": {name: manifest.experts[name].health.layers.get(layer) for name in sharing.experts},
        }
        for layer, sharing in layers.items()
    ]


def expert_entries(manifest: Manifest, experts: Sequence[str]) -> dict[str, dict[str, int]]:
    """Per expert the entries of the pool's rows that it uses, and of those that no other does."""
    used, alone = dict.fromkeys(experts, 0), dict.fromkeys(experts, 0)
    for record in manifest.tensors.values():
        width = _width(record)
        for span in record.spans:
            known = [name for name in span.experts if name in used]
            for name in known:
                used[name] += span.rows * width
            if len(known) == 1:
                alone[known[0]] += span.rows * width
    return {name: {"used": used[name], "alone": alone[name]} for name in experts}


def _entry_bytes(record: TensorRecord) -> int:
    return DTYPES[record.dtype].size


def policy_figures(tensors: Mapping[str, TensorRecord]) -> list[dict[str, Any]]:
    """Per policy and number of groups asked for: tensors, and what they take in the pool."""
    found: dict[tuple[int, str, str], dict[str, Any]] = {}
    for record in tensors.values():
        rank = POLICIES.index(record.policy) if record.policy in POLICIES else len(POLICIES)
        groups = record.groups or None
        row = found.setdefault(
            (rank, record.policy, str(groups)),
            {"policy": record.policy, "groups": groups, "tensors": 0, "rows": 0, "parameters": 0, "bytes": 0},
        )
        entries = record.rows * _width(record)
        for key, count in (("tensors", 1), ("rows", record.rows), ("parameters", entries)):
            row[key] += count
        row["bytes"] += entries * _entry_bytes(record)
    return [found[key] for key in sorted(found, key=lambda key: (key[:2], natural_order(key[2])))]


def name_figures(tensors: Mapping[str, TensorRecord]) -> list[dict[str, Any]]:
    """Tensors that differ in the numbers of their names only, together."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name in sorted(tensors, key=natural_order):
        record = tensors[name]
        pattern = ".".join("*" if part.isdecimal() else part for part in name.split("."))
        row = found.setdefault(
            (pattern, record.policy, record.groups, record.shape, record.dtype),
            {
                "name": pattern, "tensors": 0, "policy": record.policy, "groups": record.groups or None,
                "shape": list(record.shape), "dtype": record.dtype, "rows": 0, "parameters": 0,
            },
        )  # fmt: skip
        for key, count in (("tensors", 1), ("rows", record.rows), ("parameters", record.rows * _width(record))):
            row[key] += count
    return list(found.values())


def coverage(manifest: Manifest) -> dict[str, Any]:
    """Whether every tensor, row and entry is accounted for, and what is not."""
    policies = [record.policy for record in manifest.tensors.values()]
    problems = [problem for name in sorted(manifest.tensors, key=natural_order) for problem in _problems(manifest, name)]
    entries = sum(record.rows * _width(record) for record in manifest.tensors.values())
    if entries != manifest.parameters.pool:
        problems.append(f"the tensors' rows have {entries:,} entries, and the pool {manifest.parameters.pool:,}")
    return {
        "tensors": len(policies),
        "by_policy": {policy: policies.count(policy) for policy in dict.fromkeys([*POLICIES, *sorted(policies)])},
        "rows": sum(record.rows for record in manifest.tensors.values()),
        "parameters": entries,
        "problems": problems,
    }


def _problems(manifest: Manifest, name: str) -> Iterable[str]:
    record = manifest.tensors[name]
    if record.policy not in POLICIES:
        yield f"tensor {name}: unknown policy {record.policy}"
    stop = 0
    for span in sorted(record.spans, key=lambda span: span.start):
        if span.start != stop:
            yield f"tensor {name}: {'a gap' if span.start > stop else 'an overlap'} of spans at row {min(stop, span.start):,}"
        if strangers := sorted(set(span.experts) - manifest.experts.keys()):
            yield f"tensor {name}: rows from {span.start:,} on are used by {', '.join(strangers)}, unknown to the artifact"
        if not span.experts:
            yield f"tensor {name}: no expert uses its rows from {span.start:,} on"
        stop = max(stop, span.start + span.rows)
    if stop != record.rows:
        yield f"tensor {name}: its spans end at row {stop:,} of {record.rows:,}"
