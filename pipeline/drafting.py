"""From headers and the recipe to the plan: what every tensor becomes, and everything that cannot work, at once. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from pipeline import memory
from pipeline.opening import Opened, try_sources
from pipeline.plan import MergePlan, TensorPlan
from pipeline.recipe import AUTO, ROUNDING, Recipe, rule_for
from pipeline.roles import is_head, is_task_part, is_vocabulary, natural_order, tie_partner
from storage.checkpoint import Checkpoint
from storage.errors import CheckpointError, PlanError, SourceError
from storage.layout import DTYPES, ENTRIES
from storage.tensors import BaseRows, TensorInfo

CONFIG_KEYS = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
WITH_HEAD = re.compile("CausalLM|LMHead|MaskedLM|ConditionalGeneration|PreTraining|Seq2SeqLM")
"""In the names of architectures that have a LM head."""


@dataclass(frozen=True)
class Draft:
    """A plan, and why it cannot be carried out."""

    plan: MergePlan
    """Without the refused tensors."""
    refused: Mapping[str, tuple[str, ...]]
    """Tensor -> what is wrong with it."""
    problems: tuple[str, ...]
    """Everything that is wrong, tensors' problems included."""


def _config_problems(base: Checkpoint, expert: Checkpoint) -> list[str]:
    problems = []
    for key in CONFIG_KEYS:
        expected, got = base.config.get(key), expert.config.get(key)
        if expected is not None and got is not None and expected != got:  # what one of them leaves to a default, shapes show
            problems.append(f"{expert.label}: config.json: {key}: expected {expected!r} as in the base, got {got!r}")
    return problems


def _adapter_problems(expert: Checkpoint) -> list[str]:
    """A head of its own beside a configuration, its base's, by which nobody would read it."""
    own = [name for name, info in expert.tensors.items() if is_head(name) and not isinstance(info.data, BaseRows)]
    if not (expert.is_adapter and own and is_tied(expert) and tie_partner(own[0], expert.tensors)):
        return []
    remedy = "merge it with peft, untie the merged model (config.tie_word_embeddings = False) and give that"
    return [
        f"{expert.label}: tensor {own[0]}: the adapter has its own, but the base's config ties it to the embedding; {remedy}"
    ]


def _generates(checkpoint: Checkpoint) -> bool:
    """Whether its architecture has a LM head, as far as its config tells."""
    named = checkpoint.config.get("architectures")
    return not isinstance(named, list) or not named or any(WITH_HEAD.search(str(name)) for name in named)


def _may_lack(tensor: TensorPlan, checkpoint: Checkpoint) -> bool:
    """Whether an expert without this tensor is whole: a rule says so, or it is computed on loading, or for another task."""
    if tensor.policy != "private":
        return False
    optional = tensor.kind == "buffer" or is_task_part(tensor.name) or (is_head(tensor.name) and not _generates(checkpoint))
    return optional or tensor.reason.startswith("rule")


def _fits(tensor: TensorPlan, info: TensorInfo) -> bool:
    """Whether an expert's tensor has the shape it must have: the base's, or that with other numbers of tokens or classes."""
    if info.shape == tensor.shape:
        return True
    same_width = info.shape[1:] == tensor.shape[1:] and (len(info.shape) > 1 or info.channel_axis == ENTRIES)
    if tensor.policy == "private" and same_width and (is_task_part(tensor.name) or tensor.reason.startswith("rule")):
        return True
    if not is_vocabulary(tensor.name) or not same_width:
        return False
    return tensor.policy == "private" or (tensor.policy == "merge" and info.rows > tensor.base_rows)


def _shape_problems(tensor: TensorPlan, base: Checkpoint, experts: Mapping[str, Checkpoint]) -> list[str]:
    """What is wrong with one tensor's presence and shapes across base and experts."""
    problems = []
    name = tensor.name
    for expert, checkpoint in experts.items():
        info = tensor.experts.get(expert)
        if info is None:
            if name in base.tensors and not tied_to(name, checkpoint) and not _may_lack(tensor, checkpoint):
                remedy = "complete the checkpoint, or make the tensor private by a rule"
                problems.append(f"{checkpoint.label}: tensor {name} is missing: expected shape {list(tensor.shape)}; {remedy}")
            elif tensor.policy == "merge":
                why = "is tied to another" if tied_to(name, checkpoint) else "is missing"
                problems.append(f"{checkpoint.label}: tensor {name} {why} and cannot be merged; make it private by a rule")
        elif not _fits(tensor, info):
            whose = "as in the base" if tensor.base else f"as in expert {next(iter(tensor.experts))}"
            problems.append(
                f"{checkpoint.label}: tensor {name}: expected shape {list(tensor.shape)} {whose}, got {list(info.shape)}; "
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
            problems.append(
                f"{label}: tensor {tensor.name}: data type {info.dtype} cannot be read; expected one of {known}. "
                "Save the checkpoint in bf16, fp16 or fp32"
            )
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
    kinds = {info.dtype for info in tensor.experts.values()} | {tensor.dtype}
    kept = sorted(kind for kind in kinds if kind in DTYPES and not DTYPES[kind].mergeable)
    return [f"tensor {name}: data type {', '.join(kept)} cannot be merged; make it private by a rule"] if kept else []


def _problems(tensor: TensorPlan, base: Checkpoint, experts: Mapping[str, Checkpoint]) -> list[str]:
    return _storage_problems(tensor, experts) + _shape_problems(tensor, base, experts) + _policy_problems(tensor)


def _notes(tensor: TensorPlan, experts: Mapping[str, Checkpoint]) -> list[str]:
    notes = []
    for expert, info in tensor.experts.items():
        if tensor.base and info.rows > tensor.base_rows:
            extra = info.rows - tensor.base_rows
            rows = "1 row" if extra == 1 else f"{extra} rows"
            notes.append(f"expert {expert}: {tensor.name} has {rows} beyond the base's {tensor.base_rows}, which stay its own")
        elif tensor.base and info.rows < tensor.base_rows:
            notes.append(
                f"expert {expert}: {tensor.name} has {info.rows} of the base's {tensor.base_rows} rows; it keeps these"
            )
    absent = [
        name for name in experts if tensor.base and name not in tensor.experts and not tied_to(tensor.name, experts[name])
    ]
    return notes + [f"expert {name}: it has no {tensor.name} ({tensor.kind}), and its export will have none" for name in absent]


def _shared_notes(tensors: Iterable[TensorPlan], opened: Opened) -> list[str]:
    """Notes that many tensors have: one for all of them."""
    alike: dict[tuple[str, str], list[str]] = {}
    for tensor in tensors:
        whose = "the base's" if tensor.base else "the first expert's"
        for expert, info in tensor.experts.items():
            if info.dtype != tensor.dtype:
                cast = f"cast once from {info.dtype} to {whose} {tensor.dtype}"
                alike.setdefault((f"expert {expert}: ", cast), []).append(tensor.name)
        if (note := opened.roles[tensor.name].note) and (tensor.base is not None or tensor.policy == "merge"):
            alike.setdefault(("", note), []).append(tensor.name)
    return [f"{who}{_several(names)}: {note}" for (who, note), names in alike.items()]


def _several(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _tie_notes(name: str, experts: Mapping[str, Checkpoint]) -> list[str]:
    ties = {expert: tied_to(name, found) for expert, found in experts.items()}
    return [f"expert {expert}: {name} is tied to {partner} and is stored once" for expert, partner in ties.items() if partner]


def is_tied(checkpoint: Checkpoint) -> bool:
    """Whether the LM head is the embedding: by its config, or, where that says nothing, because no head is stored."""
    return not any(map(is_head, checkpoint.tensors)) if checkpoint.tied is None else checkpoint.tied


def tied_to(name: str, checkpoint: Checkpoint) -> str | None:
    """The tensor this one is a tied copy of; None when it is its own."""
    return tie_partner(name, checkpoint.tensors) if is_head(name) and is_tied(checkpoint) else None


def plan_tensor(name: str, recipe: Recipe, opened: Opened) -> TensorPlan | None:
    """Policy, groups and sources of one tensor; None when only tied copies of another tensor go by its name."""
    base, experts = opened.base, opened.experts
    holders = {n: found.tensors[name] for n, found in experts.items() if name in found.tensors and not tied_to(name, found)}
    own = base.tensors.get(name)
    if own is None and is_head(name) and is_tied(base) and (partner := tie_partner(name, base.tensors)):
        own = replace(base.tensors[partner], name=name)
    if own is None and not holders:
        return None
    role = opened.roles[name]
    policy, reason = (role.policy, role.kind) if own is not None else ("private", f"{role.kind} that only experts have")
    if policy == "merge" and len(holders) < len(experts) and is_task_part(name):
        policy, reason = "private", f"{role.kind} that not all experts have"
    rule = rule_for(recipe.merge, name)
    if rule is not None and rule.policy is not None:
        policy, reason = rule.policy, f"rule {rule.match}"
    groups = (rule.groups if rule else None) or recipe.merge.groups
    return TensorPlan(name, policy, groups if policy == "merge" else 0, own, holders, role.kind, reason)


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


def _general_notes(opened: Opened) -> list[str]:
    notes = [note for checkpoint in opened.checkpoints for note in checkpoint.notes]
    for expert, names in opened.renamed.items():
        if names:
            new, own = next(iter(names.items()))
            notes.append(
                f"expert {expert}: {len(names)} tensors go by the base's names ({own} as {new}) and are exported by its own"
            )
    return notes


def draft_plan(recipe: Recipe, opened: Opened) -> Draft:
    """What every tensor becomes, with everything that cannot work."""
    base, experts = opened.base, opened.experts
    general = [problem for checkpoint in experts.values() for problem in _config_problems(base, checkpoint)]
    general += [problem for checkpoint in experts.values() for problem in _adapter_problems(checkpoint)]
    if not base.tensors:
        general.append("base: it has no tensors")
    names = {name for checkpoint in (base, *experts.values()) for name in checkpoint.tensors}
    tensors: dict[str, TensorPlan] = {}
    refused: dict[str, tuple[str, ...]] = {}
    notes = _general_notes(opened)
    for name in sorted(names, key=natural_order):
        if "/" in name or "\\" in name or name.startswith(".") or "\0" in name:
            refused[name] = (f"tensor {name!r}: such a name cannot be stored",)
            continue
        tensor = plan_tensor(name, recipe, opened)
        notes += _tie_notes(name, experts)
        if tensor is None:
            continue
        found = _problems(tensor, base, experts)
        if found:
            refused[name] = tuple(found)
        elif not tensor.experts:
            notes.append(f"base: {name} is used by no expert and is left out")
        else:
            tensors[name] = tensor
            notes += _notes(tensor, experts)
    notes += _shared_notes(tensors.values(), opened)
    for number, rule in enumerate(recipe.merge.rules):
        if not any(rule_for(recipe.merge, name) is rule for name in names):
            notes.append(f"merge.rules.{number}: {rule.match!r} is the first match of no tensor and has no effect")
    problems = [*general, *(problem for found in refused.values() for problem in found)]
    if not problems:
        problems += _budget_problems(recipe, tensors.values())
        problems += memory.problems(recipe.cluster.memory, len(experts), tensors.values())
    ties = {
        expert: {name: partner for name in sorted(names) if (partner := tied_to(name, found))}
        for expert, found in experts.items()
    }
    plan = MergePlan(tuple(experts), tensors, recipe.cluster.memory, ties, opened.renamed, tuple(notes))
    return Draft(plan, refused, tuple(problems))


def open_sources(recipe: Recipe) -> Opened:
    """Base and experts. One error for all that cannot be opened, and for what is wrong with those that can.

    CheckpointError, or SourceError when nothing but places failed.
    """
    opened, errors = try_sources(recipe)
    if opened is not None and not errors:
        return opened
    misfits = draft_plan(recipe, opened).problems if opened is not None and opened.experts else ()
    if len(errors) == 1 and not misfits:
        raise errors[0]
    kind = SourceError if all(isinstance(error, SourceError) for error in errors) and not misfits else CheckpointError
    raise kind.listing("checkpoints cannot be merged", [*(p for error in errors for p in error.problems), *misfits])


def make_plan(recipe: Recipe, opened: Opened) -> MergePlan:
    """The plan of a merge. PlanError lists everything that cannot work."""
    draft = draft_plan(recipe, opened)
    if draft.problems:
        raise PlanError.listing("base and experts cannot be merged", draft.problems)
    return draft.plan
