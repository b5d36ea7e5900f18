from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.kernels.masks import keep_mask, limit_of, mask_key, philox
from tests.support.reference import dare_mask, philox_words

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def test_known_answers() -> None:
    """Random123's published vectors for philox4x32-10, where the upper counter words are zero."""
    assert philox(torch.tensor([0]), (0, 0)).tolist() == [[0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]]


def test_counters_beyond_32_bits_equal_the_reference() -> None:
    full = 0xFFFFFFFF
    counters = torch.tensor([1, 2**31, 2**32 - 1, 2**32, 2**40 + 5], dtype=torch.int64)
    expected = [list(philox_words(int(counter), (full, 0x12345678))) for counter in counters]
    assert philox(counters, (full, 0x12345678)).tolist() == expected


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("density", [0.1, 0.5, 0.7, 0.999])
def test_masks_equal_the_reference(density: float, device: str) -> None:
    expected = dare_mask(3, "math", "layer.weight", (7, 9), density)
    found = keep_mask(mask_key(3, "math", "layer.weight"), 0, (7, 9), limit_of(density), device)
    np.testing.assert_array_equal(found.cpu().numpy(), expected)


@given(st.integers(0, 40), st.integers(1, 20), st.integers(1, 13))
def test_masks_do_not_depend_on_the_cut(start: int, rows: int, width: int) -> None:
    whole = keep_mask((1, 2), 0, (start + rows, width), limit_of(0.6))
    part = keep_mask((1, 2), start * width, (rows, width), limit_of(0.6))
    assert torch.equal(whole[start:], part)


def test_density_is_kept() -> None:
    kept = keep_mask(mask_key(0, "a", "b"), 0, (1000, 1000), limit_of(0.7)).double().mean().item()
    assert abs(kept - 0.7) < 4 * (0.7 * 0.3 / 1e6) ** 0.5


def test_keys_differ_by_seed_expert_and_tensor() -> None:
    keys = {mask_key(seed, expert, tensor) for seed in (0, 1) for expert in ("a", "b") for tensor in ("x", "y")}
    assert len(keys) == 8


def test_masks_of_experts_are_independent() -> None:
    a = keep_mask(mask_key(0, "a", "t"), 0, (500, 500), limit_of(0.5))
    b = keep_mask(mask_key(0, "b", "t"), 0, (500, 500), limit_of(0.5))
    assert abs((a & b).double().mean().item() - 0.25) < 0.005
