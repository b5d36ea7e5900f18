"""Keys of a recipe that are sound each, and do not fit together or name places that cannot be meant."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pipeline.sections import AUTO, ROUNDING, ExpertSpec, MergeSection, Recipe
from storage.places import (
    OBJECT_STORES,
    kind_of,
    local_path,
    local_problem,
    object_problem,
    scheme_of,
    shown_scheme,
    source_problem,
    split_revision,
    target_at,
)


def _source_problems(where: str, place: str, revision: str | None, folder: Path) -> list[str]:
    """What is wrong with how a source is written."""
    if problem := source_problem(place, folder):
        return [f"{where}: {problem}"]
    if revision is not None and kind_of(place, folder) != "hub":
        return [f"{where}.revision: only sources on the Hub have revisions, got {place}; leave it out"]
    if revision is not None and split_revision(place)[1] is not None:
        return [f"{where}.revision: {place} names a revision already; keep one"]
    if revision is not None and not revision.strip():
        return [f"{where}.revision: empty revision; name a branch, tag or commit, or leave it out"]
    return []


def _local_problems(where: str, place: str, folder: Path, expected: str, remedy: str) -> list[str]:
    """What is wrong with how a place that has to be local is written."""
    if not place.strip():
        return [f"{where}: empty; {remedy}"]
    if scheme_of(place) not in ("", "file"):
        return [f"{where}: {expected}, got {shown_scheme(place)}; {remedy}"]
    return [f"{where}: {problem}" for problem in [local_problem(place, folder)] if problem]


def _holds_checkpoint(path: Path) -> bool:
    try:
        return any(entry.name == "config.json" or entry.suffix == ".safetensors" for entry in path.iterdir())
    except OSError:  # there is no such folder yet, or it cannot be read: whoever writes to it says so
        return False


def _target_problems(recipe: Recipe, folder: Path) -> list[str]:
    """Why the delta store or the artifacts must not be written where the recipe says."""
    places = {"base": recipe.base} | {f"experts.{name}": spec.source for name, spec in sorted(recipe.experts.items())}
    sources = {
        where: local_path(place, folder)
        for where, place in places.items()
        if kind_of(place, folder) == "local" and source_problem(place, folder) is None
    }
    remote = {where: target_at(place, folder) for where, place in places.items() if kind_of(place, folder) == "objects"}
    problems = []
    targets: dict[str, str] = {}
    for key, place, what in [
        ("deltas", recipe.deltas, "the delta store"),
        ("output", recipe.output, "the output"),
    ]:
        if scheme_of(place) in OBJECT_STORES:
            if wrong := object_problem(place):
                problems.append(f"{key}: {wrong}")
                continue
            targets[key] = target_at(place, folder)
            holders = [f"the prefix of {where}" for where, held in remote.items() if f"{targets[key]}/".startswith(f"{held}/")]
        else:
            if found := _local_problems(key, place, folder, "it can be a folder or a URL of s3, gs or az", "correct it"):
                problems += found
                continue
            path = local_path(place, folder)
            targets[key] = str(path)
            holders = [f"the folder of {where}, {held}" for where, held in sources.items() if path.is_relative_to(held)]
            if not holders and _holds_checkpoint(path):
                holders = [f"{path}, which holds a checkpoint"]
        problems += [f"{key}: {what} would be written into {holder}; choose another folder" for holder in holders[:1]]
    if len(targets) == 2 and targets["deltas"] == targets["output"]:
        problems.append(f"deltas: the delta store would be written into the output, {targets['output']}; choose another folder")
    return problems


def _asked_groups(merge: MergeSection) -> list[tuple[str, int | Literal["auto"]]]:
    """Every K of the recipe with its key."""
    rules = [(f"merge.rules.{i}.groups", rule.groups) for i, rule in enumerate(merge.rules)]
    return [("merge.groups", merge.groups), *((where, groups) for where, groups in rules if groups is not None)]


def _group_problems(merge: MergeSection, count: int) -> list[str]:
    """What is wrong with the number of groups, for this many experts."""
    problems = []
    asked = _asked_groups(merge)
    automatic = [where for where, groups in asked if groups == AUTO]
    for where, groups in asked:
        if groups != AUTO and groups > count:
            problems.append(f"{where}: expected at most {count}, the number of experts, got {groups}")
        if merge.method == "byom" and groups != 1:
            problems.append(f"{where}: byom keeps entries beside one merged model: expected 1, got {groups}")
        if merge.method == "slerp" and (groups == AUTO or groups < count - 1):
            problems.append(f"{where}: slerp merges pairs: with {count} experts expected at least {count - 1}, got {groups}")
        if merge.clustering == "sign" and merge.sign == "mass" and groups not in (1, 2, count):
            problems.append(f"{where}: the sign of a sum makes two groups: expected 2, got {groups}")
    if merge.budget is not None and not automatic:
        problems.append("merge.budget: it is spent by groups: auto; set that, or leave the budget out")
    if merge.budget is not None and merge.budget * count < 1 - ROUNDING:
        problems.append(f"merge.budget: one row per channel is 1/{count} of {count} experts; got {merge.budget}")
    return problems


def _method_problems(merge: MergeSection, experts: Mapping[str, ExpertSpec]) -> list[str]:
    """Settings that contradict each other."""
    problems = []
    if merge.metric == "manhattan" and merge.clustering in ("spherical", "sign"):
        problems.append(f"merge.metric: {merge.clustering} clustering knows cosine and euclidean, got manhattan")
    if merge.method in ("average", "slerp") and (merge.scaling != "mean" or merge.combine is not None):
        problems.append(f"merge.scaling: {merge.method} has no lambda; leave scaling and combine out or use task_arithmetic")
    if merge.scaling == "mean" and merge.combine == "sum":
        problems.append("merge.combine: scaling: mean is no sum; set scaling to a number, or combine to mean")
    if merge.method == "slerp":
        problems += [f"experts.{n}.weight: slerp goes by merge.t" for n, e in sorted(experts.items()) if e.weight != 1]
        if merge.clustering == "sign" and merge.sign == "mass" and len(experts) > 2:
            problems.append("merge.sign: slerp merges pairs, and the sign of a sum may put three experts together")
    return problems


def cross_check(recipe: Recipe, folder: Path) -> list[str]:
    """All that is wrong with a recipe whose keys are sound each; ``folder`` is the one that it lies in."""
    names, count = recipe.experts, len(recipe.experts)
    problems = _group_problems(recipe.merge, count) + _method_problems(recipe.merge, names)
    problems += _source_problems("base", recipe.base, None, folder)
    for name, spec in sorted(names.items()):
        problems += _source_problems(f"experts.{name}", spec.source, spec.revision, folder)
    problems += _target_problems(recipe, folder)
    for name, place in sorted(recipe.router.queries.items()):
        problems += _local_problems(f"router.queries.{name}", place, folder, "queries are read from local files", "give a file")
    if recipe.router.kind != "none":
        if count < 2:
            problems.append("router.kind: a router needs at least two experts to choose from; set it to none")
        missing = sorted(names.keys() - recipe.router.queries.keys())
        problems += [f"router.queries: no queries for expert {name!r}; add a file of its questions" for name in missing]
    unknown, known = sorted(recipe.router.queries.keys() - names.keys()), ", ".join(sorted(names))
    problems += [f"router.queries.{name}: there is no expert of that name; experts: {known}" for name in unknown]
    folded: dict[str, str] = {}
    for name in sorted(names):
        if name.lower() in folded:
            problems.append(f"experts.{name}: differs from {folded[name.lower()]!r} in case only; rename one")
        folded[name.lower()] = name
    if recipe.cluster.kind and recipe.cluster.address:
        problems.append("cluster: expected kind or address, got both; keep one")
    return problems
