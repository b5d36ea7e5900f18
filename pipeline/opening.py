"""Base and experts of a recipe, opened at once: configs and headers, names and output channels put in one order."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from pipeline.recipe import Recipe
from pipeline.roles import Role, roles
from storage.adapters import ADAPTER_CONFIG
from storage.checkpoint import Checkpoint, open_checkpoint
from storage.errors import ChannelMergingError, CheckpointError, SourceError
from storage.sources import open_folder


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
    tensors = {
        name: replace(info, channel_axis=known[name].channel_axis if len(info.shape) > 1 else 0)
        for name, info in checkpoint.tensors.items()
    }
    return replace(checkpoint, tensors=tensors)


def _names_in_base(base: Checkpoint, expert: Checkpoint) -> dict[str, str]:
    """Own name -> the base's name for it. A model with a head stores its body under a prefix, a bare one does not."""
    names, known = expert.tensors.keys(), base.tensors.keys()
    best = {name: name for name in names}
    for prefix in sorted({f"{name.partition('.')[0]}." for name in (*names, *known)}):
        for found in (
            {name: name.removeprefix(prefix) if name.removeprefix(prefix) in known else name for name in names},
            {name: prefix + name if prefix + name in known else name for name in names},
        ):
            better = len(known & set(found.values())) > len(known & set(best.values()))
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
        if placed[name].tensors.keys() - known.keys():
            known = {**_roles_of(placed[name]), **known}
    everyone = {name: oriented(expert, known) for name, expert in placed.items()}
    return Opened(oriented(base, known), everyone, known, renamed)


def open_sources(recipe: Recipe) -> Opened:
    """Base and experts. One error for all that cannot be opened: CheckpointError, or SourceError when only places failed."""
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
    errors: dict[str, ChannelMergingError] = {}
    for future in futures.values():
        try:
            future.result()
        except (CheckpointError, SourceError) as error:
            errors[str(error)] = error
    if errors:
        raise _together(list(errors.values()))
    found = [future.result() for future in futures.values()]
    return arrange(found[0], dict(zip(recipe.expert_names, found[1:], strict=True)))


def _together(errors: list[ChannelMergingError]) -> ChannelMergingError:
    if len(errors) == 1:
        return errors[0]
    kind = CheckpointError if any(isinstance(error, CheckpointError) for error in errors) else SourceError
    problems = []
    for error in errors:
        label = str(error).partition(":")[0]
        problems += [f"{label}: {problem}" for problem in error.problems] or [str(error)]
    return kind.listing("checkpoints cannot be read", problems)
