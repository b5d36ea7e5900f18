from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import LoraConfig
from peft.tuners.lora.layer import Embedding, Linear

from pipeline.kernels.lowrank import added, delta_rows, embedding_delta_rows

RANK, ROWS, WIDTH, SCALE = 5, 70, 96, 0.7 / 3


def factors(seed: int, outer: int, inner: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A (rank, inner) and B (outer, rank)."""
    generator = np.random.default_rng(seed)
    return (
        generator.normal(0, 0.1, (RANK, inner)).astype(np.float32),
        generator.normal(0, 0.1, (outer, RANK)).astype(np.float32),
    )


def exact(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    """Entry by entry in float64, without a matrix product."""
    result: NDArray[np.float64] = SCALE * (b.astype(np.float64)[:, :, None] * a.astype(np.float64)[None]).sum(1)
    return result


def bound(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    """The most that rank products, their sum and one scaling in float32 can be off."""
    return (RANK + 2) * 2.0**-24 * exact(abs(a), abs(b))


def test_linear_is_scale_times_b_a() -> None:
    a, b = factors(0, ROWS, WIDTH)
    got = delta_rows(a, b, SCALE)
    assert got.dtype == np.float32
    assert (abs(got - exact(a, b)) <= bound(a, b)).all()


def test_embedding_is_its_transposition() -> None:
    a, b = factors(1, WIDTH, ROWS)
    got = embedding_delta_rows(a, b, SCALE)
    assert got.shape == (ROWS, WIDTH)
    assert got.flags.c_contiguous
    assert (abs(got - exact(a, b).T) <= bound(a, b).T).all()


def test_linear_has_the_bits_of_peft() -> None:
    a, b = factors(2, ROWS, WIDTH)
    layer = Linear(torch.nn.Linear(WIDTH, ROWS), "x", LoraConfig(), r=RANK, lora_alpha=1)
    layer.lora_A["x"].weight.data, layer.lora_B["x"].weight.data = torch.from_numpy(a), torch.from_numpy(b)
    layer.scaling["x"] = SCALE
    np.testing.assert_array_equal(delta_rows(a, b, SCALE), layer.get_delta_weight("x").detach().numpy())


def test_embedding_has_the_bits_of_peft() -> None:
    a, b = factors(3, WIDTH, ROWS)
    layer = Embedding(torch.nn.Embedding(ROWS, WIDTH), "x", LoraConfig(), r=RANK, lora_alpha=1)
    layer.lora_embedding_A["x"], layer.lora_embedding_B["x"] = (torch.nn.Parameter(torch.from_numpy(t)) for t in (a, b))
    layer.scaling["x"] = SCALE
    np.testing.assert_array_equal(embedding_delta_rows(a, b, SCALE), layer.get_delta_weight("x").detach().numpy())


def test_a_part_of_the_rows_is_the_same_but_for_rounding() -> None:
    a, b = factors(4, ROWS, WIDTH)
    part = delta_rows(a, b[10:13], SCALE)
    assert (abs(part - exact(a, b)[10:13]) <= bound(a, b)[10:13]).all()


def test_slices_and_read_only_factors_are_read_as_they_are() -> None:
    a, b = factors(5, ROWS, 2 * WIDTH)
    left = a[:, :WIDTH]
    left.setflags(write=False)
    np.testing.assert_array_equal(delta_rows(left, b, SCALE), delta_rows(left.copy(), b, SCALE))
    np.testing.assert_array_equal(embedding_delta_rows(left, b, SCALE), delta_rows(left.copy(), b, SCALE).T)


def test_factors_are_left_as_they_were() -> None:
    a, b = factors(6, ROWS, WIDTH)
    before = a.copy(), b.copy()
    delta_rows(a, b, SCALE)
    np.testing.assert_array_equal(a, before[0])
    np.testing.assert_array_equal(b, before[1])


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_added_rounds_once_to_nearest(dtype: str) -> None:
    kind = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]
    generator = torch.Generator().manual_seed(7)
    base = (torch.randn((40, 64), generator=generator) * 0.05).to(kind)
    delta = torch.randn((40, 64), generator=generator) * 0.01
    signed = torch.int32 if dtype == "F32" else torch.int16
    bits = added(base.view(signed).numpy().view(f"<u{base.element_size()}"), dtype, delta.numpy())
    got = torch.from_numpy(bits.view(f"<i{base.element_size()}")).view(kind).to(torch.float64)
    # both neighbours of the sum in its own type: none may be nearer to it than what was taken
    total = (base.float() + delta).to(torch.float64)
    for side in (torch.inf, -torch.inf):
        neighbour = torch.nextafter(got.to(kind), torch.tensor(side, dtype=kind)).to(torch.float64)
        assert ((got - total).abs() <= (neighbour - total).abs()).all()
    np.testing.assert_array_equal(bits.shape, (40, 64))


def test_added_keeps_bits_where_the_delta_is_zero() -> None:
    base = np.array([[0x3F80, 0xBDCC, 0x0001, 0x8001]], np.uint16)
    np.testing.assert_array_equal(added(base, "BF16", np.zeros((1, 4), np.float32)), base)
