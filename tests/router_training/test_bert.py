"""Training of the BERT router on encoders made here: what it learns, how it goes on, what it leaves behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from router_training import bert
from router_training.bert import train
from router_training.keeping import last_whole
from serving.encoder import load_encoder, save_encoder
from storage.errors import CheckpointError, QueryDataError, RecipeError
from storage.local_store import LocalStore
from tests.support.encoders import Settings, domain_texts, write_queries
from tests.support.prepared import Written, written

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = domain_texts(220)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write_queries(tmp_path_factory.mktemp("queries"), TEXTS)


def validation_of(prepared: Written) -> tuple[list[str], np.ndarray[Any, Any]]:
    rows = [row for path in prepared.parts("validation") for row in pq.read_table(path).to_pylist()]
    return [row["text"] for row in rows], np.array([row["label"] for row in rows])


def silent(text: str) -> None:
    pass


def test_separable_domains_are_told_apart(prepared: Written, source: Path, tmp_path: Path) -> None:
    said: list[str] = []
    scorer = train(prepared, Settings(str(source), epochs=2, batch=8), 0, tmp_path / "work", said.append)
    texts, labels = validation_of(prepared)
    assert (scorer.logits(texts).argmax(axis=1) == labels).mean() == 1
    assert scorer.experts == ("code", "math", "prose")
    assert scorer.model.config.id2label == {0: "code", 1: "math", 2: "prose"}
    assert (scorer.max_length, scorer.link) == (64, "softmax")
    losses = [float(line.rpartition(" ")[2]) for line in said if "loss" in line]
    assert len(losses) >= 10
    assert losses[-1] < 0.7 * losses[0]


def test_what_was_trained_is_what_is_served(prepared: Written, source: Path, tmp_path: Path) -> None:
    scorer = train(prepared, Settings(str(source)), 0, tmp_path / "work", silent)
    save_encoder(scorer, tmp_path / "router")
    config = {"experts": list(scorer.experts), "encoder": scorer.describe()}
    texts, _ = validation_of(prepared)
    found = load_encoder(LocalStore(tmp_path / "router"), config)
    np.testing.assert_array_equal(found.logits(texts), scorer.logits(texts))
    assert not [path for path in (tmp_path / "router").iterdir() if path.suffix not in (".json", ".safetensors", ".txt")]
    for path in (tmp_path / "router").iterdir():
        assert b"torch_utils" not in path.read_bytes()
        assert str(tmp_path).encode() not in path.read_bytes()
    assert scorer.describe()["source"].startswith("files:")


@pytest.mark.parametrize(("passes", "devices"), [(2, 1), (2, 2)])
def test_how_an_update_is_divided_does_not_matter(source: Path, tmp_path: Path, passes: int, devices: int) -> None:
    """8 queries at once, as twice 4, and in two processes of twice 2."""
    prepared = write_queries(tmp_path / "queries", {name: texts[:100] for name, texts in TEXTS.items()})
    texts, _ = validation_of(prepared)
    settings = Settings(str(source), batch=8, max_length=32)
    said: dict[str, list[str]] = {"whole": [], "divided": []}
    whole = train(prepared, settings, 1, tmp_path / "whole", said["whole"].append).logits(texts)
    divided = replace(settings, accumulate=passes)
    found = train(prepared, divided, 1, tmp_path / "divided", said["divided"].append, devices=devices).logits(texts)
    assert np.ptp(whole) > 0.5
    np.testing.assert_allclose(found, whole, atol=5e-3)  # float16 rounds what differs in float32's last places apart
    losses = [np.array([float(line.rpartition(" ")[2]) for line in lines if "loss" in line]) for lines in said.values()]
    np.testing.assert_allclose(losses[1], losses[0], atol=2e-4)


def test_an_early_stop_stops_and_keeps_the_best(source: Path, tmp_path: Path) -> None:
    """A third of the validation's labels are wrong: the loss there has its minimum before the training's."""
    names = ("code", "math")
    swapped = {name: list(TEXTS[name]) for name in names}
    for row in range(0, 60, 3):
        swapped["code"][row], swapped["math"][row] = swapped["math"][row], swapped["code"][row]
    prepared = write_queries(tmp_path / "queries", swapped, validation=60)
    said: list[str] = []
    settings = Settings(str(source), epochs=20, early_stop=3)
    scorer = train(prepared, settings, 0, tmp_path / "work", said.append)
    validation = [float(line.rpartition(" ")[2]) for line in said if "validation loss" in line]
    last, total = (int(word) for word in said[-1].partition(",")[0].split()[1::2])
    assert last < total / 2
    assert len(validation) - 1 - int(np.argmin(validation)) == 3
    assert validation[-1] - min(validation) > 0.005
    found, labels = validation_of(prepared)
    logits = scorer.logits(found)
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(labels)), labels]
    assert losses.mean() == pytest.approx(min(validation), abs=1e-3)


SCRIPT = """
import pickle, sys
from pathlib import Path
from router_training import bert
from router_training.bert import train
prepared, settings, work = pickle.loads(Path(sys.argv[1]).read_bytes())
train(prepared, settings, 7, work, lambda text: print(text, flush=True))
"""


def start(prepared: Written, settings: Settings, work: Path, folder: Path) -> subprocess.Popen[str]:
    import pickle

    (folder / "call").write_bytes(pickle.dumps((prepared, settings, work)))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent.parent)}
    command = [sys.executable, "-c", SCRIPT, str(folder / "call")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=folder)


def kill_when(process: subprocess.Popen[str], ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 100
    while not ready():
        assert process.poll() is None, "it was over before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.communicate()


def noisy() -> dict[str, list[str]]:
    """A third of the texts under another expert: what a batch costs depends on which it holds."""
    names, rows = sorted(TEXTS), [list(texts) for texts in zip(*(TEXTS[name] for name in sorted(TEXTS)), strict=True)]
    draw = np.random.default_rng(0)
    rows = [row[1:] + row[:1] if draw.random() < 0.33 else row for row in rows]
    return dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))


def test_a_killed_training_goes_on_where_it_was(source: Path, tmp_path: Path) -> None:
    """Killed in its second epoch, it goes on as one that was not: the order of queries, optimizer and rate are the same."""
    prepared = write_queries(tmp_path / "queries", noisy())
    settings = Settings(str(source), epochs=3, batch=8)
    work, reached = tmp_path / "work", 80
    process = start(prepared, settings, work, tmp_path)

    def is_there() -> bool:
        numbers = [int(path.parent.name.rpartition("-")[2]) for path in work.glob("checkpoints/*/whole.json")]
        return bool(numbers) and max(numbers) > reached

    kill_when(process, is_there)
    assert not (work / "trained").exists()
    said: dict[str, list[str]] = {"resumed": [], "whole": []}
    moved = write_queries(tmp_path / "moved", noisy())  # the parts of another preparation of the same queries
    resumed = train(moved, settings, 7, work, said["resumed"].append)
    whole = train(prepared, settings, 7, tmp_path / "uninterrupted", said["whole"].append)
    assert any(line.startswith("goes on from update ") for line in said["resumed"])
    losses = {
        name: {int(line.split()[1]): float(line.split()[-1]) for line in lines if " loss " in line}
        for name, lines in said.items()
    }
    assert min(losses["resumed"]) > reached
    again = {update: loss for update, loss in losses["whole"].items() if update in losses["resumed"]}
    assert len(again) >= 10
    assert max(again.values()) - min(again.values()) > 0.1
    assert losses["resumed"] == pytest.approx(again, abs=2e-3)
    texts, _ = validation_of(prepared)
    np.testing.assert_allclose(resumed.logits(texts), whole.logits(texts), atol=2e-2)


def test_a_finished_training_is_not_repeated_and_another_starts_over(prepared: Written, source: Path, tmp_path: Path) -> None:
    settings = Settings(str(source))
    said: list[list[str]] = [[], [], []]
    texts, _ = validation_of(prepared)
    first = train(prepared, settings, 0, tmp_path, said[0].append).logits(texts)
    np.testing.assert_array_equal(train(prepared, settings, 0, tmp_path, said[1].append).logits(texts), first)
    other = train(prepared, settings, 1, tmp_path, said[2].append).logits(texts)
    updates = [sum(line.startswith("update ") for line in lines) for lines in said]
    assert updates[0] == updates[2] > 0
    assert updates[1] == 0
    assert not np.array_equal(other, first)


def test_torn_checkpoints_are_not_gone_on_from(tmp_path: Path) -> None:
    for number in (5, 9, 10, 100):
        folder = tmp_path / f"checkpoint-{number}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")
        (folder / "whole.json").write_text('{"model.safetensors": 7}')
    assert last_whole(tmp_path) == tmp_path / "checkpoint-100"
    (tmp_path / "checkpoint-100" / "whole.json").unlink()
    (tmp_path / "checkpoint-10" / "model.safetensors").write_bytes(b"weig")
    assert last_whole(tmp_path) == tmp_path / "checkpoint-9"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-5", "checkpoint-9"]
    assert last_whole(tmp_path / "nothing") is None


def test_a_loss_that_is_no_number_ends_the_training(prepared: Written, source: Path, tmp_path: Path) -> None:
    settings = Settings(str(source), learning_rate=1e30, warmup=0.0)
    with pytest.raises(RecipeError, match=r"router.learning_rate: after \d+ of \d+ updates .* loss is no number"):
        train(prepared, settings, 0, tmp_path / "work", silent)


@pytest.mark.parametrize(
    ("gpus", "batch", "passes", "expected"), [(0, 128, 1, 1), (1, 128, 3, 1), (3, 128, 1, 2), (8, 128, 4, 8)]
)
def test_as_many_processes_as_gpus_that_share_an_update_evenly(
    monkeypatch: pytest.MonkeyPatch, gpus: int, batch: int, passes: int, expected: int
) -> None:
    settings = Settings("", batch=batch, accumulate=passes)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert bert._processes(settings, None) == bert._processes(settings, gpus) == expected


def test_settings_that_cannot_be_followed_are_refused(prepared: Written, source: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"router.batch: 16 queries cannot be divided evenly into 3 passes .* multiple of 3"):
        train(prepared, Settings(str(source), accumulate=3), 0, tmp_path, silent, devices=2)
    with pytest.raises(QueryDataError, match=r"has no train queries"):
        train(written(tmp_path / "none", ("a", "b"), []), Settings(str(source)), 0, tmp_path, silent)
    with pytest.raises(CheckpointError, match=r"router.encoder: there is no directory"):
        train(prepared, Settings(str(tmp_path / "nowhere")), 0, tmp_path, silent)
