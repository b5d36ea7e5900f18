"""The recipe: what a user writes, checked strictly, with every problem reported at once.

YAML is parsed here only. Relative paths count from the recipe's own folder.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
import sys
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError

from storage.errors import RecipeError
from storage.places import kind_of, local_path, scheme_of, split_revision

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
SIZE = re.compile(r"([0-9.]+)\s*([KMGT]?i?B)?", re.IGNORECASE)
UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12} | {
    f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", 1)
}


def parse_bytes(value: Any) -> int:
    """Bytes from ``2GiB``, ``500 MB`` or a plain number."""
    match = SIZE.fullmatch(str(value).strip())
    try:
        if match is None:
            raise ValueError
        return int(float(match[1]) * UNITS[(match[2] or "B").lower()])
    except (ValueError, KeyError, OverflowError):
        raise ValueError(f"expected a size such as 2GiB, got {value!r}") from None


def _name(value: str) -> str:
    if not NAME.fullmatch(value):
        raise ValueError("a name is letters, digits, '.', '_' and '-', and starts with a letter or digit")
    return value


Name = Annotated[str, AfterValidator(_name)]
AUTO: Literal["auto"] = "auto"
ROUNDING = 1e-9
"""By which a share may miss what it stands for: 1/49 of 49 is less than 1."""


def _scaling(value: Any) -> str | float:
    if value == "mean":
        return "mean"
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < sys.float_info.max:
        return float(value)
    raise ValueError("expected 'mean' or a number above 0")


def _groups(value: Any) -> int | Literal["auto"]:
    if value == "auto":
        return "auto"
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    raise ValueError("expected 'auto' or a whole number from 1 on")


def _expert(value: Any) -> Any:
    return {"source": value} if isinstance(value, str) else value


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ExpertSpec(_Section):
    """One expert: its source, or a mapping with its weight in the merge."""

    source: str
    """Hub id, local folder or object store's URL, of a checkpoint or of a LoRA adapter."""
    revision: str | None = None
    """Of a Hub id: branch, tag or commit; as ``source: id@revision``."""
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)


Groups = Annotated[int | Literal["auto"], PlainValidator(_groups)]


class Rule(_Section):
    """Overrides for tensors whose name matches a glob; the first match wins, and only the keys it names are set."""

    match: str
    policy: Literal["merge", "private", "base"] | None = None
    groups: Groups | None = None


class MergeSection(_Section):
    """What is done to the deltas (paper, section 3.2)."""

    groups: Groups = 2
    """K, the number of groups per channel; ``auto`` chooses it for every channel."""
    budget: float | None = Field(default=None, gt=0, le=1)
    """With ``groups: auto``: entries of the pool, as a share of all experts' entries in merged tensors."""
    granularity: Literal["channel", "layer", "model"] = "channel"
    """What is grouped as one: an output channel, a weight matrix, or all matrices of the model."""
    clustering: Literal["kmeans", "spherical", "sign", "random"] = "kmeans"
    metric: Literal["cosine", "euclidean", "manhattan"] = "cosine"
    sign: Literal["vector", "mass"] = "vector"
    """How ``clustering: sign`` reads a delta: ``vector`` clusters the rows' signs, ``mass`` splits by the sign of their sum."""
    method: Literal["average", "task_arithmetic", "ties", "dare", "dare_ties", "slerp", "byom"] = "dare"
    scaling: Annotated[Literal["mean"] | float, PlainValidator(_scaling)] = "mean"
    """``mean``: sum(w d) / sum(w) over the group; a number: lambda of Eq. 3, lambda * sum(w d)."""
    combine: Literal["sum", "mean"] | None = None
    """With a number as scaling, what it multiplies: the weighted sum (the default) or the weighted mean."""
    density: float = Field(default=0.7, gt=0, le=1)
    """Share of delta entries that TIES and DARE keep."""
    trim_scope: Literal["row", "tensor", "model"] = "tensor"
    """Over what TIES ranks an expert's entries by size."""
    rescale: Literal["density", "l1"] = "density"
    """What DARE multiplies kept entries by: 1 / density, or what restores the tensor's L1 norm."""
    t: float = Field(default=0.5, ge=0, le=1)
    """SLERP: how far from the first expert of a pair, by name, to the second."""
    keep: float = Field(default=0.3, gt=0, le=1)
    """BYOM: share of each row's entries that every expert keeps for itself."""
    residual: Literal["merged", "delta"] = "merged"
    """BYOM: whether the entries kept are those furthest from the merged model, or the largest of the expert's delta."""
    singleton: Literal["keep", "scale"] = "keep"
    """``keep``: an expert alone in its group keeps its exact row; ``scale``: it is pruned and scaled like any group."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    rules: tuple[Rule, ...] = Field(default=(), strict=False)


class RouterSection(_Section):
    """How the expert is picked per query."""

    kind: Literal["linear", "none"] = "none"
    queries: dict[str, str] = {}
    """Expert -> JSONL file of lines {"text": …}."""


class ClusterSection(_Section):
    """Where blocks are computed. ``memory`` is the budget of one task."""

    kind: Literal["local", "none"] | None = None
    address: str | None = None
    """A running scheduler, tcp://host:port; its workers see the same folders."""
    workers: int | None = Field(default=None, ge=1)
    """Worker processes of a local cluster, threads of kind none; by default one per CPU core, at most eight."""
    memory: Annotated[int, BeforeValidator(parse_bytes)] = Field(default=2 * 1024**3, ge=1)
    kernel: Literal["fused", "torch-cpu", "cuda"] = "fused"
    """What computes: compiled CPU code, torch on the CPU, or torch on each worker's GPU."""

    @property
    def where(self) -> str:
        """'local', 'none' or a scheduler's address."""
        return self.address or self.kind or "local"


class Recipe(_Section):
    """A whole recipe."""

    name: Name
    base: str
    """Hub id[@revision], local folder or object store's URL."""
    experts: dict[Name, Annotated[ExpertSpec, BeforeValidator(_expert)]] = Field(min_length=1, max_length=64)
    merge: MergeSection = MergeSection()
    router: RouterSection = RouterSection()
    allow_unrelated: bool = False
    """Whether to go on with an expert that, by its weights, is no fine-tune of the base."""
    deltas: str = "./deltas"
    output: str
    cluster: ClusterSection = ClusterSection()

    @property
    def expert_names(self) -> tuple[str, ...]:
        """Sorted: everything is computed in this order."""
        return tuple(sorted(self.experts))


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
            target[part] = _expert(target.get(part, {}))  # the short form, a source alone, has no keys to set
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


def _source_problems(where: str, place: str, revision: str | None, folder: Path) -> list[str]:
    """What is wrong with how a source is written."""
    kind = kind_of(place, folder)
    if kind is None:
        known = "a Hub id, a folder, or a URL of s3, gs or az"
        return [f"{where}: sources are {known}; got the scheme {scheme_of(place)!r} in {place}"]
    if kind == "objects" and "?" in place:
        return [f"{where}: a URL is a bucket and a prefix; credentials and options come from the environment"]
    if revision is not None and kind != "hub":
        return [f"{where}.revision: only sources on the Hub have revisions, got {place}; leave it out"]
    if revision is not None and split_revision(place)[1] is not None:
        return [f"{where}.revision: {place} names a revision already; keep one"]
    return []


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


def _cross_check(recipe: Recipe, folder: Path) -> list[str]:
    names, count = recipe.experts, len(recipe.experts)
    problems = _group_problems(recipe.merge, count) + _method_problems(recipe.merge, names)
    problems += _source_problems("base", recipe.base, None, folder)
    for name, spec in sorted(names.items()):
        problems += _source_problems(f"experts.{name}", spec.source, spec.revision, folder)
    for where, place in [("deltas", recipe.deltas), ("output", recipe.output)]:
        if scheme_of(place) not in ("", "file"):
            problems.append(f"{where}: only local folders can be written to, got {place}; give a folder")
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
        problems |= dict.fromkeys(_cross_check(recipe, folder))
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
    places = {key: str(local_path(getattr(recipe, key), folder)) for key in ("deltas", "output")}
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
