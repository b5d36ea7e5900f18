"""The BERT router's scorer: stored, read back, from folders and object stores, damaged ones refused."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from serving import encoder
from serving.encoder import EncoderScorer, cut, load_encoder, save_encoder, stored_weights
from storage.errors import ArtifactError
from storage.local_store import LocalStore
from storage.stores import Store
from tests.support.encoders import domain_texts, write_encoder

EXPERTS = ("code", "math", "prose")
TEXTS = [text for texts in domain_texts(30).values() for text in texts]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder"), TEXTS)


@pytest.fixture
def scorer(source: Path) -> EncoderScorer:
    config = AutoConfig.from_pretrained(source, num_labels=3)
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_config(config)
    model.classifier.weight.data *= 100  # so that texts differ by more than rounding
    return EncoderScorer(EXPERTS, model, AutoTokenizer.from_pretrained(source), 48, device="cpu", source="org/name@1234")


def saved(scorer: EncoderScorer, folder: Path) -> dict[str, Any]:
    save_encoder(scorer, folder)
    return {"format": 2, "kind": "bert", "experts": list(scorer.experts), "encoder": scorer.describe()}


def reference(scorer: EncoderScorer, text: str) -> np.ndarray[Any, Any]:
    """One text alone through transformers."""
    inputs = scorer.tokenizer(text, truncation=True, max_length=scorer.max_length, return_tensors="pt")
    with torch.no_grad():
        found: np.ndarray[Any, Any] = scorer.model(**inputs).logits[0].double().numpy()
    return found


def test_batches_by_length_give_what_single_texts_do_in_their_order(
    scorer: EncoderScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder, "BATCH_TOKENS", 100)
    monkeypatch.setattr(encoder, "CHUNK", 17)
    texts = ["", "river", *TEXTS, " ".join(TEXTS), "river " * 500, "混合 русский \ud800 \x00"]
    found = scorer.logits(texts)
    assert found.shape == (len(texts), 3)
    assert found.dtype == np.float64
    expected = [reference(scorer, cut(text, 48)) for text in texts]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
    assert np.ptp(found, axis=0).max() > 1e-2


def test_no_texts_have_no_scores(scorer: EncoderScorer) -> None:
    assert scorer.logits([]).shape == (0, 3)


def test_long_texts_are_cut_before_they_are_tokenised() -> None:
    assert cut("ab" * 10_000_000, 8) == "ab" * 128
    assert cut("a\ud800b", 8) == "a?b"


def test_a_scorer_read_back_scores_as_its_stored_values_do(scorer: EncoderScorer, tmp_path: Path) -> None:
    config = saved(scorer, tmp_path / "router")
    found = load_encoder(LocalStore(tmp_path / "router"), config, device="cpu")
    assert (found.experts, found.max_length, found.source) == (EXPERTS, 48, "org/name@1234")
    scorer.model.load_state_dict({name: tensor.half().float() if tensor.is_floating_point() else tensor
                                  for name, tensor in scorer.model.state_dict().items()})  # fmt: skip
    np.testing.assert_array_equal(found.logits(TEXTS), scorer.logits(TEXTS))
    assert not found.model.training


def test_what_is_stored_says_nothing_of_the_machine_and_holds_no_pickle(scorer: EncoderScorer, tmp_path: Path) -> None:
    scorer.logits(TEXTS)  # which sets how the tokenizer cuts
    config = saved(scorer, tmp_path / "here" / "router")
    again = load_encoder(LocalStore(tmp_path / "here" / "router"), config, device="cpu")
    again.logits(TEXTS[:3])
    save_encoder(again, tmp_path / "there")
    folders = tmp_path / "here" / "router", tmp_path / "there"
    contents = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]
    assert contents[0] == contents[1]
    assert contents[0].keys() >= {"config.json", "router.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {name.rpartition(".")[2] for name in contents[0]} <= {"json", "safetensors", "txt", "model"}
    for name, data in contents[0].items():
        assert str(tmp_path).encode() not in data, name
    assert json.loads(contents[0]["tokenizer.json"])["truncation"] is None
    weights = load_file(tmp_path / "there" / "router.safetensors")
    assert {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()} == {torch.float16}


def test_values_beyond_float16_are_stored_as_float32(scorer: EncoderScorer) -> None:
    with torch.no_grad():
        scorer.model.classifier.bias[0] = 1e6
    stored = stored_weights(scorer.model)
    assert {tensor.dtype for tensor in stored.values() if tensor.is_floating_point()} == {torch.float32}
    assert stored["classifier.bias"][0] == 1e6


def test_it_is_read_from_where_artifacts_lie(scorer: EncoderScorer, output: Store, tmp_path: Path) -> None:
    config = saved(scorer, tmp_path / "router")
    folder = output.under("v1/router")
    for path in (tmp_path / "router").iterdir():
        folder.put(path.name, path.read_bytes())
    folder.put("deeper/tokenizer.json", b"nonsense")
    found = load_encoder(folder, config, device="cpu")
    expected = load_encoder(LocalStore(tmp_path / "router"), config, device="cpu")
    np.testing.assert_array_equal(found.logits(TEXTS[:5]), expected.logits(TEXTS[:5]))


def test_threads_share_a_scorer(scorer: EncoderScorer) -> None:
    expected = scorer.logits(TEXTS)
    results: list[Any] = []
    threads = [threading.Thread(target=lambda: results.append(scorer.logits(TEXTS))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    for found in results:
        np.testing.assert_allclose(found, expected, atol=1e-4)


def _without(name: str) -> Any:
    return lambda folder, _: (folder / name).unlink()


def _text(name: str, content: str) -> Any:
    return lambda folder, _: (folder / name).write_text(content)


def _other_shape(folder: Path, config: dict[str, Any]) -> None:
    tensors = load_file(folder / "router.safetensors")
    save_file(tensors | {"classifier.bias": torch.zeros(4)}, folder / "router.safetensors")


def _another_tensor(folder: Path, config: dict[str, Any]) -> None:
    tensors = load_file(folder / "router.safetensors")
    save_file(tensors | {"surprise": torch.zeros(4)}, folder / "router.safetensors")


def _without_tokenizer(folder: Path, config: dict[str, Any]) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def _remote_code(folder: Path, config: dict[str, Any]) -> None:
    settings = json.loads((folder / "config.json").read_bytes())
    settings |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "code.py").write_text("raise SystemExit('ran')")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without("router.safetensors"), r"router.safetensors"),
        (_text("router.safetensors", "not one"), r"SafetensorError"),
        (_without("config.json"), r"its encoder is damaged"),
        (_text("config.json", "{"), r"its encoder is damaged"),
        (_other_shape, r"classifier.bias: expected \[3\], got \[4\]"),
        (_another_tensor, r"1 tensors too many or too few: surprise"),
        (_without_tokenizer, r"it has no tokenizer"),
        (_text("tokenizer.json", "{}"), r"its encoder is damaged"),
        (_remote_code, r"its encoder is damaged"),
        (lambda _, config: config["experts"].append("more"), r"3 labels for 4 experts"),
        (lambda _, config: config.pop("encoder"), r"KeyError: 'encoder'"),
        (lambda _, config: config["encoder"].update(max_length="a lot"), r"max_length: expected a number of tokens"),
    ],
    ids=[
        "no weights", "torn weights", "no configuration", "torn configuration", "another shape", "another tensor",
        "no tokenizer", "torn tokenizer", "code of its own", "another number of experts", "no section", "wrong length",
    ],
)  # fmt: skip
def test_a_damaged_encoder_is_one_clear_error(scorer: EncoderScorer, tmp_path: Path, damage: Any, message: str) -> None:
    config = saved(scorer, tmp_path)
    damage(tmp_path, config)
    with pytest.raises(ArtifactError, match=message) as found:
        load_encoder(LocalStore(tmp_path), config, device="cpu")
    assert "Pull or build the artifact again" in str(found.value)
