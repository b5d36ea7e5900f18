from __future__ import annotations

from pathlib import Path

import pytest

from flows.evaluation import check_bytes, measure_experts, texts_of
from flows.quality import measure
from flows.run import Outcome, run_recipe
from pipeline.engine import Silent
from pipeline.recipe import load_recipe
from storage.artifact import Artifact
from storage.errors import ArtifactError, QueryDataError


@pytest.fixture(scope="module")
def outcome(tiny_mistral: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """As many groups as experts: every rebuilt expert is the expert."""
    folder = tmp_path_factory.mktemp("evaluation")
    places = {"output": str(folder / "output"), "deltas": str(folder / "deltas")}
    settings = {**places, "merge.groups": 4, "router.kind": "none", "router.queries": {}, "cluster.kind": "none"}
    return run_recipe(load_recipe(tiny_mistral / "recipe.yaml", settings), Silent())


def test_rebuilt_experts_are_measured_beside_base_and_expert(outcome: Outcome, tiny_mistral: Path, tmp_path: Path) -> None:
    for path in (tiny_mistral / "texts").iterdir():
        (tmp_path / path.name).write_text(path.read_text("utf-8")[:1500], "utf-8")
    heard: list[str] = []
    found = measure_experts(Artifact(outcome.path), tmp_path, heard.append)
    assert heard == [one.expert for one in found] == ["chinese", "code", "math", "prose"]
    for one in found:
        text = (tmp_path / f"{one.expert}.txt").read_text("utf-8")
        assert one.own == measure(tiny_mistral / "experts" / one.expert, text)
        assert one.base == measure(tiny_mistral / "base", text)
        assert one.rebuilt == one.own
        assert one.kept == pytest.approx(1)


def test_texts_that_are_missing_are_listed(outcome: Outcome, tmp_path: Path) -> None:
    (tmp_path / "math.txt").write_text("1 + 1 = 2")
    (tmp_path / "code.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(QueryDataError, match="3 problems") as caught:
        texts_of(Artifact(outcome.path), tmp_path)
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["expert chinese", "expert code", "expert prose"]


def test_a_changed_byte_is_found(outcome: Outcome) -> None:
    artifact = Artifact(outcome.path)
    assert check_bytes(artifact) == len(outcome.manifest.files)
    path = outcome.path / "experts" / "math" / "config.json"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"{", b"[", 1))
    try:
        with pytest.raises(ArtifactError, match=r"fails verification.*experts/math/config.json"):
            check_bytes(artifact)
    finally:
        path.write_bytes(whole)
