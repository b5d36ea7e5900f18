from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from flows.demo import kept, merge_family, run_demo
from flows.quality import CONTEXT, Quality, measure
from flows.run import Outcome
from storage.errors import ArtifactError
from tests.support.tiny_experts import open_at

EXPERTS = ("chinese", "code", "math", "prose")


def texts(folder: Path) -> dict[str, str]:
    return {name: (folder / "texts" / f"{name}.txt").read_text("utf-8") for name in EXPERTS}


def test_the_family_has_the_irregularities_of_real_ones(tiny_mistral: Path) -> None:
    base = open_at("base", tiny_mistral / "base")
    found = {name: open_at(name, tiny_mistral / "experts" / name) for name in EXPERTS}
    rows = {name: checkpoint.tensors["model.embed_tokens.weight"].rows for name, checkpoint in found.items()}
    size = base.tensors["model.embed_tokens.weight"].rows
    assert rows["math"] == size + 1
    assert rows["chinese"] > size + 100
    assert rows["prose"] == rows["code"] == size
    assert sum(name.endswith(".safetensors") for name in found["code"].files) == 3
    assert {info.dtype for info in base.tensors.values()} == {"BF16"}


def test_every_expert_is_clearly_better_on_its_own_text(tiny_mistral: Path) -> None:
    """At least 5 % less loss than the base on text that no training has seen."""
    for name, text in texts(tiny_mistral).items():
        own, base = measure(tiny_mistral / "experts" / name, text), measure(tiny_mistral / "base", text)
        assert own.loss < 0.95 * base.loss, name


def test_held_out_texts_are_not_among_the_queries(tiny_mistral: Path) -> None:
    for name, text in texts(tiny_mistral).items():
        lines = (tiny_mistral / "queries" / f"{name}.jsonl").read_text("utf-8").splitlines()
        queries = [json.loads(line)["text"] for line in lines]
        assert len(set(queries)) == 400
        assert len(text.encode()) > 20_000
        assert sum(query in text for query in queries) <= 4, name  # a phrase may occur twice in a language


def cells(printed: str) -> dict[str, list[list[float]]]:
    """The numbers of every row of the demo's table, by the row's title."""
    rows = [line.strip("│ ").split("│") for line in printed.splitlines() if line.startswith("│")]
    return {
        row[0].strip(): [[float(n) for n in re.findall(r"-?[\d.]+", cell.replace(",", ""))] for cell in row[1:]] for row in rows
    }


def test_the_demo_prints_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the command to the table: K=2 keeps more of the fine-tuning than one model; the README shows these figures."""
    run_demo(tmp_path)
    printed = capsys.readouterr().out
    table = cells(printed)
    assert set(EXPERTS) <= table.keys()
    (base,), (experts,), (one,), (channel,) = table["fine-tuning gain kept, mean"]
    assert (base, experts) == (0, 100)
    assert one < channel < 100
    alone, together, pooled_one, pooled = (count for (count,) in table["parameters for all"])
    assert alone < pooled_one < pooled < together
    accuracy = float(printed.split("router: ")[1].split(" %")[0])
    assert accuracy > 95
    readme = cells((Path(__file__).parent.parent.parent / "README.md").read_text("utf-8"))
    assert readme.keys() == table.keys()
    for title, row in readme.items():
        for shown, found in zip(row, table[title], strict=True):
            # processors round differently: the last digit may move
            assert shown == pytest.approx(found, rel=2e-3, abs=0.2 if "gain" in title else 2e-3), title


def test_the_demo_reuses_deltas_between_group_counts(tmp_path: Path) -> None:
    first: Outcome = merge_family(tmp_path, 1)
    second = merge_family(tmp_path, 2)
    assert first.manifest.moved["ingest read"] > 0
    assert second.manifest.moved["ingest read"] == 0


def test_quality_is_that_of_a_plain_loop(tiny_mistral: Path) -> None:
    """Loss and accuracy of a short text, token by token, without windows."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, text = tiny_mistral / "experts" / "chinese", texts(tiny_mistral)["chinese"][:40]
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert 10 < len(ids) <= CONTEXT
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    bits, hits = 0.0, {}
    for position in range(1, len(ids)):
        with torch.inference_mode():
            shares = model(input_ids=torch.tensor([ids[:position]])).logits[0, -1].double().softmax(-1)
        bits -= float(shares[ids[position]].log2())
        hits[position] = int(shares.argmax()) == ids[position]
    parts = {c: [hit for p, hit in hits.items() if offsets[p][0] <= c < offsets[p][1]] for c in range(len(text))}
    counted = {c: all(found) for c, found in parts.items() if found}
    assert any(len(found) > 1 for found in parts.values())  # characters in several tokens are among them
    found = measure(folder, text)
    assert found.loss == pytest.approx(bits / sum(len(text[c].encode()) for c in counted), rel=1e-4)
    assert found.accuracy == pytest.approx(sum(counted.values()) / len(counted))


def test_share_kept() -> None:
    own, base = Quality(1.0, 0), Quality(2.0, 0)
    assert kept(own, base, own) == 1
    assert kept(own, base, base) == 0
    assert kept(own, base, Quality(1.25, 0)) == pytest.approx(0.75)


def test_a_missing_family_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.demo.FAMILY", tmp_path)
    with pytest.raises(ArtifactError, match=r"the demo's family is not at .* Run it from a checkout: make demo"):
        run_demo(tmp_path / "out")
