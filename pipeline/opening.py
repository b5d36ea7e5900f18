"""Base and experts of a recipe, opened at once: configs and headers, names and output channels put in one order."""

from __future__ import annotations

import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from pipeline.recipe import Recipe
from pipeline.roles import Role, roles
from storage.adapters import ADAPTER_CONFIG
from storage.checkpoint import Checkpoint, open_checkpoint
from storage.errors import ChannelMergingError, CheckpointError, SourceError
from storage.sources import open_folder

LEGACY = re.compile(r"(LayerNorm\.)(gamma|beta)$")
"""Ends of names that old BERT checkpoints have."""


@dataclass(frozen=True)
class Opened:
    """What a recipe is about: every tensor by the base's name for it, with the axis of its output channels."""

    base: Checkpoint
    experts: Mapping[str, Checkpoint]
    """In order of name."""
    roles: Mapping[str, Role]
    """Of every tensor of base and experts."""
    renamed: Mapping[str, Mapping[str, str]]
    """Expert -> tensor -> its name in the expert's own checkpoint, where that is another."""

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        return (self.base, *self.experts.values())


def _roles_of(checkpoint: Checkpoint) -> dict[str, Role]:
    return roles({name: info.shape for name, info in checkpoint.tensors.items()}, checkpoint.config)


def oriented(checkpoint: Checkpoint, known: Mapping[str, Role]) -> Checkpoint:
    """The checkpoint with the axis of output channels of every tensor."""
    return replace(
        checkpoint,
        tensors={name: replace(info, channel_axis=known[name].channel_axis) for name, info in checkpoint.tensors.items()},
    )


def _modern(name: str) -> str:
    """The name that transformers gives a tensor of an old checkpoint on loading."""
    return LEGACY.sub(lambda found: found[1] + {"gamma": "weight", "beta": "bias"}[found[2]], name)


def _names_in_base(base: Checkpoint, expert: Checkpoint) -> dict[str, str]:
    """Own name -> the base's name for it. A model with a head stores its body under a prefix, a bare one does not."""
    names, known = expert.tensors.keys(), {_modern(name): name for name in base.tensors}
    best: dict[str, str] = {name: known.get(_modern(name), name) for name in names}
    if len(set(best.values())) < len(names):  # it holds old names beside new ones
        best = {name: name for name in names}
    for prefix in sorted({f"{name.partition('.')[0]}." for name in (*names, *known)}):
        for found in (
            {name: known.get(_modern(name).removeprefix(prefix), name) for name in names},
            {name: known.get(prefix + _modern(name), name) for name in names},
        ):
            better = len(base.tensors.keys() & set(found.values())) > len(base.tensors.keys() & set(best.values()))
            if better and len(set(found.values())) == len(names):
                best = found
    return best


def _aligned(base: Checkpoint, expert: Checkpoint) -> tuple[Checkpoint, dict[str, str]]:
    """The expert with the base's names for its tensors, and its own names of those renamed."""
    if expert.tensors.keys() == base.tensors.keys():
        return expert, {}
    names = _names_in_base(base, expert)
    renamed = {new: own for own, new in names.items() if new != own}
    if not renamed:
        return expert, {}
    tensors = {names[own]: replace(info, name=names[own]) for own, info in expert.tensors.items()}
    return replace(expert, tensors=tensors), renamed


def arrange(base: Checkpoint, experts: Mapping[str, Checkpoint]) -> Opened:
    """Give every tensor the base's name and the axis of its output channels. Pure."""
    known = _roles_of(base)
    renamed: dict[str, dict[str, str]] = {}
    placed: dict[str, Checkpoint] = {}
    for name, expert in sorted(experts.items()):
        placed[name], renamed[name] = _aligned(base, expert)
        others = placed[name].tensors.keys() - known.keys()
        found = _roles_of(placed[name]) if others else {}
        # which expert is first depends on the recipe: only the base says that a matrix is stored (in, out)
        known |= {other: replace(found[other], channel_axis=min(found[other].channel_axis, 0)) for other in others}
    everyone = {name: oriented(expert, known) for name, expert in placed.items()}
    return Opened(oriented(base, known), everyone, known, renamed)


def try_sources(recipe: Recipe) -> tuple[Opened | None, list[ChannelMergingError]]:
    """Base and those experts that can be opened, and what is wrong with the others; None without a base."""
    places = {"base": recipe.base} | {f"expert {name}": recipe.experts[name].source for name in recipe.expert_names}

    def opened(label: str) -> Checkpoint:
        folder = open_folder(label, places[label])
        if label == "base":
            base = open_checkpoint(label, folder)
            return oriented(base, _roles_of(base))
        return open_checkpoint(label, folder, futures["base"].result() if ADAPTER_CONFIG in folder.names else None)

    with ThreadPoolExecutor(len(places)) as pool:  # opening one is a handful of requests
        futures = {}
        for label in places:  # the base first: adapters wait for it
            futures[label] = pool.submit(opened, label)
    found: dict[str, Checkpoint] = {}
    errors: dict[str, ChannelMergingError] = {}
    for label, future in futures.items():
        try:
            found[label] = future.result()
        except (CheckpointError, SourceError) as error:
            if str(error) not in errors:  # an adapter fails with its base
                told = error.problems or (str(error),)
                error.problems = tuple(text if text.startswith(label) else f"{label}: {text}" for text in told)
                errors[str(error)] = error
    experts = {name: found[f"expert {name}"] for name in recipe.expert_names if f"expert {name}" in found}
    return (arrange(found["base"], experts) if "base" in found else None), list(errors.values())
