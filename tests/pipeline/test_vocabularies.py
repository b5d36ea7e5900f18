"""Experts with more, fewer and other tokens than their base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from storage.errors import CheckpointError, PlanError
from tests.support.running import command, merged, rebuilt
from tests.support.tiny_experts import VOCABULARY, Family, Tensors, fine_tuned, write_checkpoint, write_family

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tokenizer(folder: Path, tokens: dict[str, int], added: dict[str, int] | None = None) -> None:
    extra = [{"id": number, "content": token, "special": True} for token, number in (added or {}).items()]
    model = {"type": "WordLevel", "vocab": tokens, "unk_token": "t0"}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": extra, "model": model}))


def words(count: int) -> dict[str, int]:
    return {f"t{number}": number for number in range(count)}


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.equal(found.view(torch.int16), expected.view(torch.int16))


def test_vocabularies_of_the_papers_experts(tmp_path: Path) -> None:
    """Mistral's 32,000 rows, MetaMath's one more, Dolphin's two, Chinese-Mistral's 63,872: shared rows merge, others stay."""
    sizes = {"chinese": 63_872, "instruct": 32_002, "math": 32_001, "code": 32_000}
    shapes = {EMBEDDING: 16, HEAD: 16}
    generator = torch.Generator().manual_seed(0)

    def vocabulary(rows: int) -> Tensors:
        return {name: (torch.randn((rows, width), generator=generator) * 0.05).bfloat16() for name, width in shapes.items()}

    family = write_family(tmp_path / "small")
    base: Tensors = {**family.base, **vocabulary(32_000)}
    folder = tmp_path / "paper"
    write_checkpoint(folder / "base", base, {"vocab_size": 32_000})
    experts = {}
    for name, rows in sizes.items():
        experts[name] = {**family.experts[name], **vocabulary(rows)}
        for tensor in shapes:
            moved = base[tensor].float() + torch.randn(base[tensor].shape, generator=generator) * 0.01
            experts[name][tensor][:32_000] = moved.bfloat16()
        write_checkpoint(folder / name, experts[name], {"vocab_size": rows})
    paper = Family(folder, base, experts)
    rules = [{"match": "*embed_tokens*", "policy": "merge", "groups": 1}]
    outcome = merged(paper.recipe(**{"merge.rules": rules}))
    record = outcome.manifest.tensors[EMBEDDING]
    assert record.rows == 32_000 + sum(rows - 32_000 for rows in sizes.values())
    mean = torch.stack([experts[name][EMBEDDING][:32_000].double() - base[EMBEDDING].double() for name in sizes]).mean(0)
    for name, rows in sizes.items():
        found = rebuilt(outcome, name, tmp_path)
        assert found[EMBEDDING].shape == (rows, 16)
        assert_same(found[EMBEDDING][32_000:], experts[name][EMBEDDING][32_000:])
        torch.testing.assert_close(found[EMBEDDING][:32_000].double(), base[EMBEDDING].double() + mean, rtol=2**-7, atol=1e-6)
        assert_same(found[HEAD], experts[name][HEAD])
    plan = command("plan", paper.recipe())
    assert plan.returncode == 0
    assert all(f"{rows:,}" in plan.stdout for rows in sizes.values())


def test_an_expert_may_have_fewer_tokens(family: Family, tmp_path: Path) -> None:
    """Padded rows of the base that an expert dropped: it keeps those it has."""
    own = {
        name: weight[: VOCABULARY - 3] if name in (EMBEDDING, HEAD) else weight
        for name, weight in family.experts["code"].items()
    }
    own = {name: weight.contiguous() for name, weight in own.items()}
    write_checkpoint(family.folder / "cut", own, {"vocab_size": VOCABULARY - 3})
    recipe = family.recipe(experts={"code": "./cut", "math": "./math", "chinese": "./chinese"})
    outcome = merged(recipe)
    assert_same(rebuilt(outcome, "code", tmp_path)[EMBEDDING], own[EMBEDDING])
    assert "expert code: lm_head.weight has 17 of the base's 20 rows; it keeps these" in outcome.manifest.notes
    rules = [{"match": EMBEDDING, "policy": "merge"}]
    with pytest.raises(
        PlanError,
        match=r"expert code: tensor model.embed_tokens.weight: expected shape \[20, 16\] as in the base, got \[17, 16\]",
    ):
        merged(family.recipe(experts={"code": "./cut", "math": "./math"}, **{"merge.rules": rules}))


def test_other_strings_for_shared_tokens_are_reported(family: Family) -> None:
    tokenizer(family.folder / "base", words(VOCABULARY))
    for name in ("chinese", "code", "instruct"):
        tokenizer(family.expert(name), words(VOCABULARY), {"<new>": VOCABULARY})
    tokenizer(family.expert("math"), {**words(VOCABULARY - 2), "x": VOCABULARY - 2, "y": VOCABULARY - 1}, {"[PAD]": VOCABULARY})
    notes = merged(family.recipe()).manifest.notes
    told = [note for note in notes if "tokens" in note and note.startswith("expert math: 2 of 20")]
    shown = "18 is 'x', in the base 't18', 19 is 'y', in the base 't19'"
    assert told == [f"expert math: 2 of 20 tokens are not the base's: {shown}; it keeps rows and tokenizer of its own"]
    assert not any("tokens are not the base's" in note for note in notes if not note.startswith("expert math"))
    planned = command("plan", family.recipe())
    assert told[0] in planned.stdout


def test_rows_of_different_tokens_are_not_merged(family: Family) -> None:
    tokenizer(family.folder / "base", words(VOCABULARY))
    for name in family.experts:
        tokenizer(family.expert(name), words(VOCABULARY))
    tokenizer(family.expert("math"), {**words(VOCABULARY - 1), "x": VOCABULARY - 1})
    recipe = family.recipe(**{"merge.rules": [{"match": "*embed_tokens*", "policy": "merge"}]})
    with pytest.raises(
        PlanError, match=r"expert math: 1 of 20 tokens .*'t19'; rows of different tokens cannot be merged: make"
    ):
        merged(recipe)
    found = command("plan", recipe)
    assert found.returncode == 2
    assert "rows of different tokens cannot be merged" in found.stderr


def test_a_tokenizer_of_another_kind_is_said_not_to_be_compared(family: Family) -> None:
    tokenizer(family.folder / "base", words(VOCABULARY))
    for name in ("chinese", "code", "instruct"):
        tokenizer(family.expert(name), words(VOCABULARY))
    notes = merged(family.recipe()).manifest.notes
    assert "expert math: it has no tokenizer that can be read, so its tokens were not compared with the base's" in notes


def test_mixed_types_of_base_and_experts(tmp_path: Path) -> None:
    """fp32 and fp16 experts of a bf16 base: every exact row is the expert's, cast once."""
    family = write_family(tmp_path / "family")
    wide = {n: t.float() + 1e-4 for n, t in fine_tuned(family.base, 31).items()}
    half = {n: t.half() for n, t in fine_tuned(family.base, 32).items()}
    write_checkpoint(family.folder / "wide", wide)
    write_checkpoint(family.folder / "half", half)
    outcome = merged(family.recipe(experts={"wide": "./wide", "half": "./half", "code": "./code"}, **{"merge.groups": 3}))
    for name, tensors in {"wide": wide, "half": half, "code": family.experts["code"]}.items():
        found = rebuilt(outcome, name, tmp_path)
        for tensor, weight in tensors.items():
            assert_same(found[tensor], weight.bfloat16())
    assert any("cast once from F32 to the base's BF16" in note for note in outcome.manifest.notes)


def test_an_exports_configuration_says_what_it_is(tmp_path: Path) -> None:
    """The type it was cast to, and no quantisation that its weights do not have; else the file is the expert's own."""
    family = write_family(tmp_path / "family")
    told = {"torch_dtype": "float32", "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    write_checkpoint(family.folder / "wide", {n: t.float() for n, t in fine_tuned(family.base, 31).items()}, told)
    outcome = merged(family.recipe(experts={"wide": "./wide", "code": "./code"}))
    for name in ("wide", "code"):
        rebuilt(outcome, name, tmp_path)
    own = json.loads((family.folder / "wide" / "config.json").read_text())
    found = json.loads((tmp_path / f"{outcome.version}-wide" / "config.json").read_text())
    assert found == {key: value for key, value in own.items() if key != "quantization_config"} | {"torch_dtype": "bfloat16"}
    code = (tmp_path / f"{outcome.version}-code" / "config.json").read_bytes()
    assert code == (family.expert("code") / "config.json").read_bytes()


def test_a_head_that_only_experts_have_does_not_hide_their_tokens(family: Family) -> None:
    path = family.folder / "base" / "model.safetensors"
    save_file({n: t for n, t in load_file(path).items() if n != HEAD}, path)
    tokenizer(family.folder / "base", words(VOCABULARY))
    for name in family.experts:
        tokenizer(family.expert(name), words(VOCABULARY))
    tokenizer(family.expert("math"), {**words(VOCABULARY - 1), "x": VOCABULARY - 1})
    recipe = family.recipe(**{"merge.rules": [{"match": "*embed_tokens*", "policy": "merge"}]})
    with pytest.raises(PlanError, match="rows of different tokens cannot be merged"):
        merged(recipe)


def test_a_tokenizer_that_cannot_be_read_does_not_stop_a_merge_that_needs_none(family: Family) -> None:
    tokenizer(family.folder / "base", words(VOCABULARY))
    for name in family.experts:
        tokenizer(family.expert(name), words(VOCABULARY))
    (family.expert("math") / "tokenizer.json").write_text("{")
    assert any("expert math: its tokens were not compared: " in note for note in merged(family.recipe()).manifest.notes)


def test_a_head_that_a_config_ties_and_that_is_another_is_not_dropped(family: Family, tmp_path: Path) -> None:
    """An equal copy is stored once; one that differs would be lost without a word, and is refused."""
    own = {**family.experts["code"]}
    write_checkpoint(family.folder / "other", own, {"tie_word_embeddings": True})
    with pytest.raises(CheckpointError, match=r"expert other: tensor lm_head.weight: its config ties it to model.embed_tokens"):
        merged(family.recipe(experts={"other": "./other", "math": "./math"}))
    write_checkpoint(family.folder / "same", {**own, HEAD: own[EMBEDDING].clone()}, {"tie_word_embeddings": True})
    outcome = merged(family.recipe(experts={"same": "./same", "math": "./math"}))
    assert HEAD not in rebuilt(outcome, "same", tmp_path)


def test_the_type_of_an_export_is_that_of_most_weights(tmp_path: Path) -> None:
    """A base that keeps its norms in fp32 does not make a bf16 expert an fp32 one."""
    family = write_family(tmp_path / "family")
    base = {n: t.float() if t.dim() == 1 else t for n, t in family.base.items()}
    write_checkpoint(family.folder / "mixed", base)
    outcome = merged(family.recipe(base="./mixed", experts={"code": "./code", "math": "./math"}))
    rebuilt(outcome, "code", tmp_path)
    assert json.loads((tmp_path / f"{outcome.version}-code" / "config.json").read_text())["torch_dtype"] == "bfloat16"
