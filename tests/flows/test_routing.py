"""``channel-merge route``: one query, many of a file, the likeliest, the fallback, and staying with what is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from flows.cli import app
from serving.router import artifact_router
from storage.artifact import Artifact
from storage.digests import digest_of
from storage.errors import ArtifactError, QueryDataError, RecipeError
from storage.manifest import Manifest, version_of
from tests.support.small_artifacts import EXPERTS, recorded, write_version

QUERIES = ["37 plus 45", "", "def f(x): return x", "数学 是 什么", "x" * 9000, "a b c d"]


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return write_version(tmp_path / "output").folder


def configured(folder: Path, **changes: Any) -> Path:
    """The artifact with another router.json."""
    config = folder / "router" / "router.json"
    config.write_text(json.dumps(json.loads(config.read_bytes()) | changes))
    manifest = Manifest.from_bytes((folder / "manifest.json").read_bytes(), "here")
    files = recorded(folder)
    changed = manifest.model_copy(update={"files": files, "version": version_of(files), "inputs": digest_of(changes)})
    (folder / "manifest.json").write_bytes(changed.to_bytes())
    return folder


def route(*arguments: object, **options: Any) -> Result:
    found = CliRunner().invoke(app, ["route", *map(str, arguments)], **options)
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found


def shares_of(folder: Path, query: str) -> dict[str, float]:
    return artifact_router(Artifact(folder)).route(query)


def test_one_query(artifact: Path) -> None:
    shares = shares_of(artifact, QUERIES[0])
    best = max(shares, key=lambda name: shares[name])
    assert json.loads(route(artifact, QUERIES[0], "--json").stdout) == {
        "expert": best, "probabilities": shares, "fallback": False,
    }  # fmt: skip
    told = route(artifact, QUERIES[0])
    assert told.stdout == f"{best}\n"
    assert sorted(told.stderr.split()[::2]) == sorted(EXPERTS)


def test_the_likeliest(artifact: Path) -> None:
    shares = shares_of(artifact, QUERIES[0])
    ranked = sorted(shares, key=lambda name: -shares[name])
    assert json.loads(route(artifact, QUERIES[0], "--top", 2, "--json").stdout)["top"] == ranked[:2]
    lines = route(artifact, QUERIES[0], "--top", 2).stdout.splitlines()
    assert lines == [ranked[0], *(f"  {name} {shares[name]:.4f}" for name in ranked[:2])]


def test_a_file_has_a_line_per_line(artifact: Path, tmp_path: Path) -> None:
    """Empty lines and broken UTF-8 too: what comes out stands beside what went in."""
    path = tmp_path / "queries.txt"
    path.write_bytes("\r\n".join(QUERIES).encode() + b"\n\xff broken")
    expected = [*QUERIES, "\ufffd broken"]
    lines = route(artifact, "--batch", path, "--json").stdout.splitlines()
    assert [json.loads(line)["probabilities"] for line in lines] == [shares_of(artifact, query) for query in expected]
    plain = route(artifact, "--batch", path, "--top", 1).stdout.splitlines()
    for line, query in zip(plain, expected, strict=True):
        shares = shares_of(artifact, query)
        best = max(shares, key=lambda name: shares[name])
        assert line == f"{best}\t{best} {shares[best]:.4f}"
    piped = route(artifact, "--batch", "-", "--top", 1, input=path.read_bytes())
    assert piped.stdout.splitlines() == plain


def test_many_lines_pass_in_blocks(artifact: Path, tmp_path: Path) -> None:
    path = tmp_path / "queries.txt"
    path.write_text("".join(f"query {number}\n" for number in range(700)))
    lines = route(artifact, "--batch", path).stdout.splitlines()
    assert len(lines) == 700
    assert lines[699] == route(artifact, "query 699").stdout.strip()


def test_the_fallback_is_said(artifact: Path) -> None:
    folder = configured(artifact, thresholds=dict.fromkeys(EXPERTS, 1.0), fallback="base")
    found = json.loads(route(folder, "hello", "--json").stdout)
    assert (found["expert"], found["fallback"]) == ("base", True)
    told = route(folder, "hello")
    assert told.stdout == "base\n"
    assert "the fallback: no expert's kind of query was recognised" in told.stderr


def test_the_loaded_expert_stays(artifact: Path, tmp_path: Path) -> None:
    shares = shares_of(artifact, QUERIES[0])
    best, second, _ = sorted(shares, key=lambda name: -shares[name])
    gain = shares[best] - shares[second]
    assert route(artifact, QUERIES[0], "--loaded", second, "--margin", min(1.0, gain + 1e-6)).stdout == f"{second}\n"
    assert route(artifact, QUERIES[0], "--loaded", second, "--margin", gain - 1e-6).stdout == f"{best}\n"
    assert route(artifact, QUERIES[0], "--loaded", "base", "--margin", 1).stdout == f"{best}\n"
    path = tmp_path / "queries.txt"
    path.write_text("\n".join(QUERIES))
    router, loaded, expected = artifact_router(Artifact(artifact)), second, []
    for query in QUERIES:
        loaded = router.choose(query, loaded, 0.3).expert
        expected.append(loaded)
    assert route(artifact, "--batch", path, "--loaded", second, "--margin", 0.3).stdout.splitlines() == expected


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ([], RecipeError, "expected a query or --batch FILE, one of the two"),
        (["x", "--batch", "-"], RecipeError, "expected a query or --batch FILE, one of the two"),
        (["x", "--loaded", "nobody"], ArtifactError, "--loaded: expected base or an expert of .*, got 'nobody'"),
        (["--batch", "no-such-file"], QueryDataError, "--batch no-such-file: No such file or directory. Give a file"),
        (["--batch", "."], QueryDataError, r"--batch \.: Is a directory"),
    ],
)
def test_what_cannot_be_routed(artifact: Path, arguments: list[str], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        route(artifact, *arguments)


@pytest.mark.parametrize("arguments", [["x", "--top", "-1"], ["x", "--margin", "2"]])
def test_numbers_out_of_bounds(artifact: Path, arguments: list[str]) -> None:
    assert route(artifact, *arguments).exit_code == 2


def test_a_linear_router_needs_nothing_heavy(artifact: Path) -> None:
    program = (
        "import sys; from flows.cli import app; app(['route', sys.argv[1], 'hello'], standalone_mode=False); "
        "print(sorted({'torch', 'dask', 'sklearn', 'scipy', 'transformers', 'prefect', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(artifact)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
