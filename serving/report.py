"""The report of an artifact: one HTML page that needs nothing beside it, and the same figures as data.

Both are pure functions of the manifest, equal for equal manifests: the page beside a version, and the one made of it later.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
    natural_order,
    policy_figures,
)
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
        "router": _router(manifest.router, experts),
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
    for name in ("number", "percent", "ratio", "size", "figure"):
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


def _router(router: Mapping[str, Any] | None, experts: Sequence[str]) -> dict[str, Any] | None:
    """What was measured of a router, whatever its kind: the confusion matrix, single figures by dotted key, tables."""
    if router is None:
        return None
    counts, named = _square(router.get("confusion")), router.get("experts")
    names = [str(name) for name in named] if isinstance(named, list | tuple) else list(experts)
    told = {"kind", "experts"} | ({"confusion"} if counts else set())
    found = list(_flat({key: value for key, value in router.items() if key not in told}))
    return {
        "kind": router.get("kind"),
        "confusion": _confusion(counts, names) if counts else None,
        "figures": {key: value for key, value in found if not _is_table(value)},
        "tables": [_table(key, value) for key, value in found if _is_table(value)],
    }


def _square(value: Any) -> list[list[float]] | None:
    """A square matrix of numbers, if it is one."""
    if not isinstance(value, list | tuple) or not all(
        isinstance(row, list | tuple) and len(row) == len(value) for row in value
    ):
        return None
    return [list(row) for row in value] if all(isinstance(count, int | float) for row in value for count in row) else None


def _confusion(counts: Sequence[Sequence[float]], names: Sequence[str]) -> dict[str, Any]:
    """Rows: the query's expert; columns: the one chosen. With each expert's recall and precision."""
    fits = len(names) == len(counts)
    places = range(len(counts))
    asked = [sum(row) for row in counts]
    chosen = [sum(row[place] for row in counts) for place in places]
    return {
        "experts": list(names) if fits else [f"expert {place + 1}" for place in places],
        "counts": [list(row) for row in counts],
        "recall": [counts[n][n] / asked[n] if asked[n] else None for n in places],
        "precision": [counts[n][n] / chosen[n] if chosen[n] else None for n in places],
    }


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Single figures, short lists and tables of a nested record, by their dotted keys, in order of name."""
    if isinstance(value, Mapping):
        for name, held in sorted(value.items(), key=lambda item: natural_order(str(item[0]))):
            yield from _flat(held, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple) and not _is_table(value):
        yield key, [item if isinstance(item, str | int | float | None) else str(item) for item in value]
    else:
        yield key, value


def _is_table(value: Any) -> bool:
    """Whether a value is a list of records or of lists."""
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(row, Mapping | list | tuple) for row in value)


def _table(key: str, rows: Sequence[Any]) -> dict[str, Any]:
    """A list of records or of lists as columns and rows."""
    records = [
        dict(_flat(row)) if isinstance(row, Mapping) else {str(n): cell for n, cell in enumerate(row, 1)} for row in rows
    ]
    columns = list(dict.fromkeys(column for record in records for column in record))
    return {"name": key, "columns": columns, "rows": [[_cell(record.get(column)) for column in columns] for record in records]}


def _cell(value: Any) -> Any:
    return value if isinstance(value, str | int | float | None) else str(value)


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
