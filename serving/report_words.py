"""The words of a report: what a recipe's merge section does, and how numbers are written. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Section = Mapping[str, Any]
UNITS = {"channel": "output channel", "layer": "weight matrix"}
SHARES = frozenset({"accuracy", "coverage", "f1", "macro_f1", "precision", "recall"})
"""Figures of routers that are shares of something."""


def number(value: Any) -> str:
    """Any figure: counts with thousands, other numbers with four digits, an en dash for what is not known."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def percent(value: float | None) -> str:
    """A share in per cent. What is not quite nothing or all is not written as if it were."""
    if value is None:
        return "–"
    if value in (0, 1):
        return f"{100 * value:.0f} %"
    text = f"{100 * value:.1f}"
    if text == "0.0" and value > 0:
        return "< 0.1 %"
    return "> 99.9 %" if text == "100.0" and value < 1 else f"{text} %"


def ratio(value: float | None) -> str:
    """A ratio of norms, four places."""
    return "–" if value is None else f"{value:.4f}"


def size(count: int | None) -> str:
    """Bytes in the largest unit of which there is one."""
    if count is None:
        return "–"
    for unit, amount in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= amount:
            return f"{count / amount:,.2f} {unit}"
    return f"{count} {'byte' if count == 1 else 'bytes'}"


def microseconds(value: float) -> str:
    """A time in the largest unit of which there is one: 65 µs, 1.2 ms."""
    for unit, amount in (("s", 1e6), ("ms", 1e3)):
        if value >= amount:
            return f"{value / amount:,.3g} {unit}"
    return f"{value:.3g} µs"


def is_share(key: str, value: Any) -> bool:
    """Whether a router's figure, by its key, is a share of something."""
    is_number = isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool))
    return key.rpartition(".")[2] in SHARES and is_number and 0 <= value <= 1


def figure(key: str, value: Any) -> str:
    """A router's figure, by its key: shares in per cent."""
    if isinstance(value, list):
        return ", ".join(number(item) for item in value) or "–"
    return percent(value) if is_share(key, value) else number(value)


def merge_words(merge: Section, experts: int) -> list[str]:
    """The recipe's ``merge`` section in sentences, for so many experts. Keys that are missing are not spoken of."""
    return [
        *_groups(merge, experts),
        *_clustering(merge, experts),
        *_method(merge, experts),
        *_scaling(merge, experts),
        *_rules(merge),
    ]


def _asked(merge: Section) -> list[Any]:
    """Every K of the section, its rules' too."""
    return [merge.get("groups"), *(rule.get("groups") for rule in merge.get("rules") or ())]


def _is_merged(merge: Section, experts: int) -> bool:
    """Whether any tensor's experts can share a merged row."""
    return any(groups == "auto" or (isinstance(groups, int) and groups < experts) for groups in _asked(merge))


def _is_grouped(merge: Section, experts: int) -> bool:
    """Whether any tensor's experts are divided into groups of several."""
    return any(groups == "auto" or (isinstance(groups, int) and 1 < groups < experts) for groups in _asked(merge))


def _groups(merge: Section, experts: int) -> Iterator[str]:
    groups, granularity = merge.get("groups"), str(merge.get("granularity", "channel"))
    unit = UNITS.get(granularity)
    per = f"For every {unit}" if unit else "Once for the whole model"
    if groups == "auto":
        budget = merge.get("budget")
        until = (
            f"until merged tensors hold {100 * budget:g} % of all experts' entries"
            if budget
            else "up to the knee of that curve"
        )
        yield f"{per} there are as many groups of experts as lower the error most for what they store, {until}."
    elif isinstance(groups, int) and groups >= experts:
        yield "Every expert keeps rows of its own: nothing is merged."
    elif groups == 1:
        yield "All experts are merged into one: they share one row per output channel."
    elif isinstance(groups, int):
        yield f"{per} the {experts} experts are put into {groups} groups; a group shares one merged row per output channel."


def _clustering(merge: Section, experts: int) -> Iterator[str]:
    clustering, metric = merge.get("clustering"), merge.get("metric", "cosine")
    if not _is_grouped(merge, experts) or clustering is None:
        return
    means = {"cosine": "directions of the deltas (k-means, cosine)", "euclidean": "deltas (k-means, Euclidean)"}
    medoids = "deltas (k-medoids, Manhattan)"
    words = {
        "kmeans": f"Groups are those of the nearest {means.get(metric, medoids)}.",
        "spherical": "Groups are those of the nearest directions of the deltas (spherical k-means).",
        "sign": "Groups are those whose deltas agree most in the signs of their entries (k-means of the signs).",
        "random": f"Groups are drawn at random, with seed {merge.get('seed', 0)}.",
    }
    if clustering == "sign" and merge.get("sign") == "mass":
        yield "Groups are the two signs that the deltas' sums have."
    else:
        yield words.get(clustering, f"Clustering: {clustering}.")


def _method(merge: Section, experts: int) -> Iterator[str]:
    method = merge.get("method")
    if method is None or not _is_merged(merge, experts):
        return
    density, keep = merge.get("density"), merge.get("keep")
    kept = "some" if density is None else f"{100 * density:g} %"
    own = "some" if keep is None else f"{100 * keep:g} %"
    over = {"row": "row", "model": "model"}.get(str(merge.get("trim_scope")), "tensor")
    rescaled = "to the tensor's L1 norm" if merge.get("rescale") == "l1" else "by 1 / density"
    furthest = "the largest of its delta" if merge.get("residual") == "delta" else "those furthest from the merged model"
    trimmed = f"of every delta the largest {kept} of its entries, ranked per {over}, stay"
    masked = f"of every delta {kept} of its entries, drawn at random, stay and are rescaled {rescaled}"
    if density == 1:
        trimmed = masked = "deltas are whole"
    elected = "within a group only entries of the elected sign count"
    words = {
        "average": "A group's row is the mean of its members' weights.",
        "task_arithmetic": "A group's row is the base's and its members' deltas (task arithmetic).",
        "ties": f"TIES: {trimmed}; {elected}.",
        "dare": f"DARE: {masked}.",
        "dare_ties": f"DARE and TIES: {masked}; {elected}.",
        "slerp": f"SLERP: the deltas of a pair are merged along the arc between them, at t = {merge.get('t', 0.5):g}.",
        "byom": f"BYOM: beside the merged row every expert keeps {own} of its entries, {furthest}.",
    }  # fmt: skip
    yield words.get(method, f"Method: {method}.")


def _scaling(merge: Section, experts: int) -> Iterator[str]:
    scaling = merge.get("scaling")
    if _is_merged(merge, experts) and merge.get("method") not in ("average", "slerp"):
        if scaling == "mean":
            yield "A group's deltas are averaged, by the experts' weights."
        elif isinstance(scaling, int | float):
            what = "mean" if merge.get("combine") == "mean" else "sum"
            yield f"The weighted {what} of a group's deltas is multiplied by λ = {scaling:g}."
    if _is_grouped(merge, experts):
        if merge.get("singleton") == "keep":
            yield "An expert alone in its group keeps its exact row."
        elif merge.get("singleton") == "scale":
            yield "An expert alone in its group is pruned and scaled like any group."


def _rules(merge: Section) -> Iterator[str]:
    rules = merge.get("rules") or ()
    told = []
    for rule in rules:
        changes = [f"policy {rule['policy']}"] if rule.get("policy") else []
        changes += [f"{rule['groups']} groups"] if rule.get("groups") else []
        told.append(f"{rule.get('match')}: {', '.join(changes) or 'as all others'}")
    if told:
        yield f"Exceptions, of which a tensor's first counts: {'; '.join(told)}."
