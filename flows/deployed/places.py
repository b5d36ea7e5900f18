"""What a deployment says of a run: its recipe by name, and its places by the environment of the process it runs in."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from prefect import runtime

from flows.run import read_recipe
from pipeline.recipe import Recipe
from storage.errors import RecipeError

ROOT = Path(__file__).resolve().parent.parent.parent
"""The checkout, or what the package is installed in."""
RECIPES = ROOT / "flows" / "recipes"
STORE = "CHANNEL_MERGING_STORE"
"""Folder or URL below which all recipes have their places: ``<store>/deltas`` and ``<store>/artifacts/<recipe's name>``."""
CLUSTER = "CHANNEL_MERGING_CLUSTER"
"""local, none, cuda or a scheduler's address, as the command line's ``--cluster``."""
LINKS = "CHANNEL_MERGING_LINKS"
"""Under which URL a browser finds what is in the store."""


def known_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def find_recipe(recipe: str) -> Path:
    """The file of a recipe: one that comes with the package by its name, any other by its path. RecipeError for neither."""
    own, path = RECIPES / f"{recipe}.yaml", Path(recipe)
    if recipe in known_recipes():
        return own
    if path.is_file():
        return path
    raise RecipeError(
        f"recipe {recipe}: expected the path of a YAML file that the flow's process can read (its folder is {Path.cwd()}), or "
        f"one of {', '.join(known_recipes())}."
    )


def read(
    recipe: str,
    settings: Mapping[str, Any],
    output: str | None = None,
    deltas: str | None = None,
    cluster: str | None = None,
) -> Recipe:
    """The recipe with its overrides; what the caller does not say of its places, the environment says, then the recipe.

    RecipeError lists every problem.
    """
    path = find_recipe(recipe)
    if not any(key in settings for key in ("cluster", "cluster.kind", "cluster.address")):
        cluster = cluster or os.environ.get(CLUSTER) or None
    store = os.environ.get(STORE, "").rstrip("/")
    given = {STORE: store, "output": output or "", "deltas": deltas or ""} if runtime.deployment.id else {STORE: store}
    for what, place in given.items():
        if place and "://" not in place and not Path(place).is_absolute():
            raise RecipeError(
                f"{what}: expected a URL or an absolute path, got {place!r}: a deployment's run works in a folder of its own, "
                "which is gone afterwards."
            )
    if store:
        name = read_recipe(path, settings, output, deltas, cluster).name
        output = output or (None if "output" in settings else f"{store}/artifacts/{name}")
        deltas = deltas or (None if "deltas" in settings else f"{store}/deltas")
    return read_recipe(path, settings, output, deltas, cluster)


def link(place: str, text: str, file: str = "") -> str:
    """Markdown that leads to a place or a file in it: a link where a browser can follow one, else the place itself."""
    whole = f"{place}/{file}" if file else place
    store, links = os.environ.get(STORE, "").rstrip("/"), os.environ.get(LINKS, "").rstrip("/")
    if links and store and whole.startswith(f"{store}/"):
        return f"[{text}]({links}/{quote(whole.removeprefix(f'{store}/'))})"
    if "://" not in whole:
        return f"[{text}]({Path(whole).absolute().as_uri()}) `{whole}`"
    return f"{text} `{whole}`"
