"""The router's section of the report: what this release measures, and what anybody else may have written."""

from __future__ import annotations

import json
from typing import Any

import pytest

from serving.report import analysis, report_html
from serving.report_words import is_share, microseconds
from storage.manifest import Manifest
from tests.support.manifests import drawn
from tests.support.pages import checked

ROUTER: dict[str, Any] = {
    "kind": "linear", "experts": ["code", "math"], "queries": 1200, "accuracy": 0.975, "macro_f1": 0.9625,
    "confusion": [[590, 10], [20, 580]], "calibration_error": {"before": 0.0812, "after": 0.0123}, "temperature": 1.75,
    "thresholds": {"code": 0.6, "math": 0.7}, "fallback": "base", "auroc": 0.9321, "outside_queries": 300, "bytes": 1_500_000,
    "at_thresholds": {"coverage": 0.95, "accuracy": 0.99, "outside": 0.125},
    "coverage": [
        {"threshold": 0.0, "coverage": 1.0, "accuracy": 0.975}, {"threshold": 0.99, "coverage": 0.0, "accuracy": None},
    ],
    "by_language": {
        "zh": {"queries": 200, "accuracy": 0.9, "macro_f1": 0.5}, "": {"queries": 1000, "accuracy": 0.99, "macro_f1": None},
    },
    "latency": {"queries": 500, "p50_us": 64.4, "p99_us": 1234.5, "one_at_a_time_per_s": 15000.0, "batch_per_s": 81234.5},
    "seconds": {"prepare": 1.5, "train": 20.25, "measure": 3.0},
    "sources": {
        "math": [{"source": "org/math", "commit": "c0ffee", "rows": 900, "unreadable": 2, "distinct": 800}],
        "code": [{"sha256": "ab12", "rows": 500, "distinct": 500}, {"sha256": "cd34", "rows": 100, "distinct": 90}],
    },
    "outside": [{"sha256": "ef56", "rows": 300, "distinct": 300}],
    "counts": {"code": {"train": 500, "validation": 90}, "math": {"train": 680, "validation": 120}},
}  # fmt: skip


def page_of(router: dict[str, Any]) -> tuple[Manifest, Any]:
    case = drawn(1, ("code", "math")).manifest.model_copy(update={"router": router})
    json.dumps(analysis(case), allow_nan=False)
    return case, checked(report_html(case))


def tables(page: Any) -> dict[tuple[str, ...], list[list[str]]]:
    """Tables without their headings, by their first two."""
    return {tuple(table["rows"][0][:2]): [list(row) for row in table["rows"][1:]] for table in page.tables}


def test_what_is_measured_is_said_in_words() -> None:
    case, page = page_of(ROUTER)
    summary = {tile["name"]: (tile["value"], tile["of"]) for tile in analysis(case)["router"]["summary"]}
    assert summary == {
        "Right": ("97.5 %", "of 1,200 held-out queries"),
        "Macro F1": ("96.2 %", "every expert counts the same"),
        "Calibration error": ("0.0123", "0.0812 before; temperature 1.75"),
        "Knows its own (AUROC)": ("0.9321", "against 300 queries of no expert's kind"),
        "Trusted": ("95.0 %", "of queries to experts, 99.0 % of them right; the rest to base"),
        "Time per query": ("64.4 µs", "median; 99 % within 1.23 ms; 81,234 a second in batches"),
    }
    for name, (value, of) in summary.items():
        assert all(words in page.text for words in (name, value, of))


def test_tables_of_the_router() -> None:
    found = tables(page_of(ROUTER)[1])
    assert found["threshold", "coverage"] == [["0", "100 %", "97.5 %"], ["0.99", "0 %", "–"]]
    assert found["language", "queries"] == [["unknown", "1,000", "99.0 %", "–"], ["zh", "200", "90.0 %", "50.0 %"]]
    sources = found["expert", "source"]
    assert [row[:3] for row in sources] == [
        ["code", "sha256 ab12", "500"],
        ["code", "sha256 cd34", "100"],
        ["math", "commit c0ffee, source org/math", "900"],
        ["outside", "sha256 ef56", "300"],
    ]
    assert sources[2][3:] == ["2", "–", "–", "–", "800", "680", "120"]
    figures = {row[0]: row[1] for row in found["figure", "value"]}
    assert figures["thresholds.math"] == "0.7"
    assert figures["fallback"] == "base"
    assert not {key for key in figures if key.startswith(("coverage", "by_language", "sources", "counts", "confusion"))}


def test_shares_in_tables_are_coloured() -> None:
    page = report_html(page_of(ROUTER)[0])
    section = page[page.index('<h2 id="router">') : page.index('<h2 id="run">')]
    assert '<td class=h style="--v:0.90">90.0 %</td>' in section
    assert '<td class=h style="--v:1.00">100 %</td>' in section


STRANGE: list[dict[str, Any]] = [
    {"coverage": [{"threshold": "x"}], "by_language": {"de": {"queries": "many"}}, "sources": {"a": [{"rows": "x"}]}},
    {"coverage": [[0.5, 1.0]], "by_language": {"de": 3}, "sources": {"a": "b"}, "counts": 4},
    {"coverage": [], "by_language": [], "sources": [], "counts": {}, "outside": []},
    {"coverage": [{"threshold": 0.5}, 3], "by_language": {"de": {}}, "sources": {"a": [None]}, "outside": "x"},
    {"sources": {"a": [{"rows": 1}]}, "counts": {"a": "b"}, "outside": 3},
    {"accuracy": "x", "queries": [], "auroc": {}, "latency": 3, "calibration_error": {"before": None, "after": "y"}},
    {"at_thresholds": {"coverage": True, "accuracy": 0.5}, "latency": {"p50_us": None, "p99_us": 1}, "temperature": "hot"},
]


@pytest.mark.parametrize("router", STRANGE)
def test_records_of_other_shapes_are_shown_as_they_are(router: dict[str, Any]) -> None:
    case, page = page_of(router)
    found = analysis(case)["router"]
    assert found["summary"] == []
    assert not {table["name"] for table in found["tables"]} & {"coverage by threshold", "by language"}
    for value in ("x", "many", "hot", "y"):
        assert (f'"{value}"' in json.dumps(router)) <= (value in page.text)


def test_times_have_the_largest_unit() -> None:
    assert [microseconds(value) for value in (0.5, 64.44, 999, 1000, 1_234_567)] == [
        "0.5 µs",
        "64.4 µs",
        "999 µs",
        "1 ms",
        "1.23 s",
    ]


def test_what_is_a_share() -> None:
    assert is_share("by.accuracy", 0.5)
    assert is_share("coverage", 1)
    assert not is_share("coverage", True)
    assert not is_share("queries", 0.5)
    assert not is_share("accuracy", 1.5)
