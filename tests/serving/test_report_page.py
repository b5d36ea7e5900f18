from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from serving.report import PAIRS_SHOWN, analysis, report_html
from serving.report_words import merge_words, number, percent, size
from storage.manifest import Manifest
from tests.support.manifests import Drawn, drawn, large
from tests.support.pages import checked

HOSTILE = ("<script>alert(1)</script>", "\"onmouseover='x' y=\"", "&lt;b&gt;", "{{ 7*7 }}", "a</style><b>", "x" * 200, "数学—ß")


def hostile_manifest() -> Manifest:
    case: Drawn = drawn(3, HOSTILE)
    tensors = {f"{HOSTILE[0]}.{name}": record for name, record in case.manifest.tensors.items()}
    spoilt = {
        key: case.manifest.experts[key].model_copy(update={"source": key, "id": key, "files": {key: key}}) for key in HOSTILE
    }
    confusion = [[int(a == b) for b in HOSTILE] for a in HOSTILE]
    return case.manifest.model_copy(
        update={
            "name": HOSTILE[0], "version": HOSTILE[1], "created": HOSTILE[0], "tensors": tensors, "experts": spoilt,
            "notes": HOSTILE, "packages": {HOSTILE[0]: HOSTILE[1]}, "seconds": {HOSTILE[0]: 1.0}, "moved": {HOSTILE[1]: 2},
            "recipe": {HOSTILE[0]: HOSTILE[1], "merge": {"method": HOSTILE[0], "groups": 2, "clustering": HOSTILE[1]}},
            "base": {"source": HOSTILE[0], "id": HOSTILE[1], "files": {HOSTILE[0]: HOSTILE[0]}}, "kernel": HOSTILE[0],
            "router": {"kind": HOSTILE[0], "confusion": confusion, HOSTILE[1]: {HOSTILE[0]: [{HOSTILE[0]: HOSTILE[0]}]}},
        }
    )  # fmt: skip


def test_hostile_names_are_text() -> None:
    found = hostile_manifest()
    page = checked(report_html(found))  # its parser finds no script, no handler, no attribute twice
    assert "b" not in {tag for tag, _ in page.tags}
    for name in HOSTILE:
        assert name in page.text, name
    assert "49" not in "".join(row[0] for table in page.tables for row in table["rows"])
    labels = [attributes["aria-label"] for _, attributes in page.tags if "aria-label" in attributes]
    assert f"Files of {HOSTILE[1]}" in labels


ROUTERS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "nothing": ({}, {}),
    "kind alone": ({"kind": "bert"}, {}),
    "single figures": (
        {"kind": "linear", "accuracy": 0.9871, "macro_f1": 0.5, "queries": 12345, "ambiguous": 0, "calibrated": True},
        {"accuracy": "98.7 %", "macro_f1": "50.0 %", "queries": "12,345", "ambiguous": "0", "calibrated": "yes"},
    ),
    "nested": (
        {"calibration": {"temperature": 1.23456, "ece": {"before": 0.1, "after": None}}, "coverage": 0.75, "steps": [1, 2]},
        {
            "calibration.temperature": "1.235", "calibration.ece.before": "0.1", "calibration.ece.after": "–",
            "coverage": "75.0 %", "steps": "1, 2",
        },
    ),
    "damaged confusion": ({"confusion": [[1, 2], [3]], "accuracy": None}, {"accuracy": "–"}),
    "no numbers": ({"confusion": "none", "accuracy": "unknown"}, {"confusion": "none", "accuracy": "unknown"}),
    "others' names": ({"experts": ["x", "y"], "confusion": [[3, 1], [0, 0]]}, {}),
    "too few names": ({"confusion": [[3, 1, 0], [0, 0, 2], [1, 1, 1]]}, {}),
    "empty": ({"confusion": [], "curve": [], "by_expert": {}}, {"confusion": "–", "curve": "–"}),
}  # fmt: skip


@pytest.mark.parametrize(("router", "expected"), ROUTERS.values(), ids=ROUTERS)
def test_routers_of_any_kind_are_shown(router: dict[str, Any], expected: Mapping[str, str]) -> None:
    case = drawn(1, ("code", "math")).manifest.model_copy(update={"router": router})
    page = checked(report_html(case))
    rows = {row[0]: row[1] for table in page.tables if table["rows"][0] == ["figure", "value"] for row in table["rows"][1:]}
    assert rows == dict(expected)
    json.dumps(analysis(case), allow_nan=False)


def test_confusion_and_tables_of_a_router() -> None:
    router = {
        "confusion": [[8, 2], [1, 0]],
        "thresholds": [{"threshold": 0.5, "coverage": 0.9}, {"threshold": 0.7, "accuracy": 1.0}],
        "pairs": [[1, 2], [3, 4]],
    }
    found = analysis(drawn(1, ("code", "math")).manifest.model_copy(update={"router": router}))["router"]
    assert found["confusion"] == {
        "experts": ["code", "math"], "counts": [[8, 2], [1, 0]], "recall": [0.8, 0.0], "precision": [8 / 9, 0.0],
    }  # fmt: skip
    assert found["tables"] == [
        {"name": "pairs", "columns": ["1", "2"], "rows": [[1, 2], [3, 4]]},
        {"name": "thresholds", "columns": ["coverage", "threshold", "accuracy"], "rows": [[0.9, 0.5, None], [None, 0.7, 1.0]]},
    ]


def test_a_7b_model_of_four_experts_is_a_small_page() -> None:
    case = large(("chinese", "code", "instruct", "math"), 32)
    assert len(case.tensors) == 291
    page = report_html(case)
    assert len(page.encode()) < 120_000
    assert analysis(case)["coverage"]["problems"] == []
    for name in case.experts:
        assert name in checked(page).text


def test_many_experts_have_all_their_pairs_in_the_data_and_some_on_the_page() -> None:
    case = large([f"expert-{n}" for n in range(12)], 80)
    found, page = analysis(case), report_html(case)
    assert [len(layer["shares"]) for layer in found["alike"]["layers"]] == [66] * 80
    assert f"Of 66 pairs the {PAIRS_SHOWN} that share most are shown" in page
    assert len(page.encode()) < 600_000
    (table,) = [t for t in checked(page).tables if t["rows"][0][0] == "layer" and len(t["rows"][0]) == PAIRS_SHOWN + 1]
    assert len(table["rows"]) == 81


CHANNELS, KEEP = {"granularity": "channel"}, {"singleton": "keep"}
K2, K4, AUTO = {"groups": 2}, {"groups": 4}, {"groups": "auto"}
EXCEPTIONS = [{"match": "*.up.*", "groups": 2}, {"match": "x", "policy": "base"}]
WORDS: list[tuple[dict[str, Any], str, str]] = [
    (K2 | CHANNELS | KEEP, "For every output channel the 4 experts are put into 2 groups", "1 /"),
    (K2 | {"granularity": "layer"}, "For every weight matrix the 4 experts are put into 2 groups", "channel the"),
    (K2 | {"granularity": "model"}, "Once for the whole model the 4 experts are put into 2 groups", "For every"),
    (K2 | KEEP, "An expert alone in its group keeps its exact row", "scaled"),
    (K2 | {"singleton": "scale"}, "is pruned and scaled like any group", "exact"),
    (K4 | KEEP | {"method": "dare", "density": 0.7}, "nothing is merged", "DARE"),
    ({"groups": 1, "method": "ties", "density": 0.2} | KEEP, "the largest 20 % of its entries", "alone"),
    ({"groups": 1, "method": "dare", "density": 1.0}, "DARE: deltas are whole", "rescaled"),
    (K2 | {"method": "dare", "density": 0.7, "rescale": "l1"}, "70 % of its entries, drawn at random", "1 / density"),
    (AUTO | {"budget": 0.55}, "until merged tensors hold 55 % of all experts' entries", "knee"),
    (AUTO | {"budget": None}, "up to the knee", "hold"),
    ({"groups": 1, "method": "byom", "keep": 0.3, "residual": "delta"}, "keeps 30 % of its entries, the largest", "furthest"),
    ({"groups": 3, "method": "slerp", "t": 0.25, "scaling": "mean"}, "at t = 0.25", "averaged"),
    (K2 | {"method": "task_arithmetic", "scaling": 0.5}, "The weighted sum of a group's deltas", "averaged"),
    (K2 | {"method": "ties", "scaling": 0.5, "combine": "mean"}, "The weighted mean of a group's deltas", "sum"),
    (K2 | {"method": "ties", "scaling": "mean"}, "A group's deltas are averaged", "λ"),
    (K2 | {"clustering": "sign", "sign": "mass"}, "the two signs", "k-means"),
    (K2 | {"clustering": "kmeans", "metric": "manhattan"}, "k-medoids, Manhattan", "k-means"),
    (K2 | {"clustering": "random", "seed": 7}, "with seed 7", "nearest"),
    (K4 | {"rules": EXCEPTIONS}, "*.up.*: 2 groups; x: policy base", "put into"),
    (K4 | {"method": "dare", "density": 0.7, "rules": EXCEPTIONS}, "DARE", "put into"),
    ({}, "", " "),
]


@pytest.mark.parametrize(("merge", "said", "unsaid"), WORDS)
def test_the_merge_section_in_words(merge: dict[str, Any], said: str, unsaid: str) -> None:
    told = " ".join(merge_words(merge, 4))
    assert said in told
    assert unsaid not in told


def test_numbers_are_not_written_as_what_they_are_not() -> None:
    assert [percent(value) for value in (0, 1, 0.00001, 0.99999, 0.5, 1.25, None)] == [
        "0 %", "100 %", "< 0.1 %", "> 99.9 %", "50.0 %", "125.0 %", "–",
    ]  # fmt: skip
    assert [number(value) for value in (None, True, 1234567, 0.123456, "x")] == ["–", "yes", "1,234,567", "0.1235", "x"]
    assert [size(value) for value in (None, 0, 1, 2048, 3 * 2**30)] == ["–", "0 bytes", "1 byte", "2.00 KiB", "3.00 GiB"]


def luminance(colour: Sequence[float]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (part / 255 for part in colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: Sequence[float], other: Sequence[float]) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_text_is_readable_in_both_modes() -> None:
    """WCAG 2 AA: 4.5 to 1 for text on every background that it stands on, cells of the strongest colour included."""
    html = report_html(drawn(1, ("code", "math")).manifest)
    modes = [
        {name: [int(value[n : n + 2], 16) for n in (0, 2, 4)] for name, value in re.findall(r"--(\w+):#(\w{6})", block)}
        for block in re.findall(r":root\{([^}]*)\}", html)
    ]
    mixed = re.search(r"color-mix\(in srgb,var\(--heat\) calc\(var\(--v\)\*(\d+)%\),var\(--bg\)\)", html)
    assert mixed is not None
    assert len(modes) == 2
    part = int(mixed[1]) / 100
    for colours in modes:
        strongest = [part * heat + (1 - part) * ground for heat, ground in zip(colours["heat"], colours["bg"], strict=True)]
        for text, ground in itertools.product(("fg", "muted", "bad", "link"), ("bg", "soft")):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
        assert contrast(colours["fg"], strongest) >= 4.5
