"""The merge methods' torch functions against their definitions, and the way of numbers to bits and back."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.kernels.bits import cast, count_non_finite, from_float, to_float
from pipeline.kernels.forms import ELECT, MASK, SUM, TRIM, WHOLE, Pruning, with_keys
from pipeline.kernels.masks import keep_mask, limit_of, mask_key
from pipeline.kernels.methods import byom, catalogue, slerp
from pipeline.kernels.methods.interface import added, whole
from pipeline.kernels.methods.ties import elected
from pipeline.recipe import MergeSection
from tests.support import reference_methods as reference
from tests.support.reference import Floats

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def some(seed: int, rows: int = 5, width: int = 11) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def pruning(
    kind: int = WHOLE, *, limit: int = 0, key: tuple[int, int] = (0, 0), scale: float = 1.0, cut: float = 0.0, first: int = 0
) -> Pruning:
    """What is done to the delta of the one expert there is."""
    return Pruning(kind, with_keys([key]), limit, np.array([scale], np.float32), np.array([[cut]], np.float32), first)


def masked(delta: torch.Tensor, key: tuple[int, int], density: float, first: int = 0) -> torch.Tensor:
    """DARE's pruning."""
    how = pruning(MASK, limit=limit_of(density), key=key, scale=1 / density, first=first)
    return catalogue.method("dare", density, "merged").prune(delta, 0, how)


def ones(count: int) -> list[torch.Tensor]:
    return [torch.ones(1, 1)] * count


def test_the_catalogue_has_every_method_of_the_recipe() -> None:
    names = get_args(MergeSection.model_fields["method"].annotation)
    assert set(names) == {*catalogue.METHODS, "byom"}
    forms = {name: catalogue.method(name, 0.5, "merged").form for name in names}
    assert forms == {
        "average": (WHOLE, SUM), "task_arithmetic": (WHOLE, SUM), "ties": (TRIM, ELECT), "dare": (MASK, SUM),
        "dare_ties": (MASK, ELECT), "slerp": (WHOLE, SUM), "byom": (WHOLE, SUM),
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(catalogue.METHODS))
def test_full_density_is_the_delta_itself(name: str) -> None:
    delta = some(0)
    found = catalogue.method(name, 1.0, "merged")
    assert torch.equal(found.prune(delta, 0, pruning(found.form[0])), delta)
    assert found.form[0] == WHOLE


@pytest.mark.parametrize("device", DEVICES)
def test_dare_drops_and_rescales(device: str) -> None:
    delta = some(1).to(device)
    key = mask_key(0, "a", "t")
    mask = keep_mask(key, 22, (5, 11), limit_of(0.4))
    found = masked(delta, key, 0.4, first=22).cpu()
    assert torch.equal(found == 0, ~mask)
    torch.testing.assert_close(found[mask], delta.cpu()[mask] / 0.4)


def test_dare_keeps_the_expectation() -> None:
    delta = torch.ones(400, 400)
    mean = torch.stack([masked(delta, (seed, 0), 0.3) for seed in range(5)]).mean().item()
    assert abs(mean - 1) < 5 * (0.7 / 0.3 / (5 * 160_000)) ** 0.5


def test_trimming_keeps_every_entry_of_the_thresholds_size() -> None:
    delta = torch.tensor([[3.0, -2.0, 2.0, 1.0, -0.0], [0.5, -4.0, 2.0, -2.0, 1.9]])
    ties = catalogue.method("ties", 0.5, "merged")
    found = ties.prune(delta, 0, pruning(TRIM, cut=2.0))
    assert found.tolist() == [[3.0, -2.0, 2.0, 0.0, 0.0], [0.0, -4.0, 2.0, -2.0, 0.0]]
    per_row = pruning(TRIM)._replace(thresholds=np.array([[3.0], [np.inf]], np.float32))
    assert ties.prune(delta, 0, per_row).tolist() == [[3.0, 0, 0, 0, 0], [0.0] * 5]


def test_a_sum_is_weighted_and_in_float32() -> None:
    deltas, weights = [some(seed) for seed in range(3)], [0.5, 2.0, 3.0]
    exact = sum(w * d.double() for w, d in zip(weights, deltas, strict=True))
    found = added(deltas, [torch.full((1, 1), w) for w in weights], False)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), torch.as_tensor(exact), rtol=1e-5, atol=1e-6)


def test_weights_may_differ_per_row() -> None:
    deltas = [some(seed) for seed in range(2)]
    columns = [some(seed, 5, 1).abs() + 0.1 for seed in (10, 11)]
    for combine in (added, elected):
        found = combine(deltas, columns, False)
        rows = [combine([d[i : i + 1] for d in deltas], [c[i : i + 1] for c in columns], False) for i in range(5)]
        assert torch.equal(found, torch.cat(rows))


def test_only_what_is_pruned_differs_between_dare_and_task_arithmetic() -> None:
    assert catalogue.METHODS["dare"].combine is catalogue.METHODS["task_arithmetic"].combine is added
    assert catalogue.METHODS["average"].prune is catalogue.METHODS["task_arithmetic"].prune is whole


@settings(max_examples=50)
@given(st.integers(1, 6), st.integers(0, 10**6), st.booleans())
def test_signs_are_elected_as_by_definition(count: int, seed: int, mean: bool) -> None:
    """Whole numbers and powers of two as weights: float32 is exact, so that ties are ties, and go to +."""
    generator = np.random.default_rng(seed)
    deltas = generator.integers(-4, 5, (count, 3, 40)).astype(np.float32)
    weights = generator.choice([0.5, 1.0, 2.0], count).tolist()
    found = elected([torch.from_numpy(d) for d in deltas], [torch.full((1, 1), w) for w in weights], mean)
    for row in range(3):
        expected, _ = reference.elected([d[row].astype(np.float64) for d in deltas], weights, mean)
        np.testing.assert_allclose(found[row].numpy(), expected, rtol=1e-6)


def test_an_election_by_hand() -> None:
    deltas = [
        torch.tensor([row]) for row in ([1.0, 3.0, -1.0, 0.0, 5.0], [-1.0, -1.0, -2.0, 0.0, 0.0], [0.0, -1.0, 9.0, 0.0, 3.0])
    ]
    assert elected(deltas, ones(3), True).tolist() == [[1.0, 3.0, 9.0, 0.0, 4.0]]
    assert elected(deltas, ones(3), False).tolist() == [[1.0, 3.0, 9.0, 0.0, 8.0]]
    heavy = [torch.full((1, 1), w) for w in (1.0, 4.0, 1.0)]
    assert elected(deltas, heavy, True).tolist() == [[-1.0, pytest.approx(-1.0), 9.0, 0.0, 4.0]]


@settings(max_examples=40)
@given(st.integers(2, 6), st.integers(0, 10**6))
def test_elected_entries_are_bounded_and_need_no_order(count: int, seed: int) -> None:
    deltas = [some(seed + n, 4, 50) for n in range(count)]
    found = elected(deltas, ones(count), True)
    assert bool((found.abs() <= torch.stack(deltas).abs().amax(dim=0) * (1 + 1e-6)).all())
    torch.testing.assert_close(elected(deltas[::-1], ones(count), True), found)
    mass = torch.stack(deltas).sum(dim=0)
    clear = mass.abs() > 1e-4
    assert torch.equal(found.sign()[clear], mass.sign()[clear])


def test_of_two_that_disagree_the_larger_survives() -> None:
    a, b = some(1), -some(1) * torch.where(some(2) > 0, 0.5, 2.0)
    assert torch.equal(elected([a, b], ones(2), True), torch.where(a.abs() >= b.abs(), a, b))


def test_equal_deltas_merge_to_themselves() -> None:
    delta = some(7)
    assert torch.equal(elected([delta] * 4, ones(4), True), delta)
    torch.testing.assert_close(added([delta] * 4, ones(4), True) / 4, delta)


def gram_of(a: Floats, b: Floats) -> NDArray[np.float64]:
    pair = np.stack([a, b])
    return np.asarray((pair @ pair.T)[None])


@settings(max_examples=50)
@given(st.integers(0, 10**6), st.floats(0, 1), st.floats(0.1, 10))
def test_weights_of_a_pair_lead_along_the_arc(seed: int, t: float, ratio: float) -> None:
    a, b = np.random.default_rng(seed).normal(size=(2, 12))
    b = b * ratio
    first, second = slerp.pair_weights(gram_of(a, b), t)[0]
    np.testing.assert_allclose(first * a + second * b, reference.arc(a, b, t), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(slerp.pair_weights(gram_of(b, a), 1 - t)[0], [second, first], rtol=1e-9, atol=1e-12)


def test_the_arc_ends_at_its_members_and_keeps_lengths() -> None:
    generator = np.random.default_rng(3)
    a = generator.normal(size=20)
    b = generator.normal(size=20)
    b -= a * (a @ b) / (a @ a)
    b *= np.linalg.norm(a) / np.linalg.norm(b)
    assert slerp.pair_weights(gram_of(a, b), 0.0)[0].tolist() == [1.0, 0.0]
    assert slerp.pair_weights(gram_of(a, b), 1.0)[0].tolist() == [0.0, 1.0]
    np.testing.assert_allclose(slerp.pair_weights(gram_of(a, b), 0.5)[0], [0.5**0.5] * 2, rtol=1e-12)
    for t in (0.1, 0.5, 0.8):
        first, second = slerp.pair_weights(gram_of(a, b), t)[0]
        assert np.linalg.norm(first * a + second * b) == pytest.approx(np.linalg.norm(a))


@pytest.mark.parametrize(("factor", "what"), [(1.0, "equal"), (2.5, "parallel"), (-1.0, "opposite"), (0.0, "zero")])
def test_on_a_line_slerp_is_linear(factor: float, what: str) -> None:
    a = np.random.default_rng(4).normal(size=9)
    assert slerp.pair_weights(gram_of(a, factor * a), 0.3)[0].tolist() == [0.7, 0.3], what
    assert slerp.pair_weights(np.zeros((2, 2, 2)), 0.3).tolist() == [[0.7, 0.3]] * 2


def test_columns_kept_are_the_largest_and_of_equals_the_first() -> None:
    values = torch.tensor([[1.0, -3.0, 3.0, 0.5, 3.0], [0.0, -0.0, 0.0, 0.0, 0.0], [-5.0, 1.0, -1.0, 2.0, 4.0]])
    assert byom.kept_columns(values, 2).tolist() == [[1, 2], [0, 1], [0, 4]]
    assert byom.kept_columns(values, 0).shape == (3, 0)
    assert [byom.kept_per_row(0.3, width) for width in (1, 5, 10, 16)] == [0, 2, 3, 5]


def test_the_largest_leave_the_delta_and_nothing_else() -> None:
    delta = some(5, 6, 17)
    rest = catalogue.method("byom", 0.7, "delta").prune(delta, 0, pruning(limit=5))
    for row in range(6):
        expected = reference.without_largest(delta.double().numpy()[row : row + 1], 5 / 17)
        np.testing.assert_array_equal(rest[row : row + 1].double().numpy(), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("residual", ["merged", "delta"])
def test_a_residue_of_everything_is_the_expert(residual: str, device: str) -> None:
    """For ``delta`` where the merged rest is the base, as it is with nothing left to merge."""
    base, own, shared = (from_float(some(seed), "BF16") for seed in (0, 1, 2))
    under = base if residual == "delta" else shared
    rows = byom.Rows(own, "BF16", to_float(own, "BF16") - to_float(base, "BF16"), under, "BF16", np.zeros(5, bool))
    columns, values = byom.residue(rows, 11, residual, device)
    assert columns.dtype == np.int32
    assert columns.tolist() == [list(range(11))] * 5
    np.testing.assert_allclose(to_float(values, "BF16"), to_float(own, "BF16"), rtol=1e-2, atol=1e-2)
    if residual == "merged":
        np.testing.assert_array_equal(values, own)


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
