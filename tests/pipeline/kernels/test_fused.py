"""The compiled path against torch and against float64, bit by bit where the arithmetic is the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.kernels import sizes
from pipeline.kernels.clustering import Clustering, cluster_channels
from pipeline.kernels.compiled import compiled
from pipeline.kernels.forms import COMBINED, COPY_BASE, COPY_EXPERT, Combining, PoolRows, Pruning, in_order_of_channel
from pipeline.kernels.fused import merging as fused
from pipeline.kernels.fused import sizes as fused_sizes
from pipeline.kernels.fused import tables as fused_tables
from pipeline.kernels.fused.floats import TAGS, infinite, narrow, tagged, widen
from pipeline.kernels.fused.philox import fill_words
from pipeline.kernels.masks import keep_mask, limit_of, mask_key, philox
from pipeline.kernels.merging import merge_rows
from pipeline.kernels.methods import catalogue
from pipeline.kernels.partitions import TIE
from pipeline.kernels.tables import table

TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
METHODS = sorted(catalogue.METHODS)


def raw(tensor: torch.Tensor) -> NDArray[Any]:
    """Unsigned bits of a tensor."""
    size = tensor.element_size()
    return tensor.contiguous().view(torch.int16 if size == 2 else torch.int32).numpy().view(f"<u{size}")


@compiled
def _widened(bits: Any, out: Any) -> None:
    for j in range(len(bits)):
        out[j] = widen(bits[j])


@compiled
def _narrowed(values: Any, out: Any) -> None:
    for j in range(len(values)):
        out[j] = narrow(values[j], out[j])


@compiled
def _infinite(bits: Any, out: Any) -> None:
    for j in range(len(bits)):
        out[j] = infinite(bits[j])


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_16_bit_pattern_widens_as_in_torch(dtype: str) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    out, flags = np.empty(len(bits), np.float32), np.empty(len(bits), np.bool_)
    _widened(bits.view(TAGS[dtype]), out)
    _infinite(bits.view(TAGS[dtype]), flags)
    expected = torch.from_numpy(bits.view(np.int16)).view(TYPES[dtype]).float().numpy()
    np.testing.assert_array_equal(flags, ~np.isfinite(expected))
    np.testing.assert_array_equal(out.view(np.uint32)[~flags], expected.view(np.uint32)[~flags])


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_rounding_is_torchs_to_the_bit(dtype: str) -> None:
    """Every 16-bit value, its neighbours, the middles between two of them, denormals, overflow, and random patterns."""
    patterns = torch.from_numpy(np.arange(1 << 16, dtype=np.uint16).view(np.int16))
    exact = np.concatenate([patterns.view(TYPES[d]).float().numpy() for d in ("BF16", "F16")])
    exact = np.sort(exact[np.isfinite(exact)])
    middles = (exact[:-1].astype(np.float64) + exact[1:]) / 2
    random = np.random.default_rng(0).integers(0, 2**32, 500_000, dtype=np.uint32).view(np.float32)
    special = np.array([65504, 65519.99, 65520, 1e-45, -1e-45, 3e38, np.inf, -np.inf, 0.0, -0.0], np.float32)
    near = [np.nextafter(exact, np.float32(side)) for side in (-np.inf, np.inf)]
    values = np.concatenate([exact, *near, middles.astype(np.float32), random[~np.isnan(random)], special])
    out = np.empty(len(values), TAGS[dtype])
    _narrowed(values, out)
    expected = raw(torch.from_numpy(values).to(TYPES[dtype])).view(TAGS[dtype])
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_what_is_no_number_stays_none(dtype: str) -> None:
    values = np.array([0x7FC00000, 0xFFC00000, 0x7FFFFFFF, 0xFF800001], np.uint32).view(np.float32)
    out, flags = np.empty(4, TAGS[dtype]), np.empty(4, np.bool_)
    _narrowed(values, out)
    _infinite(out, flags)
    assert flags.all()


@given(st.integers(0, 2**34), st.integers(1, 40))
def test_words_are_those_of_the_torch_generator(block: int, count: int) -> None:
    key = mask_key(3, "math", "t")
    words = np.empty(4 * count, np.uint32)
    fill_words(np.array(key, np.uint32), 4 * block, words)
    expected = philox(torch.arange(block, block + count), key).reshape(-1).numpy()
    np.testing.assert_array_equal(words, expected.astype(np.uint32))


class Case:
    """Random rows of a base and its experts, with zeros, denormals, huge and equal values, and a grouping."""

    def __init__(self, seed: int, dtype: str, experts: int, shape: tuple[int, int], wild: bool = False) -> None:
        self.generator = np.random.default_rng(seed)
        rows, width = shape
        self.dtype, self.experts, self.rows, self.width = dtype, experts, rows, width
        base = self.generator.normal(size=shape).astype(np.float32) * 0.02
        own = [base + self.generator.normal(size=shape).astype(np.float32) * 0.001 for _ in range(experts)]
        if wild:
            special = np.array([0.0, -0.0, 1e-42, -6e-8, 6e4, -6e4, 0.01, -0.01], np.float32)
            for values in (base, *own):
                mask = self.generator.random(shape) < 0.3
                values[mask] = self.generator.choice(special, int(mask.sum()))
        own[-1][rows // 2] = base[rows // 2]
        self.base = torch.from_numpy(base).to(TYPES[dtype])
        self.own = [torch.from_numpy(values).to(TYPES[dtype]) for values in own]
        self.bits = raw(self.base)
        self.stack = np.stack([(raw(t) - self.bits).view(self.bits.dtype.str.replace("u", "i")) for t in self.own])
        self.deltas = torch.stack([t.float() - self.base.float() for t in self.own])

    def pool(self, singles: int) -> PoolRows:
        """Random groups per channel; groups of one, and whole channels, are also copies of an expert or of the base."""
        channels, users, kinds = [], [], []
        for row in range(self.rows):
            labels = self.generator.integers(0, min(self.experts, 3), self.experts)
            for label in np.unique(labels):
                who = np.flatnonzero(labels == label)
                channels.append(row)
                users.append(sum(1 << int(n) for n in who))
                copies = [COMBINED, COPY_EXPERT, COPY_BASE][int(self.generator.integers(0, 3))]
                kinds.append(copies if len(who) <= singles else COMBINED)
        order = np.lexsort((channels, users))
        picked = [np.array(values)[order] for values in (channels, users, kinds)]
        factors = self.generator.uniform(0.2, 1.5, len(order)).astype(np.float32)
        return in_order_of_channel(picked[0], picked[1].astype(np.uint64), picked[2].astype(np.uint8), factors, self.rows)

    def pruning(self, kind: int, density: float, first: int = 0) -> Pruning:
        keys = [mask_key(1, f"expert {n}", "t") for n in range(self.experts)]
        cut = (
            torch.quantile(self.deltas.abs().reshape(self.experts, -1)[:, :100_000].double(), 1 - density, dim=1)
            .float()
            .numpy()
        )
        scales = np.full(self.experts, 1 / density, np.float32)
        return Pruning(kind, np.array(keys, np.uint32), limit_of(density), scales, cut[None], first)


def both(case: Case, method: str, density: float, mean: bool, threads: int = 1) -> list[tuple[NDArray[Any], Any, int]]:
    """Output, errors and non-finite count of the compiled path and of torch."""
    found = catalogue.method(method, density, "merged")
    rows = case.pool(1)
    pruning = case.pruning(found.form[0], density, first=3 * case.width)
    weights = case.generator.uniform(0.5, 2, (1, case.experts)).astype(np.float32)
    combining = Combining(found.form[1], mean, weights)
    results = []
    out = np.zeros((len(rows.users), case.width), case.bits.dtype)
    errors, bad = fused.merge_rows(
        tagged(case.bits, case.dtype), case.stack, 0, rows, pruning, combining, tagged(out, case.dtype), threads
    )
    results.append((out, errors, bad))
    out = np.zeros_like(out)
    errors, bad = merge_rows(
        case.bits, [raw(t) for t in case.own], [case.dtype] * case.experts, case.dtype, rows, found, pruning, combining, out
    )
    results.append((out, errors, bad))
    return results


@settings(max_examples=80)
@given(
    st.integers(0, 10**6), st.sampled_from(sorted(TYPES)), st.integers(1, 9), st.integers(1, 6), st.integers(1, 1100),
    st.sampled_from(METHODS), st.sampled_from([0.1, 0.7, 1.0]), st.booleans(), st.booleans(),
)  # fmt: skip
def test_both_paths_write_the_same_bits(
    seed: int, dtype: str, experts: int, rows: int, width: int, method: str, density: float, mean: bool, wild: bool
) -> None:
    """One rounding after the same float32 operations in the same order: no last place to differ in."""
    case = Case(seed, dtype, experts, (rows, width), wild)
    (ours, errors, bad), (theirs, expected, known) = both(case, method, density, mean)
    np.testing.assert_array_equal(ours, theirs)
    assert bad == known
    if not bad:
        np.testing.assert_allclose(errors, expected, rtol=1e-4, atol=1e-30)


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_threads_change_nothing(threads: int) -> None:
    expected = both(Case(4, "BF16", 4, (33, 257)), "dare_ties", 0.6, mean=True)[0]
    found = both(Case(4, "BF16", 4, (33, 257)), "dare_ties", 0.6, mean=True, threads=threads)[0]
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])


def test_values_that_overflow_are_counted() -> None:
    case = Case(5, "F16", 3, (4, 600))
    rows = case.pool(0)
    rows = replace_factors(rows, 1e9)
    out = np.zeros((len(rows.users), case.width), case.bits.dtype)
    pruning, combining = case.pruning(0, 1.0), Combining(0, False, np.ones((1, 3), np.float32))
    _, bad = fused.merge_rows(tagged(case.bits, "F16"), case.stack, 0, rows, pruning, combining, tagged(out, "F16"))
    assert bad == int((~torch.isfinite(torch.from_numpy(out.view(np.int16)).view(torch.float16))).sum())
    assert bad > 100


def replace_factors(rows: PoolRows, factor: float) -> PoolRows:
    return rows._replace(factors=np.full_like(rows.factors, factor))


@pytest.mark.parametrize("dtype", sorted(TYPES))
@pytest.mark.parametrize("kind", ["gram", "l1", "sign", "sums"])
def test_tables_of_both_paths_equal_float64(kind: str, dtype: str) -> None:
    case = Case(6, dtype, 5, (7, 1301), wild=dtype != "F16")
    deltas = case.deltas.double().numpy()
    signs = np.sign(deltas)
    expected = {
        "gram": np.einsum("nri,mri->rnm", deltas, deltas),
        "l1": np.abs(deltas[:, None] - deltas[None]).sum(axis=-1).transpose(2, 0, 1),
        "sign": np.einsum("nri,mri->rnm", signs, signs),
        "sums": deltas.sum(axis=-1).T[..., None],
    }[kind]
    ours = fused_tables.table(tagged(case.bits, dtype), case.stack, 0, kind, threads=2)
    theirs = table(case.deltas, kind).numpy()
    scale = np.abs(expected).max()
    for found in (ours, theirs):
        np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-13 * scale)
        if kind != "sums":
            np.testing.assert_array_equal(found, found.transpose(0, 2, 1))
    rows = [fused_tables.table(tagged(case.bits[r : r + 1], dtype), case.stack, r, kind) for r in range(7)]
    np.testing.assert_array_equal(np.concatenate(rows), ours)


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from(sorted(TYPES)), st.integers(1, 700), st.floats(0, 1), st.booleans())
def test_row_thresholds_are_the_kth_largest(seed: int, dtype: str, width: int, density: float, wild: bool) -> None:
    case = Case(seed, dtype, 3, (4, width), wild)
    k = round(density * width)
    found = np.empty((4, 3), np.float32)
    fused_sizes.row_thresholds(tagged(case.bits, dtype), case.stack, 0, k, found)
    theirs = np.stack([sizes.row_thresholds(delta, k) for delta in case.deltas], axis=1)
    descending = np.sort(case.deltas.abs().numpy(), axis=-1)[:, :, ::-1]
    expected = descending[:, :, k - 1].T if k else np.full((4, 3), np.inf)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(theirs, expected)


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from(sorted(TYPES)), st.integers(1, 500), st.floats(0.001, 1), st.booleans())
def test_counts_lead_to_the_exact_threshold(seed: int, dtype: str, width: int, density: float, wild: bool) -> None:
    """Ingest's counts find the range, low counts of either path the number: the k-th largest of the whole tensor."""
    case = Case(seed, dtype, 2, (5, width), wild)
    k = max(1, round(density * 5 * width))
    squares, base_squares, counts = np.empty(5), np.empty(5), np.zeros(sizes.BINS, np.int64)
    largest = fused_sizes.measure(tagged(raw(case.own[1]), dtype), tagged(case.bits, dtype), 5, squares, base_squares, counts)
    delta = case.deltas[1].numpy()
    descending = np.sort(np.abs(delta).reshape(-1))[::-1]
    assert largest == descending[0]
    assert counts.sum() == delta.size
    np.testing.assert_allclose(squares, (delta.astype(np.float64) ** 2).sum(axis=1), rtol=1e-12)
    np.testing.assert_allclose(base_squares, case.base.double().square().sum(dim=1).numpy(), rtol=1e-12)
    high, left = sizes.bin_of(counts, k)
    low = np.zeros(sizes.LOW, np.int64)
    fused_sizes.count_low(tagged(case.bits, dtype), case.stack, 0, 1, high, low)
    np.testing.assert_array_equal(low, sizes.low_counts(case.deltas[1], high))
    assert sizes.threshold(high, sizes.bin_of(low, left)[0]) == descending[k - 1]


@pytest.mark.parametrize("dtype", sorted(TYPES))
def test_masses_weigh_the_same_masks(dtype: str) -> None:
    case = Case(9, dtype, 2, (6, 333))
    key, first = mask_key(2, "code", "t"), 5 * 333
    mask = keep_mask(key, first, (6, 333), limit_of(0.4))
    found = np.empty((6, 2))
    keys = np.array(key, np.uint32)
    fused_sizes.row_masses(tagged(case.bits, dtype), case.stack, 0, 1, keys, limit_of(0.4), first, found)
    size = case.deltas[1].double().abs().numpy()
    expected = np.stack([size.sum(axis=1), (size * mask.numpy()).sum(axis=1)], axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    np.testing.assert_allclose(sizes.row_masses(case.deltas[1], mask), expected, rtol=1e-12)


def test_both_paths_group_alike_but_for_ties_that_are_made() -> None:
    """Gram matrices of the two paths differ in their last bits: of a thousand channels none groups otherwise. Then ties.

    Orthogonal deltas, where all partitions score alike, with one cosine raised so that the best partition leads by just
    the width of a tie: there, and only there, the last bits may decide. The channels made to lie within them are counted.
    """
    case = Case(12, "F32", 5, (1000, 96))
    ours = fused_tables.table(tagged(case.bits, "F32"), case.stack, 0, "gram")
    theirs = table(case.deltas, "gram").numpy()
    assert (ours != theirs).any()
    draws = np.zeros(1000, np.int64)
    for groups in (2, 3, 4):
        labels = [cluster_channels(gram, groups, Clustering("kmeans", "cosine"), draws) for gram in (ours, theirs)]
        np.testing.assert_array_equal(labels[0], labels[1])
    edge = np.tile(np.eye(4), (200, 1, 1))
    # two pairs score 2 + c, the tied partition before them 2: the lead is a share TIE of the best where c = 2 TIE / (1 - TIE)
    steps = np.concatenate([np.linspace(-50, 50, 100) * 1e-16, np.linspace(-1, 1, 100) * 1e-8])
    raised = 2 * TIE / (1 - TIE) + steps
    edge[:, 2, 3] = edge[:, 3, 2] = raised
    near = edge * (1 + 1e-15)
    found = [cluster_channels(gram, 2, Clustering("kmeans", "cosine"), draws[:200]) for gram in (edge, near)]
    differ = (found[0] != found[1]).any(axis=1)
    assert not differ[np.abs(steps) > 1e-14].any()
    assert differ.sum() <= np.count_nonzero(np.abs(steps) <= 1e-14)
    assert differ[np.abs(steps) <= 1e-14].sum() == differ.sum()
    assert len(np.unique(found[0], axis=0)) == 2


def test_infinite_values_are_counted() -> None:
    bits = raw(torch.tensor([[1.0, float("inf")], [float("nan"), -float("inf")]], dtype=torch.float16))
    assert fused_sizes.count_infinite(tagged(bits, "F16")) == 3


def test_a_method_of_full_density_prunes_nothing() -> None:
    assert catalogue.method("dare", 1.0, "merged").form == replace(catalogue.METHODS["task_arithmetic"]).form
