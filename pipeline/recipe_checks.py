"""Keys of a recipe that are sound each, and do not fit together or name places that cannot be meant."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Literal

from pipeline.sections import AUTO, OF_BERT, ROUNDING, ExpertSpec, MergeSection, QuerySource, Recipe, RouterSection
from storage.places import (
    OBJECT_STORES,
    QUERIES,
    kind_of,
    local_path,
    local_problem,
    object_problem,
    query_kind,
    query_problem,
    scheme_of,
    shown_scheme,
    source_problem,
    split_revision,
    target_at,
)

BASE = "base"
"""As a fallback: the base model."""


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


def _options_problems(where: str, spec: QuerySource, is_hub: bool) -> list[str]:
    """Settings of one source of queries that do not go with it."""
    problems = []
    if spec.column is not None and spec.messages is not None:
        problems.append(f"{where}: column or messages, got both; keep the one that holds the query")
    if is_hub:
        return problems
    of_hub = [key for key in ("config", "split") if key in spec.model_fields_set and getattr(spec, key) is not None]
    problems += [f"{where}.{key}: only data sets on the Hub have one, got {spec.source}; leave it out" for key in of_hub]
    if PurePath(spec.source.removesuffix(".gz")).suffix.lower() == ".txt":
        found = [key for key in ("column", "messages", "group") if getattr(spec, key) is not None]
        problems += [f"{where}.{key}: a text file has no columns, it has a query a line; leave it out" for key in found]
    return problems


def _query_problems(router: RouterSection, folder: Path) -> list[str]:
    """What is wrong with how sources of queries are written."""
    problems = []
    seen: dict[QuerySource, str] = {}
    for placed_at, sources in [*sorted(router.queries.items()), (None, router.outside)]:
        key = "router.outside" if placed_at is None else f"router.queries.{placed_at}"
        if not sources and placed_at is not None:
            problems.append(f"{key}: no source; give {QUERIES}")
        for number, spec in enumerate(sources):
            where = f"{key}.{number}" if len(sources) > 1 else key
            if wrong := query_problem(spec.source, folder):
                problems.append(f"{where}: {wrong}")
                continue
            problems += _options_problems(where, spec, query_kind(spec.source, folder) == "hub")
            if (first := seen.setdefault(spec, where)) != where:
                problems.append(f"{where}: the same queries as {first}, which tell nobody apart; remove one")
    return problems


def _router_problems(router: RouterSection, experts: Mapping[str, ExpertSpec], folder: Path) -> list[str]:
    """What of the router's section does not fit the experts, or its kind."""
    problems = []
    if router.kind != "none":
        if len(experts) < 2:
            problems.append("router.kind: a router needs at least two experts to choose from; set it to none")
        missing = sorted(experts.keys() - router.queries.keys())
        problems += [f"router.queries: no queries for expert {name!r}; add a source of its questions" for name in missing]
    known = ", ".join(sorted(experts))
    named = [f"router.queries.{name}" for name in sorted(router.queries.keys() - experts.keys())]
    if isinstance(router.threshold, dict):
        named += [f"router.threshold.{name}" for name in sorted(router.threshold.keys() - experts.keys())]
    problems += [f"{key}: there is no expert of that name; experts: {known}" for key in named]
    if router.fallback not in (None, BASE, *experts):
        problems.append(f"router.fallback: expected {BASE!r} or an expert ({known}), got {router.fallback!r}")
    if router.fallback == BASE and BASE in experts:
        problems.append(f"router.fallback: {BASE!r} is the base model here, and an expert has that name; rename the expert")
    levels = router.threshold.values() if isinstance(router.threshold, dict) else [router.threshold]
    if router.fallback is None and any(levels):
        problems.append("router.threshold: below it the fallback is chosen, and there is none; set router.fallback")
    if router.fallback is not None and not any(levels):
        problems.append("router.fallback: it is chosen below router.threshold, which is 0; set that to auto or a number")
    if router.kind == "linear":
        found = [key for key in OF_BERT if key in router.model_fields_set]
        problems += [f"router.{key}: only kind bert has it, the kind is linear; leave it out" for key in found]
    if router.kind == "bert":
        problems += _source_problems("router.encoder", router.encoder, None, folder)
        if router.batch % router.accumulate:
            problems.append(
                f"router.accumulate: expected a divisor of the batch, {router.batch}, got {router.accumulate}; change one"
            )
    return problems


def cross_check(recipe: Recipe, folder: Path) -> list[str]:
    """All that is wrong with a recipe whose keys are sound each; ``folder`` is the one that it lies in."""
    names, count = recipe.experts, len(recipe.experts)
    problems = _group_problems(recipe.merge, count) + _method_problems(recipe.merge, names)
    problems += _source_problems("base", recipe.base, None, folder)
    for name, spec in sorted(names.items()):
        problems += _source_problems(f"experts.{name}", spec.source, spec.revision, folder)
    problems += _target_problems(recipe, folder)
    problems += _query_problems(recipe.router, folder) + _router_problems(recipe.router, names, folder)
    folded: dict[str, str] = {}
    for name in sorted(names):
        if name.lower() in folded:
            problems.append(f"experts.{name}: differs from {folded[name.lower()]!r} in case only; rename one")
        folded[name.lower()] = name
    if recipe.cluster.kind and recipe.cluster.address:
        problems.append("cluster: expected kind or address, got both; keep one")
    return problems
