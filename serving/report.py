"""The report of an artifact: one HTML page that needs nothing beside it, and the same figures as data.

Both are pure functions of the manifest, equal for equal manifests: the page beside a version, and the one made of it later.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

import jinja2
import yaml

from serving import report_words as words
from serving.report_figures import (
    alike,
    coverage,
    expert_entries,
    layer_figures,
    merged_sharing,
    name_figures,
    policy_figures,
)
from serving.report_router import router_figures
from storage.layout import DOCUMENTS, RESIDUE_FILE, ROWS_FILE
from storage.manifest import Manifest

SECTIONS = ("name", "base", "experts", "merge", "router")
"""The keys of a recipe that come first; the others follow by name."""
STAGES = ("ingest", "health", "similarity", "cluster", "merge", "pack", "router")
MOVES = ("read", "written")
PAIRS_SHOWN = 28
"""Columns of pairs in the page's table of layers: all of eight experts'. The data hold every pair."""
TABLE_ROWS = 40
"""Rows of a router's tables that the page shows."""


def analysis(manifest: Manifest) -> dict[str, Any]:
    """All figures of the report, of JSON's types alone. Counts are entries, rows or bytes by name; shares lie in 0..1."""
    experts = sorted(manifest.experts)
    whole, layers = merged_sharing(manifest, experts)
    entries = expert_entries(manifest, experts)
    asked = manifest.recipe.get("experts") or experts
    merge = manifest.recipe.get("merge") or {}
    compared = manifest.parent is None and len(experts) > 1
    return {
        "artifact": _artifact(manifest),
        "size": _size(manifest),
        "merging": {"section": dict(merge), "words": words.merge_words(merge, len(asked))},
        "experts": [_expert(manifest, name, entries[name]) for name in experts],
        "grouped": {
            "channels": whole.channels,
            "pool_rows": whole.pool_rows,
            "expert_rows": whole.expert_rows,
            "group_sizes": whole.group_sizes(),
            "group_sizes_of": {name: whole.group_sizes_of(place) for place, name in enumerate(experts)},
        } if compared else None,
        "alike": alike(whole, layers) if compared else None,
        "layers": layer_figures(manifest, layers),
        "policies": policy_figures(manifest.tensors),
        "names": name_figures(manifest.tensors),
        "coverage": coverage(manifest),
        "router": router_figures(manifest.router, experts),
        "stages": _stages(manifest.seconds, manifest.moved),
        "notes": list(manifest.notes),
        "recipe": _ordered(manifest.recipe),
        "base": {**{key: manifest.base.get(key) for key in ("source", "id")}, "files": _sorted(manifest.base.get("files"))},
        "packages": _sorted(manifest.packages),
    }  # fmt: skip


def report_html(manifest: Manifest) -> str:
    """The report as one HTML page, without scripts, and without anything from elsewhere."""
    found = analysis(manifest)
    recipe = yaml.safe_dump(found["recipe"], sort_keys=False, allow_unicode=True, width=100)
    shown = _shown_pairs(found["alike"])
    return _template().render(a=found, recipe=recipe, shown=shown, tops=_tops(found), table_rows=TABLE_ROWS)


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=True)
    for name in ("number", "percent", "ratio", "size", "figure", "is_share"):
        environment.filters[name] = getattr(words, name)
    return environment.from_string(files("serving").joinpath("report.html.j2").read_text("utf-8"))


def _sorted(fields: Mapping[str, Any] | None) -> dict[str, Any]:
    """By name: a manifest that was read has other orders than the one that was written."""
    return dict(sorted((fields or {}).items()))


def _ordered(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe as one would write it: its name first, then what is merged, then how."""

    def nested(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: nested(held) for key, held in sorted(value.items())}
        return [nested(held) for held in value] if isinstance(value, list | tuple) else value

    keys = [*(key for key in SECTIONS if key in recipe), *sorted(recipe.keys() - set(SECTIONS))]
    return {key: nested(recipe[key]) for key in keys}


def _artifact(manifest: Manifest) -> dict[str, Any]:
    fields = ("name", "version", "created", "format", "parent", "inputs", "seed", "kernel")
    return {field: getattr(manifest, field) for field in fields}


def _size(manifest: Manifest) -> dict[str, Any]:
    """Entries stored and replaced, and the bytes of files by what they hold. Card and report do not count themselves."""
    kinds = dict.fromkeys(("pool", "rows", "residue", "router", "beside"), 0)
    held = {name: record.bytes for name, record in manifest.files.items() if name not in DOCUMENTS}
    for name, count in held.items():
        last = name.rpartition("/")[2]
        if name.startswith("experts/"):
            kinds[{ROWS_FILE: "rows", RESIDUE_FILE: "residue"}.get(last, "beside")] += count
        else:
            kinds["pool" if name.startswith("pool") else "router" if name.startswith("router/") else "beside"] += count
    numbers = manifest.parameters
    return {
        **numbers.model_dump(),
        "stored": numbers.pool + numbers.residue,
        "files": len(held),
        "bytes": sum(held.values()),
        "bytes_of": kinds,
    }


def _expert(manifest: Manifest, name: str, entries: Mapping[str, int]) -> dict[str, Any]:
    record = manifest.experts[name]
    return {
        "name": name,
        "source": record.source,
        "id": record.id,
        "parameters": record.parameters,
        "weight": record.weight,
        "delta_ratio": record.health.delta_ratio,
        "unchanged": record.health.unchanged,
        "reconstruction_error": record.reconstruction_error,
        "trimmed_to": record.trimmed_to,
        "pool_entries": dict(entries),
        "tied": _sorted(record.tied),
        "renamed": len(record.renamed),
        "files": _sorted(record.files),
    }


def _stages(seconds: Mapping[str, float], moved: Mapping[str, int]) -> list[dict[str, Any]]:
    """Per stage its wall time and the bytes it read and wrote; None for what is not recorded."""
    found: dict[str, dict[str, Any]] = {}
    for stage, spent in seconds.items():
        found.setdefault(stage, {})["seconds"] = spent
    for key, count in moved.items():
        stage, _, what = key.rpartition(" ")
        found.setdefault(stage if what in MOVES else key, {})[what if what in MOVES else "read"] = count
    known = [stage for stage in STAGES if stage in found]
    return [
        {"stage": stage, **{key: found[stage].get(key) for key in ("seconds", *MOVES)}}
        for stage in [*known, *sorted(found.keys() - set(known))]
    ]


def _tops(found: Mapping[str, Any]) -> dict[str, float]:
    """What cells of the strongest colour and the longest bars stand for, where these are no shares."""
    errors = [expert["reconstruction_error"] for expert in found["experts"]]
    ratios = [ratio for layer in found["layers"] for ratio in layer["delta_ratio"].values()]
    seconds = [stage["seconds"] for stage in found["stages"]]
    tops = {"error": [1.0, *errors], "delta_ratio": ratios, "seconds": seconds}
    return {name: max((value for value in values if value is not None), default=0.0) for name, values in tops.items()}


def _shown_pairs(found: Mapping[str, Any] | None) -> list[int]:
    """The pairs that the table of layers shows: those most often together, where there are too many for columns."""
    if found is None:
        return []
    places = {name: place for place, name in enumerate(found["experts"])}
    shares = [found["matrix"][places[a]][places[b]] or 0.0 for a, b in found["pairs"]]
    ranked = sorted(range(len(shares)), key=lambda pair: (-shares[pair], pair))
    return sorted(ranked[:PAIRS_SHOWN])
