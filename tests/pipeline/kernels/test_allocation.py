from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.kernels.allocation import allocate, group_errors, knee
from pipeline.kernels.clustering import Clustering, cluster_channels
from tests.support.reference import Floats, spread


def errors_over_vectors(deltas: Floats, labels: NDArray[np.uint8], norms: Floats, weights: Floats) -> Floats:
    """The definition: squared distances to the groups' weighted means, channel by channel. ``deltas``: (rows, N, width)."""
    out = np.zeros(len(deltas))
    for row, rows in enumerate(deltas):
        for group in set(labels[row].tolist()):
            members = np.flatnonzero(labels[row] == group)
            centre = np.average(rows[members], axis=0, weights=weights[members])
            out[row] += sum(float(((rows[n] - centre) ** 2).sum()) / norms[n] for n in members if norms[n] > 0)
    return out


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_errors_are_those_of_vectors(count: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    deltas = generator.normal(size=(6, count, 9)) * generator.uniform(0.1, 10, (1, count, 1))
    deltas[:, 0] = 0
    norms, weights = (deltas**2).sum(axis=(0, 2)), generator.uniform(0.2, 3, count)
    labels = generator.integers(0, count, (6, count)).astype(np.uint8)
    found = group_errors(deltas @ deltas.transpose(0, 2, 1), labels, norms, weights)
    np.testing.assert_allclose(found, errors_over_vectors(deltas, labels, norms, weights), rtol=1e-9, atol=1e-12)


def test_equal_weights_and_norms_give_the_spread() -> None:
    deltas = np.random.default_rng(0).normal(size=(20, 5, 8))
    products = deltas @ deltas.transpose(0, 2, 1)
    labels = cluster_channels(products, 2, Clustering("kmeans", "euclidean"), np.zeros(20, np.int64))
    found = group_errors(products, labels, np.ones(5), np.ones(5))
    for row in range(20):
        blocks = [np.flatnonzero(labels[row] == group).tolist() for group in range(2)]
        assert found[row] == pytest.approx(spread(deltas[row], blocks))


def test_single_and_equal_deltas_have_no_error_at_all() -> None:
    """Not even rounding, however large the deltas and odd the weights."""
    deltas = np.random.default_rng(1).normal(size=(10, 4, 50)) * 1e6
    deltas[:, 2] = deltas[:, 1] = deltas[:, 3]
    products = np.einsum("rni,rmi->rnm", deltas, deltas)
    labels = np.tile(np.array([0, 1, 1, 1], np.uint8), (10, 1))
    assert group_errors(products, labels, np.ones(4), np.array([0.3, 0.7, 1.1, 3.0])).tolist() == [0.0] * 10


def test_an_expert_without_norm_counts_for_nothing_but_the_mean() -> None:
    products = np.diag([0.0, 4.0])[None]
    labels = np.zeros((1, 2), np.uint8)
    assert group_errors(products, labels, np.array([0.0, 4.0]), np.ones(2)).tolist() == [0.25]
    assert group_errors(products, labels, np.array([0.0, 4.0]), np.array([3.0, 1.0])).tolist() == [0.5625]
    with pytest.raises(ValueError, match="weights"):
        group_errors(products, labels, np.ones(2), np.array([1.0, 0.0]))


@dataclass(frozen=True)
class Problem:
    errors: Floats
    entries: NDArray[np.int64]

    def cost(self, chosen: NDArray[np.int64]) -> tuple[int, float]:
        """Entries and error of one K per unit."""
        at = (np.arange(len(self.errors)), chosen - 1)
        return int(self.entries[at].sum()), float(self.errors[at].sum())

    def everything(self) -> list[tuple[int, float]]:
        choices = itertools.product(range(1, self.errors.shape[1] + 1), repeat=len(self.errors))
        return [self.cost(np.array(chosen)) for chosen in choices]

    def budgets(self) -> range:
        """From the least that is needed to more than can be spent."""
        return range(int(self.entries.min(axis=1).sum()), int(self.entries.max(axis=1).sum()) + 2)


def problem(seed: int, convex: bool) -> Problem:
    """One to four units with up to four K: falling gains per entry, or anything, equal and falling entries included."""
    generator = np.random.default_rng(seed)
    units, count = int(generator.integers(1, 5)), int(generator.integers(1, 5))
    if not convex:
        return Problem(generator.integers(0, 6, (units, count)) / 2, generator.integers(1, 9, (units, count)))
    costs = generator.integers(1, 4, (units, count))
    gains = np.sort(generator.uniform(0.1, 1, (units, count)), axis=1)[:, ::-1] * costs
    return Problem(gains.sum(axis=1, keepdims=True) - gains.cumsum(axis=1), costs.cumsum(axis=1))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1))
def test_the_error_is_within_one_step_of_the_optimum(seed: int) -> None:
    """Against every assignment with every budget, where the curves are convex."""
    made = problem(seed, convex=True)
    everything = made.everything()
    largest = float((made.errors[:, :-1] - made.errors[:, 1:]).max(initial=0))
    for budget in made.budgets():
        spent, error = made.cost(allocate(made.errors, made.entries, budget))
        assert spent <= budget
        optimum = min(other for cost, other in everything if cost <= budget)
        assert optimum - 1e-12 <= error <= optimum + largest + 1e-12


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1))
def test_the_budget_holds_and_more_of_it_never_hurts(seed: int) -> None:
    """Whatever the curves: with all that can be spent every unit has its least error, for the fewest entries."""
    made = problem(seed, convex=False)
    before = np.inf
    for budget in made.budgets():
        chosen = allocate(made.errors, made.entries, budget)
        assert chosen.dtype == np.int64
        spent, error = made.cost(chosen)
        assert spent <= budget
        assert error <= before + 1e-12
        before = error
    assert before == made.errors.min(axis=1).sum()
    least = made.entries[made.errors == made.errors.min(axis=1, keepdims=True)]
    assert spent == sum(int(e[r == r.min()].min()) for r, e in zip(made.errors, made.entries, strict=True)) <= least.sum()


def test_steps_are_taken_by_gain_per_entry_and_then_by_unit() -> None:
    errors = np.array([[4.0, 2.0, 1.0], [4.0, 1.0, 0.0], [4.0, 2.0, 1.0]])
    entries = np.array([[1, 2, 3]] * 3)
    taken = [allocate(errors, entries, budget).tolist() for budget in range(3, 10)]
    assert taken == [[1, 1, 1], [1, 2, 1], [2, 2, 1], [2, 2, 2], [3, 2, 2], [3, 3, 2], [3, 3, 3]]


def test_steps_that_do_not_fit_are_passed_over_with_those_behind_them() -> None:
    """The first unit's second step would fit but stands on one that does not."""
    errors = np.array([[20.0, 1.0, 0.9], [2.0, 1.0, 0.0]])
    entries = np.array([[1, 11, 12], [1, 3, 5]])
    assert allocate(errors, entries, 7).tolist() == [1, 3]
    assert allocate(errors, entries, 5).tolist() == [1, 2]
    assert allocate(errors, entries, 12).tolist() == [2, 1]


def test_gains_that_rise_are_bought_as_one_step() -> None:
    """K=2 alone brings little, K=3 much: K=2 is above the envelope and never chosen."""
    errors, entries = np.array([[10.0, 9.0, 0.0]]), np.array([[1, 2, 3]])
    assert [allocate(errors, entries, budget).tolist() for budget in (1, 2, 3)] == [[1], [1], [3]]


def test_entries_that_gain_nothing_are_not_bought() -> None:
    errors, entries = np.array([[1.0, 0.5, 0.5, 0.5], [0.0, 0.0, 0.0, 0.0]]), np.array([[1, 2, 3, 4]] * 2)
    assert allocate(errors, entries, 100).tolist() == [2, 1]


def test_equal_experts_have_their_groups_for_nothing() -> None:
    """Rows that are equal are stored once: the cheapest K is the one of least error."""
    errors, entries = np.array([[1.0, 0.0, 0.0], [1.0, 2.0, 0.5]]), np.array([[5, 5, 5], [5, 4, 6]])
    assert allocate(errors, entries, 9).tolist() == [2, 2]
    assert allocate(errors, entries, 10).tolist() == [2, 1]


def test_points_on_one_line_are_steps_of_their_own() -> None:
    """Also where entries fall with K."""
    errors, entries = np.array([[0.0, 1.0, 2.0, 3.0]]), np.array([[4, 3, 2, 1]])
    assert [allocate(errors, entries, budget).tolist() for budget in (1, 2, 3, 4)] == [[4], [3], [2], [1]]


def test_units_that_gain_alike_are_served_in_their_order() -> None:
    errors, entries = np.tile([1.0, 0.25, 0.0], (1000, 1)), np.tile([1, 2, 3], (1000, 1))
    np.testing.assert_array_equal(allocate(errors, entries, 1300), np.repeat([2, 1], [300, 700]))
    np.testing.assert_array_equal(allocate(errors, entries, 2700), np.repeat([3, 2], [700, 300]))


def test_a_budget_below_the_least_is_refused() -> None:
    errors, entries = np.ones((3, 2)), np.array([[2, 4]] * 3)
    with pytest.raises(ValueError, match="5 entries is below 6"):
        allocate(errors, entries, 5)
    with pytest.raises(ValueError, match="must both be"):
        allocate(errors, entries[:2], 9)
    assert allocate(errors[:0], entries[:0], 0).tolist() == []


def test_many_units_are_allocated_like_their_copies() -> None:
    """The order of units decides nothing but ties."""
    generator = np.random.default_rng(2)
    errors = np.sort(generator.random((50_000, 4)), axis=1)[:, ::-1]
    entries = generator.integers(10, 100, (50_000, 1)) * np.arange(1, 5)
    budget = int(entries[:, 0].sum() * 2)
    order = generator.permutation(50_000)
    chosen = allocate(errors, entries, budget)
    moved = allocate(errors[order], entries[order], budget)
    assert (chosen[order] == moved).mean() > 0.9999
    spent = int(np.take_along_axis(entries, chosen[:, None] - 1, axis=1).sum())
    assert budget - 400 < spent <= budget


def test_the_knee_by_hand() -> None:
    """From 2 entries to 10: errors 10, 2 (after 2 more) and 0: furthest below the chord after the first step."""
    errors, entries = np.array([[8.0, 0.0], [2.0, 0.0]]), np.array([[1, 3], [1, 7]])
    found = knee(errors, entries)
    assert (found.budget, found.share, found.remaining) == (4, 0.4, 0.2)
    for number in ("4 entries", "40.0%", "of 10", "(2 entries)", "25.0%", "20.0%"):
        assert number in found.why


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_the_knee_is_furthest_below_the_chord(seed: int, convex: bool) -> None:
    """Over all budgets that allocate spends to the last entry; the knee is one of them and leaves what it says."""
    made = problem(seed, convex)
    found = knee(made.errors, made.entries)
    points = [made.cost(allocate(made.errors, made.entries, budget)) for budget in made.budgets()]
    (cheapest, most), (full, least) = points[0], points[-1]
    spent, error = made.cost(allocate(made.errors, made.entries, found.budget))
    assert spent == found.budget
    assert found.share == pytest.approx(found.budget / full)
    assert found.remaining == pytest.approx(error / most if most > 0 else 0.0)
    if full > cheapest:
        below = [1 - (cost - cheapest) / (full - cheapest) - (left - least) / (most - least) for cost, left in points]
        here = 1 - (spent - cheapest) / (full - cheapest) - (error - least) / (most - least)
        assert here >= max(below) - 1e-8


@pytest.mark.parametrize(
    ("errors", "entries", "expected", "said"),
    [
        ([[0.0, 0.0], [0.0, 0.0]], [[3, 6], [3, 6]], (6, 1.0, 0.0), "has no error"),
        ([[1.0, 1.0]], [[3, 6]], (3, 1.0, 1.0), "no further entry lowers"),
        ([[1.0, 0.0]], [[3, 6]], (3, 0.5, 1.0), "1 steps"),
        ([[3.0, 2.0, 1.0, 0.0]] * 2, [[1, 2, 3, 4]] * 2, (2, 0.25, 1.0), "6 steps"),
        ([[9.0, 1.0, 0.0]], [[1, 2, 3]], (2, 2 / 3, 1 / 9), "2 entries"),
    ],
)
def test_knees_of_curves_without_a_bend(
    errors: list[list[float]], entries: list[list[int]], expected: tuple[int, float, float], said: str
) -> None:
    found = knee(np.array(errors), np.array(entries))
    assert (found.budget, found.share, found.remaining) == pytest.approx(expected)
    assert said in found.why


def test_no_unit_has_no_knee() -> None:
    with pytest.raises(ValueError, match="no unit"):
        knee(np.zeros((0, 3)), np.zeros((0, 3), np.int64))
