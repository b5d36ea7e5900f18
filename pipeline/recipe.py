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
    QuerySource,
    Recipe,
    RouterSection,
    Rule,
    parse_bytes,
    spelled_out,
)
from storage.errors import RecipeError
from storage.places import kind_of, local_path, named_path, query_kind, target_at

__all__ = [
    "AUTO", "ROUNDING", "ClusterSection", "ExpertSpec", "MergeSection", "QuerySource", "Recipe", "RouterSection", "Rule",
    "load_recipe", "parse_assignment", "parse_bytes", "rule_for",
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
    if location[0] == "router" and len(location) > 2:
        return list(QuerySource.model_fields)
    sections: dict[str, type[BaseModel]] = {
        "merge": MergeSection, "router": RouterSection, "cluster": ClusterSection, "experts": ExpertSpec,
    }  # fmt: skip
    if len(location) < 2:
        return list(Recipe.model_fields)
    return list((Rule if "rules" in location else sections[str(location[0])]).model_fields)


def _location(error: Any, fields: dict[str, Any]) -> tuple[int | str, ...]:
    """Where in the recipe an error is: without the position in a list where it has the short form, one source alone."""
    found: list[int | str] = []
    target: Any = fields
    for part in error["loc"]:
        if isinstance(part, int) and not isinstance(target, list):
            continue
        found.append(part)
        try:
            target = target[part]
        except (KeyError, IndexError, TypeError):
            target = None
    return tuple(found)


def _problem(error: Any, fields: dict[str, Any]) -> str:
    location = _location(error, fields)
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
        if (parents[0], position) in (("experts", 1), ("router", 2)) and isinstance(target.get(part, {}), str | dict):
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


def _queries_at(folder: Path, sources: tuple[QuerySource, ...]) -> tuple[QuerySource, ...]:
    """Sources of queries as they are opened: absolute paths, and ``id[@revision]`` of data sets."""
    places = (
        spec.source if query_kind(spec.source, folder) == "hub" else str(named_path(spec.source, folder)) for spec in sources
    )
    return tuple(spec.model_copy(update={"source": place}) for spec, place in zip(sources, places, strict=True))


def _repaired(fields: dict[str, Any], errors: Sequence[Any]) -> Recipe | None:
    """The recipe without what is wrong with single keys, so that the rest can be checked too; None when that fails."""
    copy = deepcopy(fields)
    for error in errors:
        *parents, last = _location(error, fields) or ("",)
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
        problems = dict.fromkeys(_problem(found, fields) for found in error.errors())
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
    router = recipe.router.model_copy(
        update={
            "queries": {name: _queries_at(folder, sources) for name, sources in recipe.router.queries.items()},
            "outside": _queries_at(folder, recipe.router.outside),
            "encoder": _source_at(folder, recipe.router.encoder),
        }
    )
    base = _source_at(folder, recipe.base)
    return recipe.model_copy(update={**places, "base": base, "experts": experts, "router": router})


def rule_for(merge: MergeSection, tensor: str) -> Rule | None:
    """The first rule whose glob matches the tensor's name."""
    return next((rule for rule in merge.rules if fnmatch.fnmatchcase(tensor, rule.match)), None)
