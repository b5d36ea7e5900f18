from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

from storage.errors import CheckpointError
from storage.tokens import compare_tokens, read_tokens

TEXT = [
    "the cat sat on the mat and the dog sat on the log",
    "channels of experts are merged where their deltas point the same way",
    "a router picks the expert of a query, and rows are looked up",
    "sums of numbers, words of languages, lines of code: print(x + 1)",
]
CHINESE = ["模型的输出通道", "专家的词表更长", "输出的词"]


def trained(kind: str) -> Tokenizer:
    """A real tokenizer of about a hundred tokens."""
    special = ["<unk>", "<s>", "</s>"]
    if kind == "bpe":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
        trainer: Any = trainers.BpeTrainer(vocab_size=100, special_tokens=special, show_progress=False)
    elif kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordPieceTrainer(vocab_size=100, special_tokens=special, show_progress=False)
    elif kind == "wordlevel":
        tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(special_tokens=special, show_progress=False)
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def strings(tokenizer: Tokenizer) -> dict[int, str]:
    """What the tokenizers package itself says."""
    return {number: str(tokenizer.id_to_token(number)) for number in range(tokenizer.get_vocab_size())}


def saved(tokenizer: Tokenizer, folder: Path) -> dict[str, Path]:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return files(folder)


def files(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in folder.iterdir()}


def write(folder: Path, **contents: Any) -> dict[str, Path]:
    """Files by their names with _ for the dot: text as it is, everything else as JSON."""
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        path = folder / ".".join(name.rsplit("_", 1))
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return files(folder)


def sentencepiece_model(
    folder: Path, size: int = 50, text: list[str] = TEXT, **options: Any
) -> sentencepiece.SentencePieceProcessor:
    folder.mkdir(exist_ok=True)
    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text), model_writer=file, vocab_size=size, minloglevel=2, **options
        )
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "wordlevel", "unigram"])
def test_tokenizer_json(kind: str, tmp_path: Path) -> None:
    tokenizer = trained(kind)
    tokenizer.add_special_tokens([AddedToken("<|im_start|>", special=True)])
    tokenizer.add_tokens(["zebra"])
    expected = strings(tokenizer)
    assert expected[len(expected) - 1] == "zebra"
    assert read_tokens(saved(tokenizer, tmp_path)) == expected


def test_an_added_token_goes_before_the_models(tmp_path: Path) -> None:
    content = {"model": {"vocab": {"a": 0, "<0x01>": 1}}, "added_tokens": [{"id": 1, "content": "<|end|>", "special": True}]}
    assert read_tokens(write(tmp_path, tokenizer_json=content)) == {0: "a", 1: "<|end|>"}


def test_vocab_json(tmp_path: Path) -> None:
    tokenizer = trained("bpe")
    tokenizer.model.save(str(tmp_path))
    size = tokenizer.get_vocab_size()
    given = write(tmp_path, added_tokens_json={"<|extra|>": size})
    assert {"vocab.json", "merges.txt"} <= given.keys()
    assert read_tokens(given) == {**strings(tokenizer), size: "<|extra|>"}


def test_vocab_txt(tmp_path: Path) -> None:
    tokenizer = trained("wordpiece")
    tokenizer.model.save(str(tmp_path))
    assert read_tokens(files(tmp_path)) == strings(tokenizer)


def test_lines_of_vocab_txt_end_at_line_feeds_only(tmp_path: Path) -> None:
    assert read_tokens(write(tmp_path, vocab_txt="[PAD]\n\u2028\n\x0b\n##s")) == {0: "[PAD]", 1: "\u2028", 2: "\x0b", 3: "##s"}


@pytest.mark.parametrize(
    "options", [{"model_type": "bpe"}, {"model_type": "unigram"}, {"model_type": "bpe", "byte_fallback": True}]
)
def test_sentencepiece(tmp_path: Path, options: dict[str, Any]) -> None:
    model = sentencepiece_model(tmp_path, 330 if "byte_fallback" in options else 50, **options)
    expected = {number: model.id_to_piece(number) for number in range(model.get_piece_size())}
    assert expected[0] == "<unk>"
    assert read_tokens(files(tmp_path)) == expected


def test_the_best_file_is_read(tmp_path: Path) -> None:
    sentencepiece_model(tmp_path)
    old = saved(trained("bpe"), tmp_path)
    given = write(tmp_path, vocab_json={"a": 0}, vocab_txt="b", added_tokens_json={"c": 5})
    assert given.keys() == old.keys() | {"vocab.json", "vocab.txt", "added_tokens.json"}
    expected = [strings(trained("bpe")), {0: "a", 5: "c"}, {0: "b", 5: "c"}]
    for name, right in zip(("tokenizer.json", "vocab.json", "vocab.txt"), expected, strict=True):
        assert read_tokens(given) == right
        del given[name]
    assert len(read_tokens(given) or {}) == 50


def test_what_is_no_known_format_is_no_error(tmp_path: Path) -> None:
    assert read_tokens({}) is None
    assert read_tokens(write(tmp_path / "a", tokenizer_config_json={}, added_tokens_json={"a": 1})) is None
    assert read_tokens(write(tmp_path / "b", tokenizer_json={"model": {"type": "new"}})) is None
    assert read_tokens(write(tmp_path / "c", vocab_json={"eng": {"a": 0}})) is None
    ranks = "".join(f"{base64.b64encode(bytes([number])).decode()} {number}\n" for number in range(256))
    assert read_tokens(write(tmp_path / "d", tokenizer_model=ranks)) is None


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"tokenizer_json": "{"}, r"tokenizer\.json: cannot be read .*Download or save the tokenizer again"),
        ({"tokenizer_json": ""}, r"tokenizer\.json: cannot be read"),
        ({"tokenizer_json": "[" * 100_000}, r"tokenizer\.json: cannot be read .*recursion"),
        ({"tokenizer_json": [1]}, r"tokenizer\.json: .*expected a JSON object, got \[1\]"),
        ({"tokenizer_json": {"model": {"vocab": {"a": "0"}}}}, r"tokenizer\.json: .*token 'a': expected an id, got '0'"),
        ({"tokenizer_json": {"model": {"vocab": {"a": -1}}}}, r"tokenizer\.json: .*token 'a': expected an id, got -1"),
        (
            {"tokenizer_json": {"model": {"vocab": [["a", 0.0], "b"]}}},
            r"tokenizer\.json: .*token 1: expected \[token, score\], got b",
        ),
        (
            {"tokenizer_json": {"model": {"vocab": {}}, "added_tokens": {"a": 1}}},
            r"tokenizer\.json: .*added_tokens: expected a list",
        ),
        ({"tokenizer_json": {"model": {"vocab": {}}, "added_tokens": [{"id": 1}]}}, r"tokenizer\.json: .*an id and a content"),
        ({"vocab_json": "nothing"}, r"vocab\.json: cannot be read"),
        ({"vocab_txt": "a", "added_tokens_json": {"b": None}}, r"added_tokens\.json: .*token 'b': expected an id, got None"),
        ({"tokenizer_model": "garbage"}, r"tokenizer\.model: cannot be read"),
        ({"vocab_txt": ""}, r"vocab\.txt: .*it is empty"),
        ({"tokenizer_model": ""}, r"tokenizer\.model: cannot be read"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, contents: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read_tokens(write(tmp_path, **contents))
    assert str(tmp_path) in str(caught.value)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-300])


def no_text(path: Path) -> None:
    path.write_bytes(b"\xff\xfe" + path.read_bytes())


@pytest.mark.parametrize(
    ("name", "damage"), [("tokenizer.json", cut), ("tokenizer.json", no_text), ("tokenizer.model", cut), ("vocab.txt", no_text)]
)
def test_files_damaged_on_the_way_are_named(tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    sentencepiece_model(tmp_path)
    trained("wordpiece").model.save(str(tmp_path))
    saved(trained("bpe"), tmp_path)
    path = tmp_path / name
    damage(path)
    with pytest.raises(CheckpointError, match=rf"{name}: cannot be read as a tokenizer's file"):
        read_tokens({name: path})


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "vocab.txt", "tokenizer.model"):
        with pytest.raises(CheckpointError, match=rf"{name}: cannot be read .*No such file"):
            read_tokens({name: tmp_path / name})


def tokens(given: dict[str, Path]) -> dict[int, str]:
    found = read_tokens(given)
    assert found is not None
    return found


@pytest.mark.parametrize(
    "added",
    [{"[PAD]": 90}, {"<|im_end|>": 90, "<|im_start|>": 91}],  # as MetaMath and Dolphin add to Mistral's 32000
)
def test_tokens_added_behind_the_bases_are_no_disagreement(tmp_path: Path, added: dict[str, int]) -> None:
    model = sentencepiece_model(tmp_path, 90, model_type="bpe")
    base = tokens(files(tmp_path))
    expert = tokens(write(tmp_path, added_tokens_json=added))
    assert expert == {**{number: model.id_to_piece(number) for number in range(90)}, **{n: token for token, n in added.items()}}
    assert compare_tokens(base, expert, 90) == []
    assert compare_tokens(base, expert, 96) == []  # the base's table has rows of padding


def test_a_vocabulary_that_goes_on_is_no_disagreement(tmp_path: Path) -> None:
    """Chinese-Mistral's goes on with words of its own; one that was trained anew has other tokens at the same ids."""
    tokenizer = trained("bpe")
    base = tokens(saved(tokenizer, tmp_path / "base"))
    content = json.loads((tmp_path / "base" / "tokenizer.json").read_text())
    characters = sorted(set("".join(CHINESE)))
    content["model"]["vocab"] |= {character: len(base) + number for number, character in enumerate(characters)}
    given = write(tmp_path / "chinese", tokenizer_json=content)
    expert = tokens(given)
    assert expert == strings(Tokenizer.from_file(str(given["tokenizer.json"])))
    assert len(expert) == len(base) + len(characters)
    assert compare_tokens(base, expert, len(base)) == []

    other = Tokenizer(models.BPE(unk_token="<unk>"))
    other.pre_tokenizer = pre_tokenizers.ByteLevel()
    special = ["<unk>", "<s>", "</s>"]
    other.train_from_iterator(CHINESE, trainers.BpeTrainer(vocab_size=60, special_tokens=special, show_progress=False))
    found = compare_tokens(base, tokens(saved(other, tmp_path / "new")), 10)
    assert found == [(number, tokenizer.id_to_token(number), other.id_to_token(number)) for number in range(3, 10)]


def test_a_token_put_in_the_place_of_another_is_found(tmp_path: Path) -> None:
    """Base with tokenizer.json, expert with the SentencePiece model it was made from, and one row used anew."""
    model = sentencepiece_model(tmp_path / "base", model_type="unigram")
    pieces = [[model.id_to_piece(number), model.get_score(number)] for number in range(50)]
    base = tokens(write(tmp_path / "fast", tokenizer_json={"model": {"type": "Unigram", "unk_id": 0, "vocab": pieces}}))
    assert compare_tokens(base, tokens(files(tmp_path / "base")), 50) == []
    expert = tokens(write(tmp_path / "base", added_tokens_json={"<|im_end|>": 2, "<|im_start|>": 49}))
    assert compare_tokens(base, expert, 50) == [(2, "</s>", "<|im_end|>"), (49, pieces[49][0], "<|im_start|>")]
    assert compare_tokens(base, expert, 49) == [(2, "</s>", "<|im_end|>")]


def test_reading_imports_no_framework() -> None:
    code = "import sys, storage.tokens; print({'transformers', 'tokenizers', 'sentencepiece', 'torch'} & sys.modules.keys())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
