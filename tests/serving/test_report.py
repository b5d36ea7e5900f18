from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from pipeline import roles
from serving.report import analysis, report_html
from serving.report_figures import layer_of, natural_order
from storage.artifact import Artifact
from storage.layout import CARD, REPORT, as_rows
from storage.manifest import FileRecord, Manifest
from storage.pull import pull
from tests.support.manifests import NO_DIGEST, drawn, expert, manifest, tensor
from tests.support.pages import checked
from tests.support.running import merged
from tests.support.small_artifacts import write_files
from tests.support.tiny_experts import NAMES, Family

NAMES_OF_EXPERTS = ("chinese", "code", "instruct", "math", "prose", "law")


def reference(tensors: Sequence[Sequence[Sequence[tuple[str, ...]]]], experts: Sequence[str]) -> dict[str, Any]:
    """Channel by channel: shares of pairs, sizes of groups, counts."""
    channels = [channel for held in tensors for channel in held]
    has = [{name for users in channel for name in users} for channel in channels]
    pairs = {}
    for a, b in itertools.product(experts, repeat=2):
        both = [channel for channel, names in zip(channels, has, strict=True) if {a, b} <= names]
        equal = sum(any(a in users and b in users for users in channel) for channel in both)
        pairs[a, b] = equal / len(both) if both else None
    sizes = Counter(len(users) for channel in channels for users in channel for _ in users)
    return {
        "pairs": pairs,
        "channels": len(channels),
        "pool_rows": sum(len(channel) for channel in channels),
        "expert_rows": sum(len(names) for names in has),
        "sizes": [sizes[n] / sizes.total() if sizes else None for n in range(1, len(experts) + 1)],
        "sizes_of": {
            name: Counter(len(users) for channel in channels for users in channel if name in users) for name in experts
        },
    }  # fmt: skip


@given(st.integers(0, 2**32), st.integers(2, 6), st.integers(0, 3))
def test_figures_are_those_of_the_channels(seed: int, count: int, layers: int) -> None:
    case = drawn(seed, NAMES_OF_EXPERTS[:count], layers)
    found, experts = analysis(case.manifest), sorted(case.manifest.experts)
    whole = reference([case.channels[n] for n, t in case.manifest.tensors.items() if t.policy == "merge"], experts)
    for (i, a), (j, b) in itertools.product(enumerate(experts), repeat=2):
        assert found["alike"]["matrix"][i][j] == whole["pairs"][a, b]
    grouped = found["grouped"]
    assert [grouped[key] for key in ("channels", "pool_rows", "expert_rows")] == [
        whole[key] for key in ("channels", "pool_rows", "expert_rows")
    ]
    assert grouped["group_sizes"] == pytest.approx(whole["sizes"])
    for name, shares in grouped["group_sizes_of"].items():
        counted = whole["sizes_of"][name]
        assert shares == pytest.approx([counted[n] / counted.total() for n in range(1, count + 1)])
    assert [layer["layer"] for layer in found["layers"]] == [*(f"model.layers.{9 + n}" for n in range(layers)), "proj.weight"]
    for layer, row in zip(found["layers"], found["alike"]["layers"], strict=True):
        assert row["layer"] == layer["layer"]
        own = [channels for name, channels in case.channels.items() if f"{name}.".startswith(f"{layer['layer']}.")]
        expected = reference(own, experts)
        assert row["shares"] == [expected["pairs"][pair] for pair in itertools.combinations(experts, 2)]
        assert [layer["tensors"], layer["channels"], layer["pool_rows"], layer["expert_rows"]] == [
            len(own), expected["channels"], expected["pool_rows"], expected["expert_rows"],
        ]  # fmt: skip
        assert layer["groups_per_channel"] == expected["pool_rows"] / expected["channels"]
        assert layer["group_sizes"] == pytest.approx(expected["sizes"])
        assert layer["delta_ratio"] == {n: e.health.layers[layer["layer"]] for n, e in case.manifest.experts.items()}


@given(st.integers(0, 2**32), st.integers(1, 6))
def test_every_row_and_entry_is_counted_once(seed: int, count: int) -> None:
    case = drawn(seed, NAMES_OF_EXPERTS[:count])
    found = analysis(case.manifest)
    assert found["coverage"]["problems"] == []
    tensors = case.manifest.tensors
    for policy in ("merge", "private"):
        (row,) = [row for row in found["policies"] if row["policy"] == policy]
        own = [record for record in tensors.values() if record.policy == policy]
        entries = sum(record.rows * record.shape[1] for record in own)
        assert [row["tensors"], row["rows"]] == [len(own), sum(record.rows for record in own)]
        assert [row["parameters"], row["bytes"]] == [entries, 2 * entries]
        assert row["groups"] == (2 if policy == "merge" else None)
    for key in ("tensors", "rows", "parameters"):
        total = sum(row[key] for row in found["policies"])
        assert total == sum(row[key] for row in found["names"]) == found["coverage"][key]
    assert found["coverage"]["parameters"] == case.manifest.parameters.pool
    for row in found["experts"]:
        users = [
            (record.shape[1], users)
            for name, record in tensors.items()
            for channel in case.channels[name]
            for users in channel
            if row["name"] in users
        ]
        assert row["pool_entries"]["used"] == sum(width for width, _ in users)
        assert row["pool_entries"]["alone"] == sum(width for width, users in users if len(users) == 1)


def indices(artifact: Artifact, folder: str) -> dict[str, dict[str, Any]]:
    return {name: load_file(f"{folder}/experts/{name}/rows.safetensors") for name in artifact.manifest.experts}


CHANGES: dict[str, dict[str, Any]] = {
    "two groups": {},
    "auto": {"merge.groups": "auto", "merge.budget": 0.6},
    "per matrix": {"merge.granularity": "layer"},
    "whole model": {"merge.granularity": "model", "merge.clustering": "random"},
    "byom": {"merge.method": "byom", "merge.groups": 1},
    "rules": {
        "merge.rules": [
            {"match": "*embed_tokens*", "policy": "merge"},
            {"match": "model.layers.1.*", "policy": "private"},
            {"match": "*.o_proj.*", "policy": "base"},
            {"match": "*.up_proj.*", "groups": 3},
        ]
    },
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_figures_are_those_of_the_row_indices(family: Family, changes: dict[str, Any]) -> None:
    """The experts' own index files, and nothing of the manifest's spans."""
    outcome = merged(family.recipe(**changes))
    artifact = Artifact(outcome.path)
    rows, found = indices(artifact, str(outcome.path)), analysis(artifact.manifest)
    assert found["coverage"]["problems"] == []
    own = [name for name, record in artifact.manifest.tensors.items() if record.policy == "merge"]
    by_layer: dict[str, list[str]] = {}
    for name in own:
        by_layer.setdefault(roles.layer_of(name), []).append(name)
    assert [layer["layer"] for layer in found["layers"]] == sorted(by_layer, key=roles.natural_order)

    def share(tensors: Sequence[str], a: str, b: str) -> float:
        pairs = [
            (int(x), int(y)) for name in tensors for x, y in zip(rows[a][name], rows[b][name], strict=False)
        ]  # fmt: skip
        return sum(x == y for x, y in pairs) / len(pairs)

    experts = found["alike"]["experts"]
    assert experts == sorted(NAMES)
    for (i, a), (j, b) in itertools.product(enumerate(experts), repeat=2):
        assert found["alike"]["matrix"][i][j] == share(own, a, b)
    for layer in found["alike"]["layers"]:
        expected = [share(by_layer[layer["layer"]], a, b) for a, b in found["alike"]["pairs"]]
        assert layer["shares"] == expected
    for layer in found["layers"]:
        used = [(name, int(row)) for name in by_layer[layer["layer"]] for e in experts for row in rows[e][name]]
        assert (layer["expert_rows"], layer["pool_rows"]) == (len(used), len(set(used)))
        sizes = Counter(Counter(used)[row] for row in used)
        assert layer["group_sizes"] == pytest.approx([sizes[n] / len(used) for n in range(1, 5)])
    checked(report_html(artifact.manifest))


@pytest.fixture(scope="module")
def artifacts(tiny_mistral: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Artifact]:
    """The trained family at every K."""
    folder = tmp_path_factory.mktemp("report")
    fixed = {"deltas": str(folder / "deltas"), "cluster": {"kind": "none"}}
    return {
        groups: Artifact(
            merged(
                tiny_mistral / "recipe.yaml",
                {**fixed, "output": str(folder / f"out{groups}"), "merge.groups": groups}
                | ({} if groups == 2 else {"router.kind": "none", "router.queries": {}}),
            ).path
        )
        for groups in (1, 2, 3, 4)
    }


@pytest.mark.parametrize(("groups", "least", "most"), [(1, 6.0, 6.0), (2, 2.0, 3.0), (3, 1.0, 1.0), (4, 0.0, 0.0)])
def test_pairs_of_four_experts_add_up(artifacts: dict[int, Artifact], groups: int, least: float, most: float) -> None:
    """Of four experts in K groups: all pairs, two or three, one, none in every channel; whole and in every layer."""
    found = analysis(artifacts[groups].manifest)
    matrix = found["alike"]["matrix"]
    assert [matrix[n][n] for n in range(4)] == [1.0] * 4
    assert matrix == [list(column) for column in zip(*matrix, strict=True)]
    above = [matrix[a][b] for a, b in itertools.combinations(range(4), 2)]
    for shares in (above, *(layer["shares"] for layer in found["alike"]["layers"])):
        assert least - 1e-9 <= sum(shares) <= most + 1e-9
    assert {layer["groups_per_channel"] for layer in found["layers"]} == {float(groups)}
    assert {layer["kept"] for layer in found["layers"]} == {groups / 4}


def test_a_run_is_told_whole(artifacts: dict[int, Artifact]) -> None:
    """What a reader looks for stands on the page of a real artifact."""
    artifact = artifacts[2]
    page = checked(report_html(artifact.manifest))
    numbers = artifact.manifest.parameters
    for text in (
        "tiny-mistral", artifact.manifest.version, artifact.manifest.created, f"{numbers.pool:,}", f"{numbers.experts:,}",
        "put into 2 groups", "DARE: of every delta 70 %", "density: 0.7", "method: dare", *artifact.manifest.notes,
        *(digest for record in artifact.manifest.experts.values() for digest in record.files.values()),
    ):  # fmt: skip
        assert text in page.text, text
    for record in artifact.manifest.experts.values():
        assert record.source in page.text
        assert f"{record.reconstruction_error:.4f}" in page.text
    confusion = [table["rows"] for table in page.tables if table["rows"][0][0] == "query of"]
    assert artifact.manifest.router is not None
    expected = [[str(count) for count in row] for row in artifact.manifest.router["confusion"]]
    assert [row[1:5] for row in confusion[0][1:5]] == expected
    assert confusion[0][0][1:5] == [row[0] for row in confusion[0][1:5]] == sorted(artifact.manifest.experts)


def test_the_page_is_a_function_of_the_manifest_alone(artifacts: dict[int, Artifact]) -> None:
    """As it was written beside the version, so it is made again: card, report and the order of keys do not count."""
    found = artifacts[2].manifest
    before = found.model_copy(update={"files": {n: r for n, r in reversed(found.files.items()) if n not in (CARD, REPORT)}})
    before = before.model_copy(update={"experts": dict(reversed(before.experts.items()))})
    before = before.model_copy(
        update={"recipe": dict(reversed(before.recipe.items())), "seconds": dict(reversed(found.seconds.items()))}
    )
    again = Manifest.from_bytes(found.to_bytes(), "here")
    assert report_html(before) == report_html(again) == report_html(found)
    assert json.loads(json.dumps(analysis(before), allow_nan=False)) == analysis(again)


def test_a_single_expert_says_whose_it_is(artifacts: dict[int, Artifact], tmp_path: Path) -> None:
    """Pulled alone it knows nothing of its groups, and the page claims nothing."""
    pulled = pull(artifacts[2].place, tmp_path / "math", "math")
    found = analysis(pulled)
    assert found["alike"] is None
    assert found["grouped"] is None
    assert all(layer["groups_per_channel"] is None and layer["group_sizes"] == [] for layer in found["layers"])
    assert found["coverage"]["problems"] == []
    page = checked(report_html(pulled))
    assert f"pulled from version {artifacts[2].manifest.version}" in page.text
    assert "put into 2 groups" in page.text
    assert "A single expert needs none." in page.text
    assert "in pairs" not in page.text


def test_artifacts_without_much_in_their_manifest_have_a_report(tmp_path: Path) -> None:
    small = write_files(tmp_path / "small", residue=True).manifest
    found = analysis(small)
    assert [layer["layer"] for layer in found["layers"]] == ["layers.0", "layers.1", "norm.weight"]
    assert found["coverage"]["problems"] == [
        f"the tensors' rows have {found['coverage']['parameters']:,} entries, and the pool 1"
    ]  # fmt: skip
    page = checked(report_html(small))
    assert "Not everything adds up" in page.text
    bare = small.model_copy(update={"recipe": {}, "tensors": {}, "files": {}, "router": {}})
    assert "No tensor was merged" in checked(report_html(bare)).text


@pytest.mark.parametrize(
    ("spans", "problem"),
    [
        ([(("a",), 0, 3), (("b",), 4, 2)], "a gap of spans at row 3"),
        ([(("a",), 0, 3), (("b",), 2, 4)], "an overlap of spans at row 2"),
        ([(("a",), 0, 5)], "its spans end at row 5 of 6"),
        ([((), 0, 6)], "no expert uses its rows from 0 on"),
        ([(("a", "z"), 0, 6)], "rows from 0 on are used by z, unknown to the artifact"),
    ],
)
def test_what_does_not_add_up_is_said(spans: list[tuple[tuple[str, ...], int, int]], problem: str) -> None:
    record = tensor("merge", (6, 2), {("a",): 6}, 2)
    held = [{"experts": users, "start": start, "rows": rows, "sha256": NO_DIGEST} for users, start, rows in spans]
    changed = type(record).model_validate(record.model_dump() | {"spans": held})
    case = manifest({"w": changed}, {name: expert(name, {}) for name in "ab"})
    assert analysis(case)["coverage"]["problems"] == [f"tensor w: {problem}"]
    assert problem in checked(report_html(case)).text


def test_stages_with_and_without_figures() -> None:
    case = drawn(1, ("code", "math")).manifest.model_copy(
        update={"seconds": {"pack": 2.0, "ingest": 1.0, "new": 3.0}, "moved": {"pack read": 5, "ingest written": 6, "odd": 7}}
    )
    assert analysis(case)["stages"] == [
        {"stage": "ingest", "seconds": 1.0, "read": None, "written": 6},
        {"stage": "pack", "seconds": 2.0, "read": 5, "written": None},
        {"stage": "new", "seconds": 3.0, "read": None, "written": None},
        {"stage": "odd", "seconds": None, "read": 7, "written": None},
    ]


def test_bytes_by_what_files_hold() -> None:
    names = {
        "pool-00001-of-00001.safetensors": 1, "pool.safetensors.index.json": 2, "experts/math/rows.safetensors": 4,
        "experts/math/residue.safetensors": 8, "experts/math/config.json": 16, "router/router.json": 32, CARD: 64, REPORT: 128,
    }  # fmt: skip
    files = {name: FileRecord(bytes=count, sha256=NO_DIGEST) for name, count in names.items()}
    found = analysis(drawn(1, ("code", "math")).manifest.model_copy(update={"files": files}))["size"]
    assert found["bytes_of"] == {"pool": 3, "rows": 4, "residue": 8, "router": 32, "beside": 16}
    assert (found["bytes"], found["files"]) == (63, 6)


IN_LAYERS = (
    "model.layers.10.self_attn.q_proj.weight", "model.layers.1.mlp.experts.3.w1.weight", "lm_head.weight", "proj.0.weight",
    "encoder.block.2.layer.1.DenseReluDense.wi.weight", "transformer.h.0.attn.c_attn.weight", "visual.blocks.1.mlp.fc1.weight",
)  # fmt: skip


@pytest.mark.parametrize("name", IN_LAYERS)
def test_layers_are_those_of_the_health(name: str) -> None:
    others = ["model.layers.1.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"]
    known = {roles.layer_of(one) for one in [name, *others]}
    assert layer_of(name, known) == roles.layer_of(name)


@given(st.lists(st.text("ab.0123456789²٣", max_size=12)))
def test_any_names_have_an_order_and_a_layer(names: list[str]) -> None:
    assert sorted(map(natural_order, names)) == sorted(map(natural_order, reversed(names)))
    assert sorted(["l.10.w", "l.9.w"], key=natural_order) == ["l.9.w", "l.10.w"]
    assert all(name.startswith(layer_of(name, ())) for name in names)


def test_widths_follow_the_layout() -> None:
    """Vectors are one row, packed experts many: entries are rows times the width of a row, whatever the shape."""
    shapes = {"norm": (7,), "packed": (2, 3, 5)}
    assert [as_rows(shape, 0) for shape in shapes.values()] == [(1, 7), (2, 15)]
    tensors = {name: tensor("private", shape, {("a",): as_rows(shape, 0)[0]}) for name, shape in shapes.items()}
    found = analysis(manifest(tensors, {"a": expert("a", {})}, {"norm": 7, "packed": 15}))
    assert [row["parameters"] for row in found["names"]] == [7, 30]
    assert found["coverage"]["problems"] == []
