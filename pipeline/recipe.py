"""The recipe: what a user writes, checked strictly, with every problem reported at once.

YAML is parsed here only. Relative paths count from the recipe's own folder.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.recipe_checks import cross_check
from pipeline.sections import (
    AUTO,
    ROUNDING,
    ClusterSection,
    ExpertSpec,
    MergeSection,
    Recipe,
    RouterSection,
    Rule,
    parse_bytes,
    spelled_out,
)
from storage.errors import RecipeError
from storage.places import kind_of, local_path, target_at

__all__ = [
    "AUTO", "ROUNDING", "ClusterSection", "ExpertSpec", "MergeSection", "Recipe", "RouterSection", "Rule", "load_recipe",
    "parse_assignment", "parse_bytes", "rule_for",
]  # fmt: skip


class _UniqueKeyLoader(yaml.SafeLoader):
    """A loader that refuses a key given twice, of which YAML would keep the last."""


def _unique_mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = str(key_node.value)
        if key in seen:
            raise RecipeError(f"the key {key!r} is given twice, again at line {key_node.start_mark.line + 1}. Keep one.")
        seen.add(key)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def _known_keys(location: Sequence[int | str]) -> list[str]:
    """The keys allowed in the section that holds this location."""
    sections: dict[str, type[BaseModel]] = {
        "merge": MergeSection, "router": RouterSection, "cluster": ClusterSection, "experts": ExpertSpec,
    }  # fmt: skip
    if len(location) < 2:
        return list(Recipe.model_fields)
    return list((Rule if "rules" in location else sections[str(location[0])]).model_fields)


def _problem(error: Any) -> str:
    location = error["loc"]
    where = ".".join(map(str, location)) or "recipe"
    if error["type"] == "extra_forbidden":
        known = _known_keys(location)
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"{where}: unknown key; {hint}"
    got = "" if error["type"] == "missing" else f" (got {error['input']!r})"
    return f"{where}: {error['msg'].removeprefix('Value error, ')}{got}"


def parse_assignment(text: str) -> tuple[str, Any]:
    """Key and value of one ``a.b.c=value``; the value is YAML."""
    path, separator, value = text.partition("=")
    if not separator or not path:
        raise RecipeError(f"--set {text}: expected KEY=VALUE, for example merge.groups=3")
    try:
        return path, yaml.safe_load(value)
    except yaml.YAMLError:
        raise RecipeError(f"--set {text}: the value {value!r} is no YAML; quote it") from None


def _apply(fields: dict[str, Any], path: str, value: Any) -> None:
    """Set the value at a dotted path."""
    *parents, last = path.split(".")
    target = fields
    for position, part in enumerate(parents):
        if parents[0] == "experts" and position == 1:
            target[part] = spelled_out(target.get(part, {}))  # the short form, a source alone, has no keys to set
        target = target.setdefault(part, {})
        if not isinstance(target, dict):
            raise RecipeError(f"{path}: {part} is no section of the recipe")
    target[last] = value


def _source_at(folder: Path, place: str, revision: str | None = None) -> str:
    """A source of the recipe as it is opened: an absolute path, a URL, or ``id@revision``."""
    kind = kind_of(place, folder)
    if kind == "local":
        return str(local_path(place, folder))
    if kind == "objects":
        return place.rstrip("/")
    return f"{place}@{revision}" if revision else place


def _repaired(fields: dict[str, Any], errors: Sequence[Any]) -> Recipe | None:
    """The recipe without what is wrong with single keys, so that the rest can be checked too; None when that fails."""
    copy = deepcopy(fields)
    for error in errors:
        *parents, last = error["loc"] or ("",)
        target: Any = copy
        try:
            for part in parents:
                target = target[part]
            if error["type"] == "missing":
                target[last] = "missing"
            else:
                del target[last]
        except (KeyError, IndexError, TypeError):
            return None
    try:
        return Recipe.model_validate(copy)
    except ValidationError:
        return None


def _validated(headline: str, fields: dict[str, Any], folder: Path) -> Recipe:
    problems: dict[str, None] = {}
    try:
        recipe: Recipe | None = Recipe.model_validate(fields)
    except ValidationError as error:
        problems = dict.fromkeys(_problem(found) for found in error.errors())
        recipe = _repaired(fields, error.errors())
    if recipe is not None:
        problems |= dict.fromkeys(cross_check(recipe, folder))
    if problems or recipe is None:
        raise RecipeError.listing(headline, problems)
    return recipe


def load_recipe(path: Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe of a YAML file: defaults filled, paths absolute, sources as ``open_folder`` takes them.

    RecipeError lists every problem with its key. ``overrides``: dotted key -> value, for example {"merge.groups": 3}.
    """
    headline = f"recipe {path}"
    try:
        fields = yaml.load(path.read_text("utf-8"), _UniqueKeyLoader)  # noqa: S506 - a SafeLoader subclass
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{headline}: cannot be read: {error}") from None
    if not isinstance(fields, dict):
        raise RecipeError(f"{headline}: expected a mapping with name, base, experts and output")
    for key, value in (overrides or {}).items():
        _apply(fields, key, value)
    folder = path.resolve().parent
    recipe = _validated(headline, fields, folder)
    places = {key: target_at(getattr(recipe, key), folder) for key in ("deltas", "output")}
    experts = {
        name: spec.model_copy(update={"source": _source_at(folder, spec.source, spec.revision), "revision": None})
        for name, spec in recipe.experts.items()
    }
    queries = {name: str(local_path(place, folder)) for name, place in recipe.router.queries.items()}
    router = recipe.router.model_copy(update={"queries": queries})
    base = _source_at(folder, recipe.base)
    return recipe.model_copy(update={**places, "base": base, "experts": experts, "router": router})


def rule_for(merge: MergeSection, tensor: str) -> Rule | None:
    """The first rule whose glob matches the tensor's name."""
    return next((rule for rule in merge.rules if fnmatch.fnmatchcase(tensor, rule.match)), None)
