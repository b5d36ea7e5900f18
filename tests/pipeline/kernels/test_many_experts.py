from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.kernels.clustering import MAX_EXPERTS, Clustering, cluster_channels
from pipeline.kernels.search import sampled_partition
from tests.support.reference import Floats, growth_string, set_partitions, spread

COSINE = Clustering("kmeans", "cosine")
EUCLIDEAN = Clustering("kmeans", "euclidean")
MANHATTAN = Clustering("kmeans", "manhattan")
SPHERICAL = Clustering("spherical", "cosine")
SIGN = Clustering("sign", "cosine")
SEARCHED = [COSINE, EUCLIDEAN, MANHATTAN, SPHERICAL, SIGN]


def seen(rows: Floats, how: Clustering) -> Floats:
    """The rows (…, N, width) as the clustering sees them."""
    rows = np.sign(rows) if how.kind == "sign" else rows
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True) if how.metric == "cosine" else rows


def found(deltas: Floats, groups: int, how: Clustering, seed: int = 0) -> NDArray[np.uint8]:
    """Labels (rows, N) of deltas (rows, N, width)."""
    draws = np.random.default_rng(seed).integers(0, 2**32, len(deltas))
    table = None
    if how.table == "l1":
        table = np.abs(deltas[:, :, None] - deltas[:, None]).sum(axis=-1)
    elif how.table == "sign":
        table = np.sign(deltas) @ np.sign(deltas).transpose(0, 2, 1)
    return cluster_channels(deltas @ deltas.transpose(0, 2, 1), groups, how, draws, table)


def objective(rows: Floats, labels: NDArray[np.int64], groups: int, how: Clustering) -> Floats:
    """What each of many groupings (…, N) of one channel's rows (N, width) costs, from the vectors; inf with an empty group."""
    rows = seen(rows, how)
    one_hot = (labels[..., None] == np.arange(groups)).astype(np.float64)
    sizes = one_hot.sum(axis=-2)
    if how.metric == "manhattan":
        distances = np.abs(rows[:, None] - rows[None]).sum(axis=-1)
        links = np.where(one_hot > 0, distances @ one_hot, np.inf)
        return np.asarray(links.min(axis=-2).sum(axis=-1))
    sums = one_hot.swapaxes(-1, -2) @ rows
    if how.kind == "spherical":
        cost = -np.linalg.norm(sums, axis=-1).sum(axis=-1)
    else:
        cost = (rows**2).sum() - ((sums**2).sum(axis=-1) / np.maximum(sizes, 1)).sum(axis=-1)
    return np.where((sizes > 0).all(axis=-1), cost, np.inf)


def scale(rows: Floats, cost: float, how: Clustering) -> float:
    """The score whose 1e-5th is a tie: the cost itself for medoids."""
    if how.metric == "manhattan":
        return cost
    return -cost if how.kind == "spherical" else float((seen(rows, how) ** 2).sum()) - cost


@pytest.mark.parametrize("how", SEARCHED, ids=str)
@pytest.mark.parametrize(("count", "groups", "width"), [(9, 3, 12), (9, 4, 5), (10, 3, 40), (10, 2, 6)])
def test_the_optimum_is_nearly_always_found(count: int, groups: int, width: int, how: Clustering) -> None:
    """Against the objectives' definitions for every partition: never below the optimum, at it in 95 of 100 channels."""
    rows = 60
    deltas = np.random.default_rng(count * groups + width).normal(size=(rows, count, width))
    everything = np.array([(0, *rest) for rest in itertools.product(range(groups), repeat=count - 1)])
    labels = found(deltas, groups, how)
    reached = 0
    for row in range(rows):
        best = float(objective(deltas[row], everything, groups, how).min())
        cost = float(objective(deltas[row], labels[row].astype(np.int64), groups, how))
        assert cost >= best - 1e-9
        reached += cost <= best + 1.1e-5 * scale(deltas[row], best, how)
    assert reached >= 0.95 * rows


@pytest.mark.parametrize("how", SEARCHED, ids=str)
@pytest.mark.parametrize(("count", "groups", "rows"), [(12, 3, 40), (24, 5, 20), (64, 8, 10)])
def test_planted_groups_are_recovered(count: int, groups: int, rows: int, how: Clustering) -> None:
    """Directions and noise, in groups of uneven size; whatever the order of the experts."""
    generator = np.random.default_rng(count)
    planted = np.concatenate([np.arange(groups).repeat(2), generator.integers(0, groups, count - 2 * groups)])
    planted = generator.permuted(np.tile(planted, (rows, 1)), axis=1)
    directions = generator.normal(size=(rows, groups, 200))
    deltas = np.take_along_axis(directions, planted[:, :, None], axis=1) + 0.4 * generator.normal(size=(rows, count, 200))
    expected = [growth_string([np.flatnonzero(row == g).tolist() for g in range(groups)], count) for row in planted]
    assert [tuple(row) for row in found(deltas, groups, how).tolist()] == expected


def is_growth_string(labels: list[int], groups: int) -> bool:
    growing = all(label <= max((-1, *labels[:i])) + 1 for i, label in enumerate(labels))
    return growing and set(labels) == set(range(groups))


@settings(deadline=None, max_examples=40)
@given(
    st.integers(9, 20).flatmap(lambda n: st.tuples(st.just(n), st.integers(2, n - 1))),
    st.integers(1, 5),
    st.sampled_from(SEARCHED),
    st.integers(0, 2**32 - 1),
)
def test_labels_are_growth_strings_of_exactly_k_groups(
    shape: tuple[int, int], distinct: int, how: Clustering, seed: int
) -> None:
    """Even where most deltas are copies of each other, so that groups must be split to be K."""
    count, groups = shape
    generator = np.random.default_rng(seed)
    values = generator.integers(1, 4, (3, distinct, 4)).astype(np.float64)
    deltas = values[:, generator.integers(0, distinct, count)]
    for row in found(deltas, groups, how, seed).tolist():
        assert is_growth_string(row, groups)


@pytest.mark.parametrize("how", [*SEARCHED, Clustering("random", "cosine")], ids=str)
def test_channels_do_not_depend_on_their_neighbours(how: Clustering) -> None:
    deltas = np.random.default_rng(1).normal(size=(30, 14, 10))
    deltas[::4, 3] = 0
    draws = np.random.default_rng(2).integers(0, 2**32, 30)
    products = deltas @ deltas.transpose(0, 2, 1)
    table = np.abs(deltas[:, :, None] - deltas[:, None]).sum(axis=-1) if how.table == "l1" else np.sign(products)
    whole = cluster_channels(products, 4, how, draws, table)
    for start in range(0, 30, 7):
        part = slice(start, start + 7)
        np.testing.assert_array_equal(whole[part], cluster_channels(products[part], 4, how, draws[part], table[part]))


def test_the_draw_decides_where_the_search_starts() -> None:
    """Same draw, same groups; on deltas without any structure other draws end elsewhere now and then."""
    deltas = np.tile(np.random.default_rng(3).normal(size=(1, 40, 30)), (50, 1, 1))
    first = found(deltas, 6, COSINE)
    np.testing.assert_array_equal(first, found(deltas, 6, COSINE))
    assert 1 < len(np.unique(first, axis=0)) <= 50


@pytest.mark.parametrize("how", [COSINE, EUCLIDEAN, SPHERICAL], ids=str)
def test_no_single_move_is_better(how: Clustering) -> None:
    generator = np.random.default_rng(4)
    deltas = generator.normal(size=(10, 20, 8)) * generator.uniform(0.5, 2, (10, 20, 1))
    for row, labels in enumerate(found(deltas, 4, how).astype(np.int64)):
        moved = np.repeat(labels[None], 80, axis=0)
        moved[np.arange(80), np.arange(80) // 4] = np.arange(80) % 4
        cost = float(objective(deltas[row], labels, 4, how))
        assert objective(deltas[row], moved, 4, how).min() >= cost - 1e-7 * scale(deltas[row], cost, how)


def test_no_other_medoid_is_better() -> None:
    deltas = np.random.default_rng(5).normal(size=(10, 20, 8))
    for row, labels in enumerate(found(deltas, 4, MANHATTAN).astype(np.int64)):
        distances = np.abs(deltas[row][:, None] - deltas[row][None]).sum(axis=-1)
        blocks = [np.flatnonzero(labels == group) for group in range(4)]
        medoids = [block[distances[np.ix_(block, block)].sum(axis=1).argmin()] for block in blocks]
        cost = float(objective(deltas[row], labels, 4, MANHATTAN))
        for group, other in itertools.product(range(4), range(20)):
            exchanged = [*medoids[:group], other, *medoids[group + 1 :]]
            assert distances[:, exchanged].min(axis=1).sum() >= cost * (1 - 1e-7)


def test_spread_is_below_that_of_lloyd_and_of_chance() -> None:
    generator = np.random.default_rng(6)
    deltas = generator.normal(size=(15, 24, 10))
    labels, drawn = found(deltas, 4, EUCLIDEAN), found(deltas, 4, Clustering("random", "cosine"))
    searched, lloyd, chance = 0.0, 0.0, 0.0
    for row, rows in enumerate(deltas):
        searched += spread(rows, [np.flatnonzero(labels[row] == group).tolist() for group in range(4)])
        chance += spread(rows, [np.flatnonzero(drawn[row] == group).tolist() for group in range(4)])
        runs = []
        for _ in range(16):
            centres = rows[generator.choice(24, 4, replace=False)]
            for _ in range(20):
                nearest = ((rows[:, None] - centres[None]) ** 2).sum(axis=-1).argmin(axis=1)
                centres = np.stack([rows[nearest == g].mean(axis=0) if (nearest == g).any() else centres[g] for g in range(4)])
            runs.append(float(((rows - centres[nearest]) ** 2).sum()))
        lloyd += min(runs)
    assert searched <= lloyd < chance


def test_equal_deltas_share_a_group() -> None:
    generator = np.random.default_rng(7)
    deltas = generator.normal(size=(20, 16, 10))
    deltas[:, 9] = deltas[:, 2]
    deltas[:, 15] = deltas[:, 2]
    for how in (COSINE, EUCLIDEAN, SIGN):
        labels = found(deltas, 5, how)
        assert (labels[:, [9, 15]] == labels[:, [2]]).all()


def test_unchanged_experts_form_a_group_of_their_own() -> None:
    """Those that remain may be few enough to be enumerated, or as many as the groups."""
    deltas = np.random.default_rng(8).normal(size=(3, 12, 10))
    deltas[0, [0, 5]] = 0
    deltas[1, :6] = 0
    deltas[2, 4:] = 0
    for how in SEARCHED:
        labels = found(deltas, 5, how)
        assert labels[0].tolist().count(0) == 2
        assert labels[0, 5] == 0
        assert labels[1, :6].tolist() == [0] * 6
        assert (labels[1, 6:] > 0).all()
        assert labels.max(axis=1).tolist() == [4, 4, 4]
        assert labels[2].tolist() == [0, 1, 2, 3, *[4] * 8]


@pytest.mark.parametrize(("nudge", "expected"), [(0.0, (0, 0, 0, 0, 1, 1, 2, 2, 3, 3)), (1e-3, (0, 0, 1, 1, 2, 2, 2, 2, 3, 3))])
def test_ties_go_to_the_smallest_string(nudge: float, expected: tuple[int, ...]) -> None:
    """Five pairs of copies into four groups: the first two pairs are as near to each other as the next two, or not quite."""
    similarity = np.eye(5)
    similarity[0, 1] = similarity[1, 0] = 0.5
    similarity[2, 3] = similarity[3, 2] = 0.5 + nudge
    products = np.tile(np.kron(similarity, np.ones((2, 2))), (50, 1, 1))
    draws = np.random.default_rng(9).integers(0, 2**32, 50)
    for how in (COSINE, SPHERICAL):
        labels = cluster_channels(products, 4, how, draws)
        np.testing.assert_array_equal(labels, np.tile(expected, (50, 1)))
    distances = 2 * (1 - products)
    labels = cluster_channels(products, 4, MANHATTAN, draws, distances)
    np.testing.assert_array_equal(labels, np.tile(expected, (50, 1)))


def stirling(n: int, k: int) -> int:
    return sum(int((-1) ** (k - j)) * math.comb(k, j) * int(j**n) for j in range(k + 1)) // math.factorial(k)


@pytest.mark.parametrize(("count", "groups"), [(5, 3), (6, 2), (5, 1), (4, 4)])
def test_sampled_partitions_are_uniform(count: int, groups: int) -> None:
    draws = np.random.default_rng(0).integers(0, 2**32, 50_000)
    strings, counts = np.unique(sampled_partition(draws, count, groups), axis=0, return_counts=True)
    everything = sorted(growth_string(blocks, count) for blocks in set_partitions(range(count), groups))
    assert [tuple(row) for row in strings.tolist()] == everything
    expected = len(draws) / len(everything)
    free = len(everything) - 1
    assert float(((counts - expected) ** 2).sum()) / expected < free + 4 * math.sqrt(2 * free) + 1e-9


def test_sampled_partitions_of_neighbouring_draws_are_uniform() -> None:
    draws = np.arange(50_000)
    _, counts = np.unique(sampled_partition(draws, 5, 3), axis=0, return_counts=True)
    assert float(((counts - 2000) ** 2).sum()) / 2000 < 24 + 4 * math.sqrt(48)


@pytest.mark.parametrize(("count", "groups"), [(9, 2), (12, 4), (MAX_EXPERTS, 8), (MAX_EXPERTS, 40)])
def test_random_groups_of_many_experts(count: int, groups: int) -> None:
    """Two items are together in S(n-1, k) of the S(n, k) partitions, whichever they are."""
    rows = 4000
    products = np.tile(np.eye(count), (rows, 1, 1))
    draws = np.random.default_rng(count + groups).integers(0, 2**32, rows)
    labels = cluster_channels(products, groups, Clustering("random", "cosine"), draws)
    assert all(is_growth_string(row, groups) for row in labels[:200].tolist())
    assert (labels.max(axis=1) == groups - 1).all()
    share = stirling(count - 1, groups) / stirling(count, groups)
    for a, b in ((0, 1), (0, count - 1), (count // 2, count - 2)):
        assert abs((labels[:, a] == labels[:, b]).mean() - share) < 4.5 * math.sqrt(share * (1 - share) / rows)
