from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.kernels.bits import cast, count_non_finite, from_float, to_float
from pipeline.kernels.masks import keep_mask, mask_key
from pipeline.kernels.merging import combine, dare

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def some(seed: int, rows: int = 5, width: int = 11) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def test_full_density_is_the_delta_itself() -> None:
    delta = some(0)
    assert torch.equal(dare(delta, (1, 2), 0, 1.0), delta)


@pytest.mark.parametrize("device", DEVICES)
def test_dare_drops_and_rescales(device: str) -> None:
    delta = some(1).to(device)
    key = mask_key(0, "a", "t")
    mask = keep_mask(key, 22, (5, 11), 0.4)
    found = dare(delta, key, 22, 0.4).cpu()
    assert torch.equal(found == 0, ~mask)
    torch.testing.assert_close(found[mask], delta.cpu()[mask] / 0.4)


def test_dare_keeps_the_expectation() -> None:
    delta = torch.ones(400, 400)
    mean = torch.stack([dare(delta, (seed, 0), 0, 0.3) for seed in range(5)]).mean().item()
    assert abs(mean - 1) < 5 * (0.7 / 0.3 / (5 * 160_000)) ** 0.5


def test_mean_is_task_arithmetic_with_one_over_n() -> None:
    deltas = [some(seed) for seed in range(4)]
    assert torch.equal(combine(deltas, [1.0] * 4, None), combine(deltas, [1.0] * 4, 0.25))


def test_combine_is_a_weighted_sum() -> None:
    deltas, weights = [some(seed) for seed in range(3)], [0.5, 2.0, 3.0]
    exact = sum(w * d.double() for w, d in zip(weights, deltas, strict=True))
    torch.testing.assert_close(combine(deltas, weights, None).double(), exact / 5.5, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(combine(deltas, weights, 0.3).double(), exact * 0.3, rtol=1e-5, atol=1e-6)


def test_a_group_of_equal_deltas_is_that_delta() -> None:
    delta = some(7)
    torch.testing.assert_close(combine([delta] * 3, [1.0, 2.0, 4.0], None), delta)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_bits_survive_the_way_to_floats_and_back(dtype: str) -> None:
    """Every finite 16-bit pattern, and fp32 patterns with -0.0, denormals and infinities."""
    bits = np.arange(2**16, dtype=np.uint32).astype("<u2" if dtype != "F32" else "<u4")
    if dtype == "F32":
        bits = bits << 16 | np.uint32(0x1234)
    values = to_float(bits.reshape(256, 256), dtype)
    finite = torch.isfinite(values).numpy()
    np.testing.assert_array_equal(from_float(values, dtype)[finite], bits.reshape(256, 256)[finite])
    assert count_non_finite(bits, dtype) == int((~finite).sum())
    assert count_non_finite(bits, dtype) > 0


def test_casts_round_once_to_nearest_even() -> None:
    values = np.array([[1.0, 1.00390625, 1.01171875, -0.0, 3.0e38]], np.float32)
    found = to_float(cast(values.view("<u4"), "F32", "BF16"), "BF16")
    assert found.tolist() == [[1.0, 1.0, 1.015625, -0.0, float(torch.tensor(3.0e38).bfloat16())]]
