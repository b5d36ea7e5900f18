from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pipeline import memory
from pipeline.drafting import make_plan
from pipeline.job import plan_recipe
from pipeline.opening import Opened, arrange
from pipeline.plan import plan_blocks
from pipeline.recipe import load_recipe
from pipeline.roles import natural_order, roles, tie_partner
from storage.errors import CheckpointError, PlanError
from storage.layout import chunk_rows
from tests.support.tiny_experts import NAMES, Family, open_at, shapes


@dataclass(frozen=True)
class Matrix:
    name: str
    rows: int
    width: int
    chunk_rows: int
    slab_bytes: int = 0
    matrix_rows: int = 0


@st.composite
def matrices(draw: st.DrawFn) -> list[Matrix]:
    found = []
    for layer in range(draw(st.integers(1, 3))):
        for member in range(draw(st.integers(1, 4))):
            rows, width = draw(st.integers(1, 50)), draw(st.integers(1, 9))
            found.append(Matrix(f"model.layers.{layer}.m{member}", rows, width, draw(st.integers(1, rows))))
    return found


@given(matrices(), st.integers(1, 500))
def test_blocks_cover_every_row_once_and_share_no_chunk(tensors: list[Matrix], limit: int) -> None:
    blocks = plan_blocks(tensors, limit)
    by_name = {tensor.name: tensor for tensor in tensors}
    covered = [(p.tensor, row) for block in blocks for p in block.pieces for row in range(p.start, p.stop)]
    assert sorted(covered) == sorted((tensor.name, row) for tensor in tensors for row in range(tensor.rows))
    for block in blocks:
        assert len({piece.tensor.rsplit(".", 1)[0] for piece in block.pieces}) == 1
        for piece in block.pieces:
            tensor = by_name[piece.tensor]
            assert piece.start % tensor.chunk_rows == 0
            assert piece.stop % tensor.chunk_rows == 0 or piece.stop == tensor.rows
        elements = sum((p.stop - p.start) * by_name[p.tensor].width for p in block.pieces)
        assert len(block.pieces) == 1 or elements <= limit


@given(st.integers(1, 40), st.integers(1, 30), st.integers(1, 50), st.integers(1, 400))
def test_matrices_that_are_read_whole_are_seldom_cut(matrices: int, outputs: int, step: int, limit: int) -> None:
    """Packed experts stored (in, out): every chunk in one piece, and pieces of eight matrices at least, but for the last."""
    tensor = Matrix("model.layers.0.experts", matrices * outputs, 4, min(step, matrices * outputs), matrix_rows=outputs)
    pieces = [piece for block in plan_blocks([tensor], limit) for piece in block.pieces]
    assert [row for piece in pieces for row in range(piece.start, piece.stop)] == list(range(tensor.rows))
    assert all(piece.start % tensor.chunk_rows == 0 for piece in pieces)
    assert all(piece.stop - piece.start >= 8 * outputs for piece in pieces[:-1])


@pytest.mark.parametrize(
    ("name", "shape", "policy"),
    [
        ("model.layers.0.self_attn.q_proj.weight", (16, 16), "merge"),
        ("model.layers.11.mlp.experts.3.w1.weight", (16, 16), "merge"),
        ("transformer.h.2.mlp.c_fc.weight", (16, 64), "merge"),
        ("bert.encoder.layer.1.output.dense.weight", (16, 16), "merge"),
        ("model.layers.0.input_layernorm.weight", (16,), "private"),
        ("model.layers.0.self_attn.q_proj.bias", (16,), "private"),
        ("model.embed_tokens.weight", (20, 16), "private"),
        ("lm_head.weight", (20, 16), "private"),
        ("model.layers.0.mlp.experts.gate_up_proj", (4, 16, 16), "private"),
        ("model.norm.weight", (16,), "private"),
    ],
)
def test_default_policies(name: str, shape: tuple[int, ...], policy: str) -> None:
    assert roles({name: shape}, {})[name].policy == policy


def test_layers_sort_as_numbers() -> None:
    assert sorted(["l.10.w", "l.9.w"], key=natural_order) == ["l.9.w", "l.10.w"]


def test_tie_partners() -> None:
    tensors = {"model.embed_tokens.weight": 0, "model.norm.weight": 0}
    assert tie_partner("lm_head.weight", tensors) == "model.embed_tokens.weight"
    assert tie_partner("model.norm.weight", tensors) is None


def opened(family: Family) -> Opened:
    experts = {name: open_at(f"expert {name}", family.expert(name)) for name in NAMES}
    return arrange(open_at("base", family.folder / "base"), experts)


def test_every_tensor_has_a_policy_and_rows(family: Family) -> None:
    plan = make_plan(load_recipe(family.recipe()), opened(family))
    assert set(plan.tensors) == set(shapes())
    embedding = plan.tensors["model.embed_tokens.weight"]
    assert (embedding.policy, embedding.groups, embedding.base_rows, embedding.rows) == ("private", 0, 20, 32)
    assert any("expert chinese: lm_head.weight has 12 rows beyond" in note for note in plan.notes)


def test_a_budget_too_small_is_refused_with_the_remedy(family: Family) -> None:
    recipe = load_recipe(family.recipe(**{"cluster.memory": "4KB"}))
    with pytest.raises(PlanError, match=r"set cluster.memory to at least 1MiB"):
        make_plan(recipe, opened(family))


@given(st.integers(1, 4000), st.integers(1, 20_000), st.integers(1, 8), st.integers(20, 33))
def test_slices_keep_to_the_budget(rows: int, width: int, experts: int, power: int) -> None:
    """Whenever the plan accepts a tensor, chunk and slice together stay under the budget."""
    budget = 2**power
    step = chunk_rows(rows, width)
    tensor = Matrix("t", rows, width, step)
    if memory.problems(budget, experts, [tensor]):
        return
    slice_rows = memory.slice_rows(budget, step, width, experts)
    assert slice_rows >= 1
    assert memory.chunk_bytes(step * width, experts) + slice_rows * width * memory.element_bytes(experts) <= budget


def test_a_key_that_one_config_leaves_to_its_default_is_no_problem(family: Family) -> None:
    path = family.expert("math") / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "head_dim": 4}))
    assert make_plan(load_recipe(family.recipe()), opened(family)).experts == NAMES


def test_integer_buffers_of_different_types_are_refused(family: Family) -> None:
    for name, dtype in [("base", torch.int64), *((n, torch.int64) for n in NAMES if n != "math"), ("math", torch.int32)]:
        path = min((family.folder / name).glob("*.safetensors"))
        save_file({**load_file(path), "model.buffer": torch.arange(5, dtype=dtype)}, path)
    with pytest.raises(PlanError, match=r"expert math: tensor model.buffer: expected data type I64, got I32"):
        make_plan(load_recipe(family.recipe()), opened(family))


def test_plan_reads_headers_only(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights replaced by a hole of the same size plan the same."""
    expected = make_plan(load_recipe(family.recipe()), opened(family))
    path = family.expert("math") / "model.safetensors"
    size = path.stat().st_size
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    with path.open("r+b") as file:
        file.truncate(header)
        file.truncate(size)
    assert make_plan(load_recipe(family.recipe()), opened(family)) == expected


def test_what_can_be_opened_is_judged_although_another_cannot(family: Family) -> None:
    """One torn file, one misfit: both are told, each by its expert's name."""
    path = family.expert("instruct") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    path = family.expert("math") / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = torch.ones(18, dtype=torch.bfloat16)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match="checkpoints cannot be merged: 2 problems") as caught:
        plan_recipe(load_recipe(family.recipe()))
    torn, misfit = caught.value.problems
    assert torn.startswith("expert instruct: ")
    assert misfit.startswith("expert math: tensor model.norm.weight: expected shape [16] as in the base, got [18]")


def test_an_expert_may_be_called_base(family: Family) -> None:
    plan = plan_recipe(load_recipe(family.recipe(experts={"base": "./math", "code": "./code"})))
    assert plan.experts == ("base", "code")
    assert any("expert base: lm_head.weight has 1 row beyond" in note for note in plan.notes)
