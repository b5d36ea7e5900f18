from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import floor
from benchmarks.pipeline import ratios, report

NUMBERS = 1000
"""Bytes by which a manifest may differ from round to round: it holds the seconds of the stages."""
SCRIPT = [sys.executable, "-m", "benchmarks.pipeline"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The script's own document; with a warm page cache, as a test must not empty that of the whole machine."""
    options = ["--shape", "tiny", "--experts", "3", "--repeat", "2", "--cluster", "none", "--page-cache", "warm", "--json"]
    work = tmp_path_factory.mktemp("pipeline")
    done = subprocess.run([*SCRIPT, *options, "--work", str(work)], capture_output=True, text=True, check=True)
    assert [path.name.partition("-")[0] for path in work.iterdir()] == ["family"]  # all else is removed
    return dict(json.loads(done.stdout))


def test_runs_do_what_they_are_there_for(found: dict[str, Any]) -> None:
    assert {name: [run["new"] for run in runs] for name, runs in found["runs"].items()} == {
        "first": [True, True], "second": [True, True], "again": [False, False],
    }  # fmt: skip
    assert found["groups"] == {"first": 2, "second": 3}
    first, second = found["runs"]["first"][0], found["runs"]["second"][0]
    weights = 2 * found["parameters"]
    assert first["moved"]["ingest read"] == 3 * 2 * weights  # every expert beside the base
    assert second["moved"]["ingest read"] == 0
    assert second["moved"]["merge read"] == 4 * weights
    assert all(run["largest"]["program"] > 20 << 20 for runs in found["runs"].values() for run in runs)
    assert all(run["seconds"] >= run["sync_seconds"] >= 0 for runs in found["runs"].values() for run in runs)


def test_floors_move_what_is_there(found: dict[str, Any]) -> None:
    sizes, weights = found["bytes"], 2 * found["parameters"]
    assert 4 * weights < sizes["checkpoints"] < 4 * weights + 4 * 10_000  # headers and configurations
    for one in found["floors"]["first"]:
        assert one["read_bytes"] == sizes["checkpoints"]
        assert one["written_bytes"] == pytest.approx(sizes["deltas"] + sizes["artifact first"], abs=NUMBERS)
    for one in found["floors"]["second"]:
        assert one["read_bytes"] == sizes["deltas"] + sizes["checkpoints"] // 4
        assert one["written_bytes"] == pytest.approx(sizes["artifact second"], abs=NUMBERS)


def test_ratios_are_of_runs_to_floors_round_by_round(found: dict[str, Any]) -> None:
    for name, told in found["ratios"].items():
        both = zip(found["runs"][name], found["floors"][name], strict=True)
        each = [run["seconds"] / (one["read_seconds"] + one["write_seconds"]) for run, one in both]
        assert told == pytest.approx({"median": statistics.median(each), "min": min(each), "max": max(each)})
    assert ratios([], []) == []


def test_the_report_has_a_line_for_every_run_and_stage(found: dict[str, Any]) -> None:
    text = report(found)
    assert "page cache before both sides warm: all that is read is in it" in text
    for start in ("| first | ", "| second | ", "| again | ", "| first | ingest | ", "| second | merge | "):
        assert start in text


@pytest.mark.parametrize("options", [["--groups", "5"], ["--experts", "1"], ["--repeat", "0"]])
def test_what_cannot_be_measured_is_refused(options: list[str]) -> None:
    done = subprocess.run([*SCRIPT, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "there must be two experts" in done.stderr


@pytest.mark.parametrize(
    ("sizes", "cuts"),
    [
        ([], []),
        ([1], [(0, 1)]),
        ([4, 4, 4], [(0, 2), (2, 3)]),
        ([20, 1, 1], [(0, 1), (1, 3)]),
        ([1, 20, 1], [(0, 1), (1, 2), (2, 3)]),
    ],
)
def test_batches_hold_consecutive_files_up_to_a_limit(sizes: list[int], cuts: list[tuple[int, int]]) -> None:
    assert floor.batches(sizes, 10) == cuts


def test_the_floor_copies_every_byte_and_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cp is given is all there, in its folders, before it is removed."""
    root, seen = tmp_path / "root", {}
    for name, size in {"a/one": 10, "a/b/two": 70, "three with spaces": 5}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name[-1:].encode() * size)
    remove = shutil.rmtree

    def look(target: Path, **options: Any) -> None:
        seen.update({path.relative_to(target).as_posix(): path.read_bytes() for path in floor.files_below(target)})
        remove(target, **options)

    monkeypatch.setattr(shutil, "rmtree", look)
    monkeypatch.setattr(floor, "BATCH_BYTES", 20)
    files = floor.files_below(root)
    assert floor.bytes_of(files) == 85
    assert floor.seconds_to_read(files) > 0
    assert floor.seconds_to_write(root, files, tmp_path / "copies") > 0
    assert seen == {"a/one": b"e" * 10, "a/b/two": b"o" * 70, "three with spaces": b"s" * 5}
    assert not (tmp_path / "copies").exists()
