"""A sweep: one family merged in several ways from one delta store, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean
from typing import Any

from flows.run import Outcome
from pipeline.recipe import Recipe
from storage.errors import RecipeError

PRUNING = ("ties", "dare", "dare_ties")
"""Methods that a density is a setting of."""


@dataclass(frozen=True)
class Candidate:
    """One way to merge."""

    label: str
    """As part of a path: ``k2-dare-0.7``."""
    settings: Mapping[str, Any]
    """Overrides of the recipe's keys."""


def candidates(
    recipe: Recipe, groups: Sequence[int | str] | None, methods: Sequence[str] | None, densities: Sequence[float] | None
) -> list[Candidate]:
    """Every combination once, in order; what is not given is the recipe's. A density counts where the method prunes by one."""
    merge = recipe.merge
    found: dict[str, Candidate] = {}
    for k, method, density in product(groups or [merge.groups], methods or [merge.method], densities or [merge.density]):
        settings: dict[str, Any] = {"merge.groups": k, "merge.method": method}
        label = f"k{k}-{method}"
        if method in PRUNING:
            settings["merge.density"] = density
            label += f"-{density:g}" if isinstance(density, int | float) else f"-{density}"
        found.setdefault(label, Candidate(label, settings))
    return list(found.values())


def readable(several: Iterator[tuple[str, Any]]) -> dict[str, Recipe]:
    """Label -> recipe; one RecipeError for all that cannot be run, before anything is. ``several``: (label, how to read it)."""
    recipes: dict[str, Recipe] = {}
    problems: list[str] = []
    for label, read in several:
        try:
            recipes[label] = read()
        except RecipeError as error:
            problems += [f"{label}: {problem}" for problem in error.problems or (str(error),)]
    if problems:
        raise RecipeError.listing("the sweep cannot be run", problems)
    return recipes


HEADINGS = (
    "candidate",
    "groups",
    "method",
    "density",
    "share of parameters",
    "error, mean",
    "errors",
    "version",
    "new",
    "seconds",
)


def row(label: str, outcome: Outcome) -> list[Any]:
    """What came of a candidate: sizes as a share of all experts' parameters, errors as ||rebuilt - expert|| / ||delta||."""
    manifest = outcome.manifest
    merge = manifest.recipe["merge"]
    known = {name: e.reconstruction_error for name, e in manifest.experts.items() if e.reconstruction_error is not None}
    density = merge["density"] if merge["method"] in PRUNING else "-"
    return [
        label, merge["groups"], merge["method"], density, round(manifest.parameters.ratio, 4),
        round(fmean(known.values()), 4) if known else "-", ", ".join(f"{name} {error:.4f}" for name, error in known.items()),
        outcome.version, outcome.new, round(sum(manifest.seconds.values()), 1),
    ]  # fmt: skip
