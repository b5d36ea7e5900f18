"""The router's part of the report: figures of any router, and those that this release measures said in words. Pure.

A manifest may be of another release, or of nobody's: whatever is not of the expected shape is shown as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from serving import report_words as words
from serving.report_figures import natural_order

CURVE = ("threshold", "coverage", "accuracy")
LANGUAGE = ("queries", "accuracy", "macro_f1")
SOURCE = ("rows", "unreadable", "cut", "repeated", "shared", "distinct")
PARTS = ("train", "validation")
OF_TABLES: Mapping[str, Sequence[str]] = {
    "coverage by threshold": ("coverage",),
    "by language": ("by_language",),
    "sources": ("sources", "outside", "counts"),
}
"""The record's keys that a table tells."""


def router_figures(router: Mapping[str, Any] | None, experts: Sequence[str]) -> dict[str, Any] | None:
    """What was measured of a router, whatever its kind: the confusion matrix, single figures by dotted key, tables.

    ``summary`` says the figures that this release measures in words; tables of them come first.
    """
    if router is None:
        return None
    counts, named = _square(router.get("confusion")), router.get("experts")
    names = [str(name) for name in named] if isinstance(named, list | tuple) else list(experts)
    own = [_coverage(router.get("coverage")), _languages(router.get("by_language")), _sources(router)]
    known = [table for table in own if table is not None]
    told = {"kind", "experts", *(key for table in known for key in OF_TABLES[table["name"]])}
    told |= {"confusion"} if counts else set()
    found = list(_flat({key: value for key, value in router.items() if key not in told}))
    return {
        "kind": router.get("kind"),
        "summary": list(_summary(router)),
        "confusion": _confusion(counts, names) if counts else None,
        "figures": {key: value for key, value in found if not _is_table(value)},
        "tables": [*known, *(_table(key, value) for key, value in found if _is_table(value))],
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


def _numbers(value: Any, keys: Sequence[str]) -> list[Any] | None:
    """The figures of a record under these keys, None for missing ones; None when it is no such record."""
    if not isinstance(value, Mapping) or not any(key in value for key in keys):
        return None
    found = [value.get(key) for key in keys]
    return found if all(one is None or isinstance(one, int | float) for one in found) else None


def _coverage(curve: Any) -> dict[str, Any] | None:
    """How many queries reach a threshold, and how many of these are right."""
    if not isinstance(curve, list | tuple) or not curve:
        return None
    rows = [_numbers(point, CURVE) for point in curve]
    return None if None in rows else {"name": "coverage by threshold", "columns": [*CURVE], "rows": rows}


def _languages(languages: Any) -> dict[str, Any] | None:
    if not isinstance(languages, Mapping) or not languages:
        return None
    found = {str(name): _numbers(record, LANGUAGE) for name, record in languages.items()}
    if None in found.values():
        return None
    rows = [[name or "unknown", *(record or ())] for name, record in sorted(found.items())]
    return {"name": "by language", "columns": ["language", *LANGUAGE], "rows": rows}


def _sources(router: Mapping[str, Any]) -> dict[str, Any] | None:
    """Every source of every expert, what became of its rows, and how many queries the expert came to."""
    sources, counts, outside = (router.get(key) for key in ("sources", "counts", "outside"))
    if not isinstance(sources, Mapping) or not sources:
        return None
    rows = []
    for expert, records in [*sorted(sources.items(), key=lambda item: str(item[0])), ("outside", outside or [])]:
        if not isinstance(records, list | tuple):
            return None
        used = _numbers(counts.get(expert), PARTS) if isinstance(counts, Mapping) else None
        for record in records:
            numbers = _numbers(record, SOURCE)
            if numbers is None:
                return None
            rows.append([str(expert), _origin(record), *numbers, *(used or [None] * len(PARTS))])
    return {"name": "sources", "columns": ["expert", "source", *SOURCE, *PARTS], "rows": rows}


def _origin(record: Mapping[str, Any]) -> str:
    """What a source's record says besides numbers: its place or digest, column, language."""
    told = [f"{key} {value}" for key, value in sorted(record.items()) if isinstance(value, str)]
    return ", ".join(told) or "–"


def _number(record: Any, *path: str) -> float | None:
    """A figure of a nested record, if there is one."""
    for key in path:
        record = record.get(key) if isinstance(record, Mapping) else None
    return record if isinstance(record, int | float) and not isinstance(record, bool) else None


def _summary(router: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """The figures one looks for first: what each is, its value, and what it was measured on."""
    accuracy, queries = _number(router, "accuracy"), _number(router, "queries")
    if accuracy is not None and queries is not None:
        yield {
            "name": "Right",
            "value": words.figure("accuracy", accuracy),
            "of": f"of {words.number(queries)} held-out queries",
        }
    if (f1 := _number(router, "macro_f1")) is not None:
        yield {"name": "Macro F1", "value": words.figure("macro_f1", f1), "of": "every expert counts the same"}
    before, after = (_number(router, "calibration_error", when) for when in ("before", "after"))
    if before is not None and after is not None:
        temperature = _number(router, "temperature")
        by = "" if temperature is None else f"; temperature {words.number(temperature)}"
        yield {"name": "Calibration error", "value": words.number(after), "of": f"{words.number(before)} before{by}"}
    if (auroc := _number(router, "auroc")) is not None:
        beyond = words.number(_number(router, "outside_queries"))
        yield {
            "name": "Knows its own (AUROC)",
            "value": words.number(auroc),
            "of": f"against {beyond} queries of no expert's kind",
        }
    trusted, own = (_number(router, "at_thresholds", key) for key in ("coverage", "accuracy"))
    if trusted is not None and own is not None:
        of = f"of queries to experts, {words.percent(own)} of them right; the rest to {words.number(router.get('fallback'))}"
        yield {"name": "Trusted", "value": words.percent(trusted), "of": of}
    p50, p99 = (_number(router, "latency", key) for key in ("p50_us", "p99_us"))
    if p50 is not None and p99 is not None:
        of = f"median; 99 % within {words.microseconds(p99)}"
        if (rate := _number(router, "latency", "batch_per_s")) is not None:
            of += f"; {rate:,.0f} a second in batches"
        yield {"name": "Time per query", "value": words.microseconds(p50), "of": of}
