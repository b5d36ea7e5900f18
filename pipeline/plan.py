"""The plan: what every tensor of every checkpoint becomes, and in which blocks the work is done. Pure.

It needs headers and the recipe only, so that everything that cannot work is refused before a byte of weight is read.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from pipeline import memory
from pipeline.recipe import AUTO, ROUNDING, Recipe, rule_for
from pipeline.roles import TRANSPOSED_MODELS, default_policy, is_head, is_vocabulary, layer_of, natural_order, tie_partner
from storage.checkpoint import Checkpoint, TensorInfo
from storage.errors import PlanError
from storage.layout import DTYPES, chunk_rows

CONFIG_KEYS = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")


@dataclass(frozen=True)
class TensorPlan:
    """What one tensor becomes."""

    name: str
    policy: str
    """merge, private or base."""
    groups: int | Literal["auto"]
    """K; 0 unless the policy is merge."""
    base: TensorInfo | None
    """The base's rows; of a tied head or embedding, the partner's. None when only experts have the tensor."""
    experts: Mapping[str, TensorInfo]
    """The experts that have it, in order of name."""

    @property
    def reference(self) -> TensorInfo:
        return self.base or next(iter(self.experts.values()))

    @property
    def dtype(self) -> str:
        """The pool's data type: the base's."""
        return self.reference.dtype

    @property
    def width(self) -> int:
        return self.reference.width

    @property
    def base_rows(self) -> int:
        return self.base.rows if self.base else 0

    @property
    def rows(self) -> int:
        """Channels, over all experts."""
        return max(info.rows for info in self.experts.values())

    @property
    def is_clustered(self) -> bool:
        """Whether its experts are to be grouped: neither all together nor each alone."""
        return self.policy == "merge" and (self.groups == AUTO or 1 < self.groups < len(self.experts))

    @property
    def is_combined(self) -> bool:
        """Whether deltas meet: not where every expert has a group of its own."""
        return self.policy == "merge" and (self.groups == AUTO or self.groups < len(self.experts))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.reference.shape

    @property
    def chunk_rows(self) -> int:
        """Rows of a chunk, which depend on the width alone once there are enough rows."""
        return chunk_rows(self.rows, self.width)


class Tall(Protocol):
    """What can be cut into blocks: a tensor plan, or one expert's tensor."""

    @property
    def name(self) -> str: ...
    @property
    def rows(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def chunk_rows(self) -> int: ...


@dataclass(frozen=True)
class Piece:
    """Rows [start, stop) of a tensor."""

    tensor: str
    start: int
    stop: int


@dataclass(frozen=True)
class Block:
    """The unit of work of a task: pieces of one layer, each of whole chunks."""

    label: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class MergePlan:
    """Everything the stages need to know; small, and it pickles."""

    experts: tuple[str, ...]
    """Sorted names."""
    tensors: Mapping[str, TensorPlan]
    """In natural order of name."""
    memory: int
    """Bytes one task may use."""
    ties: Mapping[str, Mapping[str, str]]
    """Expert -> its tied tensors and the tensor each is a copy of."""
    notes: tuple[str, ...]
    """What a user should know: casts, larger vocabularies."""

    @property
    def merged(self) -> list[TensorPlan]:
        return [tensor for tensor in self.tensors.values() if tensor.policy == "merge"]

    @property
    def clustered(self) -> list[TensorPlan]:
        """Merged tensors whose experts are to be grouped: neither all together nor each alone."""
        return [tensor for tensor in self.merged if tensor.is_clustered]

    @property
    def combined(self) -> list[TensorPlan]:
        """Merged tensors where deltas meet: all but those with a group for each expert."""
        return [tensor for tensor in self.merged if tensor.is_combined]

    def blocks(self, tensors: Iterable[Tall]) -> list[Block]:
        """Blocks over these tensors, sized so that a worker has several and the memory budget holds."""
        return plan_blocks(tensors, memory.block_elements(self.memory, len(self.experts)))


def plan_blocks(tensors: Iterable[Tall], max_elements: int) -> list[Block]:
    """Cut tensors into pieces of whole chunks and gather small ones of one layer. Every row is in exactly one piece."""
    blocks: list[Block] = []
    for layer, members in itertools.groupby(tensors, key=lambda tensor: layer_of(tensor.name)):
        pieces: list[Piece] = []
        size = 0
        for tensor in members:
            step = max(max_elements // (tensor.chunk_rows * tensor.width), 1) * tensor.chunk_rows
            for start in range(0, tensor.rows, step):
                piece = Piece(tensor.name, start, min(start + step, tensor.rows))
                elements = (piece.stop - piece.start) * tensor.width
                if pieces and size + elements > max_elements:
                    blocks.append(_block(layer, pieces))
                    pieces, size = [], 0
                pieces.append(piece)
                size += elements
        blocks.append(_block(layer, pieces))
    return blocks


def _block(layer: str, pieces: Sequence[Piece]) -> Block:
    names = {piece.tensor for piece in pieces}
    label = names.pop() if len(names) == 1 else layer
    return Block(label, tuple(pieces))


def _config_problems(base: Checkpoint, expert: Checkpoint) -> list[str]:
    problems = []
    for key in CONFIG_KEYS:
        expected, got = base.config.get(key), expert.config.get(key)
        if expected is not None and got is not None and expected != got:  # what one of them leaves to a default, shapes show
            problems.append(f"{expert.label}: config.json: {key}: expected {expected!r} as in the base, got {got!r}")
    return problems


def _tensor_problems(tensor: TensorPlan, base: Checkpoint, experts: Mapping[str, Checkpoint]) -> list[str]:
    """What is wrong with one tensor across base and experts."""
    problems = []
    name = tensor.name
    for expert, checkpoint in experts.items():
        info = tensor.experts.get(expert)
        if info is None:
            if tensor.base and name in base.tensors and not tied_to(name, checkpoint):
                problems.append(f"{checkpoint.label}: tensor {name} is missing: expected shape {list(tensor.shape)}")
            elif tensor.policy == "merge":
                problems.append(f"{checkpoint.label}: tensor {name} is missing and cannot be merged; make it private by a rule")
            continue
        larger = is_vocabulary(name) and info.shape[1:] == tensor.shape[1:] and info.rows > tensor.base_rows
        if info.shape != tensor.shape and not (larger and tensor.policy != "base"):
            problems.append(
                f"{checkpoint.label}: tensor {name}: expected shape {list(tensor.shape)}, got {list(info.shape)}; "
                "is it an expert of this base?"
            )
    return problems


def _numbers(dtype: str) -> bool:
    return dtype in DTYPES and DTYPES[dtype].mergeable


def _storage_problems(tensor: TensorPlan, experts: Mapping[str, Checkpoint]) -> list[str]:
    """Data types and shapes that cannot be stored at all."""
    problems = []
    held = [(experts[name].label, info) for name, info in tensor.experts.items()]
    for label, info in [("base", tensor.base), *held]:
        if info is not None and info.dtype not in DTYPES:
            known = ", ".join(DTYPES)
            problems.append(f"{label}: tensor {tensor.name}: data type {info.dtype} cannot be read; expected one of {known}")
        elif info is not None and info.dtype != tensor.dtype and not (_numbers(info.dtype) and _numbers(tensor.dtype)):
            problems.append(f"{label}: tensor {tensor.name}: expected data type {tensor.dtype}, got {info.dtype}")
        elif info is not None and 0 in info.shape:
            problems.append(f"{label}: tensor {tensor.name}: shape {list(info.shape)} is empty")
    return problems


def _policy_problems(tensor: TensorPlan) -> list[str]:
    """What its policy asks for and the tensor cannot give."""
    name = tensor.name
    if tensor.policy in ("merge", "base") and tensor.base is None:
        return [f"tensor {name}: the base does not have it, so its policy cannot be {tensor.policy}; make it private"]
    if tensor.policy != "merge":
        return []
    problems = []
    if len(tensor.shape) > 2:
        problems.append(f"tensor {name}: {len(tensor.shape)} dimensions cannot be merged; make it private by a rule")
    kinds = {info.dtype for info in tensor.experts.values()} | {tensor.dtype}
    kept = sorted(kind for kind in kinds if kind in DTYPES and not DTYPES[kind].mergeable)
    if kept:
        problems.append(f"tensor {name}: data type {', '.join(kept)} cannot be merged; make it private by a rule")
    return problems


def _problems(tensor: TensorPlan, base: Checkpoint, experts: Mapping[str, Checkpoint]) -> list[str]:
    return _storage_problems(tensor, experts) + _tensor_problems(tensor, base, experts) + _policy_problems(tensor)


def _notes(tensor: TensorPlan) -> list[str]:
    notes = []
    for expert, info in tensor.experts.items():
        if info.dtype != tensor.dtype:
            whose = "the base's" if tensor.base else "the first expert's"
            notes.append(f"expert {expert}: {tensor.name} is cast once from {info.dtype} to {whose} {tensor.dtype}")
        if tensor.base and info.rows > tensor.base_rows:
            extra = info.rows - tensor.base_rows
            notes.append(
                f"expert {expert}: {tensor.name} has {extra} rows beyond the base's {tensor.base_rows}; they stay private"
            )
    return notes


def _tie_notes(name: str, experts: Mapping[str, Checkpoint]) -> list[str]:
    ties = {expert: tied_to(name, found) for expert, found in experts.items()}
    return [f"expert {expert}: {name} is tied to {partner} and is stored once" for expert, partner in ties.items() if partner]


def tied_to(name: str, checkpoint: Checkpoint) -> str | None:
    """The tensor this one is a tied copy of, by the checkpoint's own config; None when it is its own."""
    return tie_partner(name, checkpoint.tensors) if checkpoint.tied and is_head(name) else None


def plan_tensor(name: str, recipe: Recipe, base: Checkpoint, experts: Mapping[str, Checkpoint]) -> TensorPlan | None:
    """Policy, groups and sources of one tensor; None when only tied copies of another tensor go by its name."""
    holders = {n: found.tensors[name] for n, found in experts.items() if name in found.tensors and not tied_to(name, found)}
    own = base.tensors.get(name)
    if own is None and base.tied and (partner := tie_partner(name, base.tensors)):
        own = replace(base.tensors[partner], name=name)
    reference = own or next(iter(holders.values()), None)
    if reference is None:
        return None
    rule = rule_for(recipe.merge, name)
    policy = (rule.policy if rule else None) or default_policy(name, reference.shape)
    groups = (rule.groups if rule else None) or recipe.merge.groups
    return TensorPlan(name, policy, groups if policy == "merge" else 0, own, holders)


def _budget_problems(recipe: Recipe, tensors: Iterable[TensorPlan]) -> list[str]:
    """Whether a budget has something to be spent on, and covers what has to be stored whatever K is chosen."""
    budget, count = recipe.merge.budget, len(recipe.experts)
    merged = [tensor for tensor in tensors if tensor.policy == "merge"]
    if budget is None:
        return []
    if not any(tensor.groups == AUTO for tensor in merged):
        return ["merge.budget: no merged tensor has groups: auto, so nothing is spent; leave the budget or the rules out"]
    sizes = [(t.base_rows * t.width, 1 if t.groups == AUTO else min(t.groups, count)) for t in merged]
    least, everything = sum(size * groups for size, groups in sizes), sum(size for size, _ in sizes) * count
    if budget * (1 + ROUNDING) * everything >= least:
        return []
    needed = math.ceil(1e4 * least / everything) / 1e4
    return [f"merge.budget: one row per channel and the groups that rules set need {needed:.4f}, got {budget}; raise it"]


def make_plan(recipe: Recipe, base: Checkpoint, experts: Mapping[str, Checkpoint]) -> MergePlan:
    """The plan of a merge. PlanError lists everything that cannot work."""
    experts = dict(sorted(experts.items()))
    problems = [problem for checkpoint in experts.values() for problem in _config_problems(base, checkpoint)]
    if base.config.get("model_type") in TRANSPOSED_MODELS:
        problems.append(f"base: model type {base.config['model_type']} stores (in, out) weights, which are not supported yet")
    if not base.tensors:
        problems.append("base: it has no tensors")
    names = {name for checkpoint in (base, *experts.values()) for name in checkpoint.tensors}
    tensors, notes = {}, []
    for name in sorted(names, key=natural_order):
        if "/" in name or name.startswith("."):
            problems.append(f"tensor {name!r}: such a name cannot be stored")
            continue
        tensor = plan_tensor(name, recipe, base, experts)
        notes += _tie_notes(name, experts)
        if tensor is None:
            continue
        found = _problems(tensor, base, experts)
        problems += found
        if not tensor.experts:
            notes.append(f"base: {name} is used by no expert and is left out")
        elif not found:
            tensors[name] = tensor
            notes += _notes(tensor)
    for number, rule in enumerate(recipe.merge.rules):
        if not any(rule_for(recipe.merge, name) is rule for name in names):
            notes.append(f"merge.rules.{number}: {rule.match!r} is the first match of no tensor and has no effect")
    if not problems:
        problems += _budget_problems(recipe, tensors.values())
        problems += memory.problems(recipe.cluster.memory, len(experts), tensors.values())
    if problems:
        raise PlanError.listing("base and experts cannot be merged", problems)
    ties = {
        expert: {name: partner for name in sorted(names) if (partner := tied_to(name, found))}
        for expert, found in experts.items()
    }
    return MergePlan(tuple(experts), tensors, recipe.cluster.memory, ties, tuple(notes))
