from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from router_training import measures, training
from router_training.calibration import Threshold
from router_training.data import prepare
from router_training.parts import each_part
from router_training.sources import Queries, Source
from router_training.training import Training, finish, latency, train_router
from serving.choice import BASE, Link
from serving.router import LinearScorer, Router, load_router
from storage.errors import QueryDataError
from tests.support.encoders import write_encoder
from tests.support.prepared import Labelled, Written, written
from tests.support.reference_router import logits as reference_logits

KINDS = {
    "code": "function return import lambda yield",
    "math": "plus minus times divided equals",
    "prose": "river mountain valley meadow cloud",
}


@dataclass(frozen=True)
class Section(Queries):
    """A router's section, without a recipe."""

    kind: str = "linear"
    threshold: Threshold = 0.0
    fallback: str | None = None


def texts(name: str, count: int) -> list[str]:
    """Questions of one kind, one in ten of them with words of another."""
    random = np.random.default_rng(len(name))
    own, other = KINDS[name].split(), " ".join(KINDS.values()).split()
    return [" ".join([*random.choice(other if n % 10 == 0 else own, 4), str(n), name[0] * (n % 3)]) for n in range(count)]


def section(folder: Path, **settings: Any) -> Section:
    queries = {}
    for name in KINDS:
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(name, 400)))
        queries[name] = (Source(str(path), language="en" if name == "prose" else None),)
    (folder / "outside.jsonl").write_text("".join(json.dumps({"text": f"苹果 {n} 红色 {n * 7}"}) + "\n" for n in range(60)))
    return Section(queries, (Source(str(folder / "outside.jsonl")),), **settings)


def trained(folder: Path, out: str, asked: Section) -> dict[str, Any]:
    """The record of a router in ``out``, trained in a folder beside it."""
    work = folder / f"{out}-work"
    prepared = prepare(asked, 1, work / "queries")
    return train_router(Training(asked, 1, prepared), work, folder / out)


def test_a_section_becomes_a_router_that_is_measured_as_it_is_served(tmp_path: Path) -> None:
    record = trained(tmp_path, "router", section(tmp_path, threshold="auto", fallback="base"))
    router = load_router(tmp_path / "router")
    assert sorted(path.name for path in (tmp_path / "router").iterdir()) == ["router.json", "router.safetensors"]
    held = sum(map(sum, record["confusion"]))
    assert record["queries"] == held > 100
    assert record["accuracy"] == pytest.approx(np.trace(record["confusion"]) / held, abs=1e-6)
    assert record["accuracy"] > 0.9
    assert record["experts"] == [*KINDS]
    assert (router.temperature, router.thresholds, router.fallback) == (
        record["temperature"], record["thresholds"], "base",
    )  # fmt: skip
    assert record["outside_queries"] == 60
    assert record["auroc"] > 0.8
    assert set(record["by_language"]) == {"en", "script:Latin"}
    assert sum(part["queries"] for part in record["by_language"].values()) == held
    assert record["at_thresholds"]["coverage"] >= 0.8
    assert record["at_thresholds"]["accuracy"] >= record["accuracy"]
    assert record["at_thresholds"]["outside"] < record["at_thresholds"]["coverage"]
    assert set(record["seconds"]) == {"train", "measure"}
    assert record["latency"]["p50_us"] <= record["latency"]["p99_us"]
    card = json.loads((tmp_path / "router" / "router.json").read_bytes())
    assert card["counts"] == record["counts"]
    assert sum(part["validation"] for part in card["counts"].values()) == held
    assert card["sources"]["prose"][0]["rows"] == 400
    assert card["validation"]["accuracy"] == record["accuracy"]
    json.dumps(record, allow_nan=False)


def test_the_measures_are_those_of_the_router_that_was_written(tmp_path: Path) -> None:
    """From the files alone, with the slow reference's scores."""
    asked = section(tmp_path)
    record = trained(tmp_path, "router", asked)
    prepared = prepare(asked, 1, tmp_path / "again")
    router = load_router(tmp_path / "router")
    rows = list(prepared.rows("validation"))[:40]
    scorer = cast("LinearScorer", router.scorer)
    arrays = scorer.weights.tolist(), scorer.scale.tolist(), scorer.bias.tolist()
    expected = [reference_logits(row.text, scorer.spec, *arrays) for row in rows]
    assert scorer.logits([row.text for row in rows]).tolist() == expected
    every = list(prepared.rows("validation"))
    shares = router.probabilities([row.text for row in every])
    labels = np.array([row.label for row in every])
    assert record["confusion"] == measures.confusion(labels, shares.argmax(axis=1), 3).tolist()
    assert record["calibration_error"]["after"] == pytest.approx(measures.calibration_error(shares, labels), abs=1e-6)
    assert record["coverage"] == measures.rounded(measures.coverage_curve(shares, labels))


def test_the_same_section_gives_the_same_bytes_and_no_time_is_in_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = trained(tmp_path, "first", section(tmp_path))
    moved = tmp_path / "moved"
    moved.mkdir()
    monkeypatch.setattr(training, "TIMED_QUERIES", 3)
    second = trained(moved, "second", section(moved))
    for name in ("router.json", "router.safetensors"):
        assert (tmp_path / "first" / name).read_bytes() == (moved / "second" / name).read_bytes()
    assert first["latency"]["queries"] > second["latency"]["queries"] == 3
    config = (tmp_path / "first" / "router.json").read_text()
    for strange in ("seconds", "latency", "_us", str(tmp_path)):
        assert strange not in config


def test_a_training_that_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    asked = section(tmp_path)
    (tmp_path / "math.jsonl").write_text("")
    with pytest.raises(QueryDataError, match="math"):
        trained(tmp_path, "router", asked)
    assert not (tmp_path / "router").exists()


@dataclass(frozen=True)
class BertSection(Section):
    """A router's section of kind bert, with settings for a few hundred short queries."""

    kind: str = "bert"
    encoder: str = ""
    epochs: int = 3
    batch: int = 32
    learning_rate: float = 3e-3
    warmup: float = 0.1
    weight_decay: float = 0.01
    max_length: int = 32
    accumulate: int = 1
    early_stop: int | None = None


def test_a_bert_router_is_calibrated_measured_and_saved_alike(tmp_path: Path) -> None:
    linear = section(tmp_path, threshold="auto", fallback="math")
    encoder = write_encoder(tmp_path / "encoder", [text for name in KINDS for text in texts(name, 400)])
    fields = {name: getattr(linear, name) for name in ("queries", "outside", "threshold", "fallback")}
    record = trained(tmp_path, "router", BertSection(**fields, encoder=str(encoder)))
    router = load_router(tmp_path / "router")
    assert (record["kind"], router.scorer.link, router.experts) == ("bert", "softmax", tuple(KINDS))
    assert (router.temperature, router.fallback, router.thresholds) == (record["temperature"], "math", record["thresholds"])
    assert record["accuracy"] > 0.8
    held = [row for rows in each_part((tmp_path / "router-work" / "queries").glob("validation-*")) for row in rows.texts]
    assert len(held) == record["queries"]
    found = router.probabilities(held)
    assert coverage_of(record, 0.9) == pytest.approx((found.max(axis=1) >= 0.9).mean(), abs=2 / len(held))
    assert not [path for path in (tmp_path / "router").rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]


def coverage_of(record: dict[str, Any], threshold: float) -> float:
    return next(float(point["coverage"]) for point in record["coverage"] if point["threshold"] == threshold)


class Table:
    """A scorer that reads its scores from the texts."""

    experts: tuple[str, ...] = ("a", "b")
    link: Link = "softmax"

    def logits(self, texts: Any) -> NDArray[np.float64]:
        return np.array([[float(number) for number in text.split()] for text in texts]).reshape(-1, 2)


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[Router]:
    """The routers that were saved, of scorers that cannot be."""
    found: list[Router] = []

    def keep(router: Router, folder: Path, card: object, validation: object) -> None:
        folder.mkdir()
        found.append(router)

    monkeypatch.setattr(training, "save", keep)
    return found


def prepared(folder: Path, outside: list[Labelled]) -> Written:
    rows: list[Labelled] = [("3 0", 0, "x"), ("0 3", 1, "y"), ("2 0", 0, "x"), ("0 2", 0, "y")] * 100
    return written(folder / "parts", "ab", [], rows, outside)


@pytest.mark.usefixtures("saved")
def test_known_scores_give_known_measures(tmp_path: Path) -> None:
    """Right three times in four; the outside queries' shares lie below, among and above the inside ones'."""
    outside: list[Labelled] = [("0 0", -1), ("2.5 0", -1), ("9 0", -1), ("0 0.1", -1)]
    record = finish(Table(), prepared(tmp_path, outside), Section({}, threshold=0.5, fallback=BASE), tmp_path / "out")
    assert (record["accuracy"], record["confusion"]) == (0.75, [[200, 100], [0, 100]])
    assert record["macro_f1"] == pytest.approx((2 * 200 / 500 + 2 * 100 / 300) / 2, abs=1e-6)
    assert record["auroc"] == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    assert record["by_language"]["x"]["accuracy"] == 1
    assert record["by_language"]["y"] == {"queries": 200, "accuracy": 0.5, "macro_f1": pytest.approx(1 / 3, abs=1e-6)}
    assert record["temperature"] > 1  # 0.95 and 0.88 were promised, three in four kept
    assert record["calibration_error"]["after"] < record["calibration_error"]["before"]
    assert record["at_thresholds"] == {"coverage": 1, "accuracy": 0.75, "outside": 1}
    assert record["coverage"][0] == {"threshold": 0, "coverage": 1, "accuracy": 0.75}


def test_thresholds_decide_who_is_trusted(tmp_path: Path, saved: list[Router]) -> None:
    asked = Section({}, threshold={"b": 1.0}, fallback="a")
    record = finish(Table(), prepared(tmp_path, [("0 5", -1), ("5 0", -1)]), asked, tmp_path / "out")
    assert record["at_thresholds"] == {"coverage": 0.5, "accuracy": 1, "outside": 0.5}
    assert (saved[0].thresholds, saved[0].fallback) == ({"a": 0, "b": 1}, "a")


@pytest.mark.usefixtures("saved")
def test_without_fallback_or_outside_queries_nothing_is_claimed_of_them(tmp_path: Path) -> None:
    record = finish(Table(), prepared(tmp_path, []), Section({}), tmp_path / "out")
    assert (record["auroc"], record["outside_queries"], record["fallback"]) == (None, 0, None)
    assert "at_thresholds" not in record


def test_latency_is_of_the_queries_given() -> None:
    found = latency(Router(Table()), ["1 2", "2 1"] * 20)
    assert found["queries"] == 40
    assert 0 < found["p50_us"] <= found["p99_us"]
    assert found["one_at_a_time_per_s"] > 0
    assert found["batch_per_s"] > 0
    assert latency(Router(Table()), []) == {}
