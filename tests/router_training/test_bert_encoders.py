"""Which encoders a BERT router may be trained from, what is read of them, and how its queries are read."""

from __future__ import annotations

import itertools
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedConfig,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    ViTConfig,
)

from router_training import encoders
from router_training.batches import KEPT_PARTS, Collator, PartOrder, Parts
from router_training.bert import train
from router_training.encoders import check_encoder, longest
from router_training.fitting import build
from storage.errors import CheckpointError
from tests.support.encoders import Settings, domain_texts, write_encoder, write_queries
from tests.support.hub_server import HubServer, hub_environment

TEXTS = domain_texts(40)
Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("made"), [text for texts in TEXTS.values() for text in texts])


@pytest.fixture
def source(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "source"))


class Bomb:
    def __reduce__(self) -> Any:
        return SystemExit, ("a pickle was read",)


def pickled_only(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def settings_only(config: PreTrainedConfig) -> Damage:
    return config.save_pretrained


def without(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def text(name: str, content: str) -> Damage:
    def write(folder: Path) -> None:
        (folder / name).write_text(content)

    return write


def changed(name: str, **values: Any) -> Damage:
    def change(folder: Path) -> None:
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_bytes()) | values))

    return change


def code_of_its_own(folder: Path) -> None:
    changed("config.json", model_type="mine", auto_map={"AutoConfig": "own.Config"})(folder)
    (folder / "own.py").write_text("raise SystemExit('its code ran')")


def torn_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.safetensors.index.json")


def index_outside(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))


REFUSED: dict[str, tuple[Damage, str]] = {
    "pickle": (pickled_only, r"has its weights as a pickle only \(pytorch_model.bin\).*only safetensors are"),
    "no tokenizer": (without_tokenizer, r"has no tokenizer: expected one of tokenizer.json, vocab.txt"),
    "no configuration": (without("config.json"), r"has no config.json"),
    "no weights": (without("model.safetensors"), r"has no weights: expected model.safetensors"),
    "torn configuration": (text("config.json", "{"), r"config.json is no configuration transformers knows"),
    "torn tokenizer": (text("tokenizer.json", '{"model": 1}'), r"its tokenizer cannot be read"),
    "code of its own": (code_of_its_own, r"no configuration transformers knows without code of its own"),
    "a decoder": (settings_only(LlamaConfig()), r"a model of type 'llama': expected an encoder of sequences"),
    "an encoder-decoder": (settings_only(T5Config()), r"a model of type 't5': expected an encoder"),
    "of images": (settings_only(ViTConfig()), r"a model of type 'vit': expected an encoder"),
    "a decoder's BERT": (changed("config.json", is_decoder=True), r"a model of type 'bert': expected an encoder"),
    "another tokenizer": (changed("config.json", vocab_size=7), r"ids up to \d+, its config.json 7 rows of embeddings"),
    "no padding": (changed("tokenizer_config.json", pad_token=None), r"no padding token"),
    "index to elsewhere": (index_outside, r"index.json names ../elsewhere.safetensors, which it does not have"),
    "torn index": (torn_index, r"index.json cannot be read"),
}


@pytest.mark.parametrize(("damage", "message"), REFUSED.values(), ids=REFUSED)
def test_encoders_that_cannot_be_used_are_refused_before_training(source: Path, damage: Damage, message: str) -> None:
    damage(source)
    with pytest.raises(CheckpointError, match=message) as found:
        check_encoder("router.encoder", str(source))
    assert str(found.value).startswith("router.encoder: ")
    assert "\n" not in str(found.value)


def test_what_is_read_is_listed_and_linked_alone(source: Path, tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "modeling_own.py", "adapter_config.json", "README.md"):
        (source / name).write_text("nothing to read")
    encoder = check_encoder("router.encoder", str(source))
    expected = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert list(encoder.names) == expected
    assert sorted(path.name for path in encoder.link_into(tmp_path / "links").iterdir()) == expected
    before = encoder.source
    assert before.startswith("files:")
    moved = check_encoder("router.encoder", str(source.rename(tmp_path / "moved")))
    assert moved.source == before
    changed("config.json", hidden_dropout_prob=0.3)(tmp_path / "moved")
    assert check_encoder("router.encoder", str(tmp_path / "moved")).source != before


def test_an_encoder_on_the_hub_is_pinned_and_read_through_its_cache(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process of its own, as the client reads its environment once."""
    import subprocess
    import sys

    script = """
import sys
from pathlib import Path
from router_training.encoders import check_encoder
try:
    encoder = check_encoder("router.encoder", sys.argv[1])
    print(encoder.source, *sorted(path.name for path in encoder.link_into(Path(sys.argv[2])).iterdir()))
except Exception as error:
    print(type(error).__name__, error)
"""

    def asked(place: str, **more: str) -> str:
        environment = hub_environment(hub.url, tmp_path / "cache") | {"PYTHONPATH": str(Path(__file__).parents[2])} | more
        command = [sys.executable, "-c", script, place, str(tmp_path / "links")]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    repository = tmp_path / "hub" / "org" / "encoder"
    shutil.copytree(made, repository)
    (repository / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with HubServer(tmp_path / "hub") as hub:
        (commit,) = hub.repos["org/encoder"].commits
        found = asked("org/encoder@main")
        assert found.split() == [
            f"org/encoder@{commit}", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        ]  # fmt: skip
        assert not [request for request in hub.requests if request.path.endswith("pytorch_model.bin")]
        assert asked(f"org/encoder@{commit}", HF_HUB_OFFLINE="1") == found
        told = asked("org/other", HF_HUB_OFFLINE="1")
        assert told.startswith("CheckpointError router.encoder: org/other: HF_HUB_OFFLINE is set and the cache has no org")
        assert "there is no such repository" in asked("org/other")


def test_an_encoder_of_shards_is_read(source: Path, tmp_path: Path) -> None:
    model = build(source, ["a", "b"], "here")
    model.base_model.save_pretrained(source, max_shard_size="20KB")
    (source / "model.safetensors").unlink()
    names = check_encoder("router.encoder", str(source)).names
    assert sum(name.endswith(".safetensors") for name in names) > 1
    again = build(check_encoder("router.encoder", str(source)).link_into(tmp_path / "links"), ["a", "b"], "here")
    for name, tensor in model.base_model.state_dict().items():
        assert torch.equal(tensor, again.base_model.state_dict()[name]), name


def test_an_encoder_whose_weights_are_not_its_own_is_refused(source: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    del tensors["bert.encoder.layer.1.output.dense.weight"]
    tensors["bert.embeddings.position_embeddings.weight"] = torch.zeros(9, 32)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"2 tensors of the encoder are not in its weights, .*bert\.embeddings"):
        build(source, ["a", "b"], "here")
    (source / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match=r"router.encoder: here: its weights cannot be read"):
        build(source, ["a", "b"], "here")


def test_a_head_of_another_task_is_replaced(source: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=7)
    model.save_pretrained(source)
    found = build(source, ["a", "b", "c"], "here")
    assert found.classifier.weight.shape == (3, 32)
    assert torch.equal(found.bert.embeddings.word_embeddings.weight, model.bert.embeddings.word_embeddings.weight)


def test_the_longest_text_is_what_positions_and_tokenizer_allow(source: Path) -> None:
    """With a text of that length the encoder runs; with one token more it does not."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    assert longest(build(source, ["a", "b"], "here"), tokenizer) == 64
    config = RobertaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=40, pad_token_id=1,
    )  # fmt: skip
    model = RobertaForSequenceClassification(config).eval()
    limit = longest(model, tokenizer)
    assert limit == 38
    model(torch.full((1, limit), 5))
    with pytest.raises(RuntimeError, match="out of bounds"):
        model(torch.full((1, limit + 1), 5))


def test_the_encoder_is_judged_before_anything_else_is_done(source: Path, tmp_path: Path) -> None:
    without_tokenizer(source)
    prepared = write_queries(tmp_path / "queries", TEXTS)
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        train(prepared, Settings(str(source)), 0, tmp_path / "work", lambda _: None)
    assert not (tmp_path / "work").exists()


def rows_in(folder: Path, counts: list[int]) -> tuple[list[Path], list[tuple[str, int]]]:
    paths, rows = [], []
    for number, count in enumerate(counts):
        part = [(f"text {number} {row}", row % 3) for row in range(count)]
        paths.append(folder / f"part-{number:03d}.parquet")
        pq.write_table(pa.table({"text": [t for t, _ in part], "label": pa.array([n for _, n in part], pa.int32())}), paths[-1])
        rows += part
    return paths, rows


def test_parts_are_one_list_of_which_a_few_are_held(tmp_path: Path) -> None:
    paths, rows = rows_in(tmp_path, [5] * 20 + [1, 3])
    parts = Parts(paths)
    assert [parts[index] for index in range(len(parts))] == rows
    assert parts[0] == rows[0]
    assert parts[len(rows) - 1] == rows[-1]
    assert len(parts._held) == KEPT_PARTS


def test_every_epoch_reads_every_row_once_and_part_after_part() -> None:
    counts = [4, 4, 4, 4, 4, 4, 2]
    order, again, other = (PartOrder(counts, seed) for seed in (3, 3, 4))
    assert list(order) == list(range(26))
    seen = [tuple(order)]
    for epoch in (1, 2):
        for one in (order, again, other):
            one.epoch = epoch
        found = list(order)
        assert sorted(found) == list(range(26))
        assert found == list(again)
        assert found != list(other)
        parts = [index // 4 for index in found]
        assert sum(left != right for left, right in itertools.pairwise(parts)) == 6
        seen.append(tuple(found))
    assert len(set(seen)) == 3


def test_batches_are_padded_to_their_longest_and_cut(source: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source)
    collate = Collator(tokenizer, 12, None)
    batch = collate([("river", 2), ("river mountain valley", 0)])
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 5)
    assert batch["attention_mask"].sum(dim=1).tolist() == [3, 5]
    assert batch["labels"].tolist() == [2, 0]
    long = "river " * 100_000
    assert collate([(long, 1)])["input_ids"].shape == (1, 12)
    assert Collator(tokenizer, 16, 8)([("river", 1)])["input_ids"].shape == (1, 8)
    assert Collator(tokenizer, 12, 8)([(long, 1)])["input_ids"].shape == (1, 12)
    assert encoders.longest(build(source, ["a", "b"], "here"), tokenizer) >= 12
