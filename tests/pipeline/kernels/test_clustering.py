from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.kernels import clustering as production
from pipeline.kernels.clustering import MAX_EXPERTS, Clustering, cosines
from pipeline.kernels.partitions import drawn_partition, growth_labels, partitions
from pipeline.kernels.tables import table
from tests.support.reference import Floats, cluster_channel, growth_string, set_partitions, spread


def stirling(n: int, k: int) -> int:
    return sum(int((-1) ** (k - j)) * math.comb(k, j) * int(j**n) for j in range(k + 1)) // math.factorial(k)


@pytest.mark.parametrize(("count", "groups"), [(n, k) for n in range(1, 9) for k in range(1, n + 1)])
def test_partitions_are_all_growth_strings_in_order(count: int, groups: int) -> None:
    found = [tuple(row) for row in partitions(count, groups).tolist()]
    assert len(found) == stirling(count, groups)
    assert found == sorted(set(found))
    for labels in found:
        assert all(label <= max((-1, *labels[:i])) + 1 for i, label in enumerate(labels))
        assert len(set(labels)) == groups


def gram_of(deltas: NDArray[Any]) -> NDArray[np.float64]:
    """(rows, experts, experts) from (experts, rows, width), with the production kernel."""
    return np.asarray(table(torch.from_numpy(deltas.astype(np.float32)), "gram").numpy())


def cluster_channels(gram: NDArray[np.float64], groups: int, kind: str = "kmeans", metric: str = "cosine") -> NDArray[np.uint8]:
    return production.cluster_channels(gram, groups, Clustering(kind, metric), np.zeros(len(gram), np.int64))


HOW = [
    Clustering("kmeans", "cosine"),
    Clustering("kmeans", "euclidean"),
    Clustering("kmeans", "manhattan"),
    Clustering("spherical", "cosine"),
    Clustering("sign", "cosine"),
    Clustering("sign", "cosine", "mass"),
    Clustering("random", "cosine"),
]


def table_of(deltas: NDArray[Any], clustering: Clustering) -> Floats | None:
    """The table that the clustering reads beside the Gram matrices, by its definition."""
    rows = deltas.astype(np.float64)
    if clustering.table == "l1":
        return np.asarray(np.abs(rows[:, None] - rows[None]).sum(axis=-1).transpose(2, 0, 1))
    if clustering.table == "sign":
        return gram_of(np.sign(rows))
    return rows.sum(axis=-1).T if clustering.table == "sums" else None


def clustered(deltas: NDArray[Any], groups: int | NDArray[np.int64], how: Clustering, seed: int = 0) -> NDArray[np.uint8]:
    """Labels (rows, experts) of deltas (experts, rows, width)."""
    draws: NDArray[np.int64] = np.random.default_rng(seed).integers(0, 2**32, deltas.shape[1:2])
    return production.cluster_channels(gram_of(deltas), groups, how, draws, table_of(deltas, how))


def medoid_costs(rows: Floats, groups: int) -> list[tuple[float, tuple[int, ...]]]:
    """For every partition, the least sum of L1 distances to one member per group, and its growth string; the best first."""
    costs = []
    for blocks in set_partitions(range(len(rows)), groups):
        cost = sum(min(sum(float(np.abs(rows[a] - rows[m]).sum()) for a in block) for m in block) for block in blocks)
        costs.append((cost, growth_string(blocks, len(rows))))
    return sorted(costs)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("kind", ["kmeans", "spherical"])
@pytest.mark.parametrize(("count", "groups"), [(2, 1), (3, 2), (4, 2), (4, 3), (5, 2), (6, 3), (8, 2)])
def test_labels_are_the_optimum_over_vectors(count: int, groups: int, kind: str, metric: str) -> None:
    """Against the objectives' own definitions, centroids and mean directions of the rows, for every partition."""
    generator = np.random.default_rng(count * 10 + groups)
    rows = 40 if count < 8 else 8
    deltas = generator.normal(size=(count, rows, 12)).astype(np.float32)
    deltas *= np.linspace(0.5, 2, count, dtype=np.float32)[:, None, None]
    found = cluster_channels(gram_of(deltas), groups, kind, metric)
    clear = 0
    for row in range(rows):
        expected, margin = cluster_channel(deltas[:, row].astype(np.float64), groups, kind, metric)
        if margin > 1e-7:
            clear += 1
            assert tuple(found[row]) == expected
    assert clear >= 0.9 * rows


def test_spherical_prefers_even_groups_where_deltas_are_orthogonal() -> None:
    """2 sqrt(2) > sqrt(3) + 1, where k-means ties (methods: the two are different optima)."""
    deltas = np.eye(4, 8, dtype=np.float32)[:, None, :]
    assert cluster_channels(gram_of(deltas), 2, "spherical").tolist() == [[0, 0, 1, 1]]


def test_euclidean_isolates_the_largest_delta() -> None:
    deltas = np.random.default_rng(8).normal(size=(4, 30, 40)).astype(np.float32)
    deltas[2] *= 30
    assert cluster_channels(gram_of(deltas), 2, "kmeans", "euclidean").tolist() == [[0, 0, 1, 0]] * 30


def test_a_matrix_of_one_channel_groups_alike_at_both_granularities() -> None:
    deltas = np.random.default_rng(9).normal(size=(4, 1, 40)).astype(np.float32)
    gram_table = gram_of(deltas)
    np.testing.assert_array_equal(cluster_channels(gram_table, 2), cluster_channels(gram_table.sum(axis=0)[None], 2))


def test_drawn_partitions_are_uniform_and_have_no_empty_group() -> None:
    draws = np.random.default_rng(0).integers(0, 2**32, 70_000)
    found = drawn_partition(draws, 4, 2)
    rows, counts = np.unique(found, axis=0, return_counts=True)
    np.testing.assert_array_equal(rows, partitions(4, 2))
    assert np.abs(counts - 10_000).max() < 5 * (10_000 * 6 / 7) ** 0.5
    assert drawn_partition(np.array([0, 2**32 - 1]), 4, 2).tolist() == [[0, 0, 0, 1], [0, 1, 1, 1]]


def test_gram_is_accurate_and_symmetric() -> None:
    deltas = np.random.default_rng(0).normal(size=(4, 9, 3000)).astype(np.float32) * 1e-4
    exact = np.einsum("nri,mri->rnm", deltas.astype(np.longdouble), deltas.astype(np.longdouble))
    found = gram_of(deltas)
    np.testing.assert_allclose(found, exact.astype(np.float64), rtol=1e-9, atol=1e-16)
    np.testing.assert_array_equal(found, found.transpose(0, 2, 1))


def test_gram_rows_do_not_depend_on_their_neighbours() -> None:
    deltas = torch.from_numpy(np.random.default_rng(1).normal(size=(3, 33, 257)).astype(np.float32))
    whole = table(deltas, "gram")
    parts = torch.cat([table(deltas[:, start : start + 5], "gram") for start in range(0, 33, 5)])
    assert torch.equal(whole, parts)


def test_scaling_a_delta_changes_nothing() -> None:
    """Cosine sees directions only."""
    deltas = np.random.default_rng(2).normal(size=(4, 50, 20)).astype(np.float32)
    scaled = deltas * np.array([1.0, 16.0, 0.25, 1024.0], np.float32)[:, None, None]
    np.testing.assert_array_equal(cluster_channels(gram_of(deltas), 2), cluster_channels(gram_of(scaled), 2))


@pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[1::5])
def test_order_of_experts_only_relabels_groups(order: tuple[int, ...]) -> None:
    deltas = np.random.default_rng(3).normal(size=(4, 60, 20)).astype(np.float32)
    found = cluster_channels(gram_of(deltas), 2)
    permuted = cluster_channels(gram_of(deltas[list(order)]), 2)
    np.testing.assert_array_equal(growth_labels(found[:, list(order)]), permuted)


def test_unchanged_experts_form_a_group_of_their_own() -> None:
    generator = np.random.default_rng(4)
    deltas = generator.normal(size=(4, 4, 10)).astype(np.float32)
    deltas[3, 0] = 0
    deltas[[1, 2], 1] = 0
    deltas[:, 2] = 0
    deltas[[0, 1, 2], 3] = 0
    found = cluster_channels(gram_of(deltas), 2)
    assert found.tolist() == [[0, 0, 0, 1], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]]


def test_equal_directions_share_a_group() -> None:
    deltas = np.random.default_rng(5).normal(size=(4, 30, 10)).astype(np.float32)
    deltas[2] = deltas[0]
    found = cluster_channels(gram_of(deltas), 3)
    np.testing.assert_array_equal(found, np.tile([0, 1, 0, 2], (30, 1)))


def test_ties_go_to_the_smallest_string() -> None:
    """Orthogonal deltas: every partition scores the same, in float32 noise too."""
    deltas = np.eye(4, 8, dtype=np.float32)[:, None, :] * (1 + 1e-7)
    assert cluster_channels(gram_of(deltas), 2).tolist() == [[0, 0, 0, 1]]
    assert cluster_channels(gram_of(deltas), 3).tolist() == [[0, 0, 1, 2]]
    nudged = gram_of(deltas).copy()
    nudged[0, 2, 3] = nudged[0, 3, 2] = 1e-6
    assert cluster_channels(nudged, 2).tolist() == [[0, 0, 0, 1]]
    nudged[0, 2, 3] = nudged[0, 3, 2] = 1e-3
    assert cluster_channels(nudged, 2).tolist() == [[0, 0, 1, 1]]


def test_as_many_groups_as_experts_is_one_each() -> None:
    zeros = np.zeros((5, 3, 3))
    np.testing.assert_array_equal(cluster_channels(zeros, 3), np.tile([0, 1, 2], (5, 1)))
    np.testing.assert_array_equal(cluster_channels(zeros, 4), np.tile([0, 1, 2], (5, 1)))
    np.testing.assert_array_equal(cluster_channels(zeros + np.diag([1.0, 0, 0]), 9), np.tile([0, 1, 2], (5, 1)))
    np.testing.assert_array_equal(cluster_channels(zeros, 1), np.zeros((5, 3)))


def test_cosines_of_zero_rows_are_zero() -> None:
    found = cosines(np.array([[[4.0, 0.0], [0.0, 0.0]]]))
    np.testing.assert_array_equal(found, [[[1.0, 0.0], [0.0, 0.0]]])


@given(st.lists(st.integers(0, 3), min_size=1, max_size=7))
def test_growth_labels_keep_the_grouping(labels: list[int]) -> None:
    found = growth_labels(np.array([labels], np.uint8))[0].tolist()
    assert [[a == b for b in labels] for a in labels] == [[a == b for b in found] for a in found]
    assert found[0] == 0
    assert all(label <= max((-1, *found[:i])) + 1 for i, label in enumerate(found))


def test_reference_enumerates_as_many_partitions() -> None:
    assert len(set_partitions(range(5), 3)) == stirling(5, 3)


@pytest.mark.parametrize(("count", "groups"), [(3, 2), (4, 2), (4, 3), (5, 2), (6, 3), (7, 4)])
def test_medoids_are_the_optimum_over_vectors(count: int, groups: int) -> None:
    rows = 30 if count < 7 else 8
    deltas = np.random.default_rng(count * 10 + groups).normal(size=(count, rows, 9)).astype(np.float32)
    found = clustered(deltas, groups, Clustering("kmeans", "manhattan"))
    for row in range(rows):
        best, second = medoid_costs(deltas[:, row].astype(np.float64), groups)[:2]
        assert second[0] - best[0] > 1.1e-5 * best[0]
        assert tuple(found[row]) == best[1]


def test_ties_of_medoids_go_to_the_smallest_string() -> None:
    """Every two deltas are as far apart: every partition costs the same; a tie is 1e-5 of the cost."""
    distances = 2.0 * (1 - np.eye(4))[None]

    def found(nudge: float) -> NDArray[np.uint8]:
        nudged = distances.copy()
        nudged[0, 2, 3] = nudged[0, 3, 2] = 2 - nudge
        how = Clustering("kmeans", "manhattan")
        return production.cluster_channels(np.eye(4)[None], 2, how, np.zeros(1, np.int64), nudged)

    assert found(0).tolist() == found(3e-5).tolist() == [[0, 0, 0, 1]]
    assert found(5e-5).tolist() == [[0, 0, 1, 1]]


def test_equal_deltas_tie_at_no_cost() -> None:
    deltas = np.tile(np.random.default_rng(10).normal(size=(1, 20, 7)).astype(np.float32), (4, 1, 1))
    for metric in ("cosine", "euclidean", "manhattan"):
        assert clustered(deltas, 2, Clustering("kmeans", metric)).tolist() == [[0, 0, 0, 1]] * 20
    deltas[2] *= 2
    assert clustered(deltas, 2, Clustering("kmeans", "manhattan")).tolist() == [[0, 0, 1, 0]] * 20


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_sign_vector_is_kmeans_on_signs(metric: str) -> None:
    """Zeros have no sign; the sizes of the entries count for nothing."""
    generator = np.random.default_rng(11)
    deltas = generator.normal(size=(5, 40, 30)).astype(np.float32) * (generator.random((5, 40, 30)) < 0.8)
    deltas[3] *= 100
    found = clustered(deltas, 2, Clustering("sign", metric))
    clear = 0
    for row in range(40):
        expected, margin = cluster_channel(np.sign(deltas[:, row]).astype(np.float64), 2, "kmeans", metric)
        if margin > 1e-7:
            clear += 1
            assert tuple(found[row]) == expected
    assert clear >= 36


def test_sign_vector_by_hand() -> None:
    deltas = np.array([[1, 2, 3, 4], [-9, 1, -1, -1], [5, 5, 5, -5], [-1, -1, -1, -9]], np.float32)[:, None]
    assert clustered(deltas, 2, Clustering("sign", "cosine")).tolist() == [[0, 1, 0, 1]]
    assert clustered(deltas, 3, Clustering("sign", "cosine")).tolist() == [[0, 1, 0, 2]]


def test_mass_of_signs_by_hand() -> None:
    """Sums 3, -1, 0 and -2; all above 0; a delta of zeros beside the others, which are then one group."""
    deltas = np.zeros((4, 3, 4), np.float32)
    deltas[:, 0] = [[1, 1, 1, 0], [-4, 1, 1, 1], [1, -1, 0, 0], [-5, 3, 0, 0]]
    deltas[:, 1] = [[1, 0, 0, 0], [2, 0, 0, 0], [3, 0, 0, 0], [4, 0, 0, 0]]
    deltas[:, 2] = [[1, 0, 0, 0], [-2, 0, 0, 0], [0, 0, 0, 0], [4, 0, 0, 0]]
    mass = Clustering("sign", "cosine", "mass")
    assert clustered(deltas, 2, mass).tolist() == [[0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0]]
    assert clustered(deltas, np.array([1, 2, 4]), mass).tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 2, 3]]
    with pytest.raises(ValueError, match="two groups"):
        clustered(deltas, 3, mass)


@pytest.mark.parametrize("how", HOW, ids=str)
def test_a_number_of_groups_per_channel_is_separate_calls(how: Clustering) -> None:
    generator = np.random.default_rng(12)
    deltas = generator.normal(size=(5, 60, 12)).astype(np.float32) * (generator.random((5, 60, 1)) < 0.9)
    options = np.array([1, 2, 5, 7] if how.sign == "mass" else [1, 2, 3, 4, 5, 7])
    groups = generator.choice(options, 60)
    found = clustered(deltas, groups, how)
    for k in options:
        np.testing.assert_array_equal(found[groups == k], clustered(deltas, int(k), how)[groups == k])


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("count", [5, 11])
def test_order_of_channels_only_orders_results(how: Clustering, count: int) -> None:
    generator = np.random.default_rng(13)
    deltas = generator.normal(size=(count, 40, 12)).astype(np.float32)
    draws, order = generator.integers(0, 2**32, 40), generator.permutation(40)
    table, products = table_of(deltas, how), gram_of(deltas)
    found = production.cluster_channels(products, 2, how, draws, table)
    moved = production.cluster_channels(products[order], 2, how, draws[order], None if table is None else table[order])
    np.testing.assert_array_equal(found[order], moved)


@pytest.mark.parametrize("how", [how for how in HOW if how.kind != "random"], ids=str)
@settings(deadline=None, max_examples=10)
@given(st.permutations(range(5)))
def test_order_of_experts_only_relabels_groups_of_every_kind(how: Clustering, order: list[int]) -> None:
    """Wide rows, so that no two partitions of signs, whole numbers all, tie."""
    deltas = np.random.default_rng(14).normal(size=(5, 20, 1001)).astype(np.float32)
    deltas[order[0], :3] = 0
    found = clustered(deltas, 2, how)
    np.testing.assert_array_equal(growth_labels(found[:, order]), clustered(deltas[order], 2, how))


def test_scaling_a_delta_changes_euclidean_groups() -> None:
    deltas = np.random.default_rng(15).normal(size=(4, 50, 20)).astype(np.float32)
    scaled = deltas * np.array([1, 3, 1, 1], np.float32)[:, None, None]
    for how in (Clustering("kmeans", "euclidean"), Clustering("kmeans", "manhattan")):
        assert (clustered(deltas, 2, how) != clustered(scaled, 2, how)).any(axis=1).mean() > 0.3


def test_turning_the_inputs_changes_manhattan_groups_only() -> None:
    generator = np.random.default_rng(16)
    deltas = generator.normal(size=(4, 60, 12)).astype(np.float32)
    turned = deltas.astype(np.float64) @ np.linalg.qr(generator.normal(size=(12, 12)))[0]
    for how in (Clustering("kmeans", "cosine"), Clustering("kmeans", "euclidean"), Clustering("spherical", "cosine")):
        np.testing.assert_array_equal(clustered(deltas, 2, how), clustered(turned, 2, how))
    manhattan = Clustering("kmeans", "manhattan")
    assert (clustered(deltas, 2, manhattan) != clustered(turned, 2, manhattan)).any()


def lloyd(rows: Floats, groups: int, generator: np.random.Generator) -> float:
    """What one run of Lloyd's rounds from random centres comes to; inf where a group runs empty."""
    centres = rows[generator.choice(len(rows), groups, replace=False)]
    for _ in range(20):
        labels = ((rows[:, None] - centres[None]) ** 2).sum(axis=-1).argmin(axis=1)
        if len(set(labels.tolist())) < groups:
            return math.inf
        centres = np.stack([rows[labels == group].mean(axis=0) for group in range(groups)])
    return float(((rows - centres[labels]) ** 2).sum())


def members(labels: NDArray[np.uint8]) -> list[list[int]]:
    return [np.flatnonzero(labels == group).tolist() for group in range(int(labels.max()) + 1)]


def test_spread_is_at_most_that_of_lloyd_and_of_chance() -> None:
    generator = np.random.default_rng(17)
    deltas = generator.normal(size=(6, 25, 8)).astype(np.float32)
    rows = deltas.astype(np.float64)
    found, drawn = clustered(deltas, 3, Clustering("kmeans", "euclidean")), clustered(deltas, 3, Clustering("random", "cosine"))
    for row in range(25):
        best = spread(rows[:, row], members(found[row]))
        assert best <= min(lloyd(rows[:, row], 3, generator) for _ in range(10)) * (1 + 1e-4)
        assert best <= spread(rows[:, row], members(drawn[row])) * (1 + 1e-4)


@pytest.mark.parametrize("how", HOW, ids=str)
def test_unchanged_experts_form_a_group_of_their_own_in_every_kind(how: Clustering) -> None:
    deltas = np.random.default_rng(18).normal(size=(5, 30, 10)).astype(np.float32)
    deltas[[1, 4]] = 0
    found = clustered(deltas, 2, how)
    np.testing.assert_array_equal(found, np.tile([0, 1, 0, 0, 1], (30, 1)))


def test_the_table_that_is_read() -> None:
    tables = {"kmeans": "gram", "spherical": "gram", "sign": "sign", "random": "gram"}
    assert {kind: Clustering(kind, "cosine").table for kind in tables} == tables
    assert Clustering("kmeans", "manhattan").table == "l1"
    assert Clustering("random", "manhattan").table == "gram"
    assert Clustering("sign", "manhattan", "mass").table == "sums"
    for kind in ("spherical", "sign"):
        with pytest.raises(ValueError, match="manhattan"):
            Clustering(kind, "manhattan")


def test_what_does_not_fit_together_is_refused() -> None:
    products, draws = np.tile(np.eye(3), (2, 1, 1)), np.zeros(2, np.int64)
    with pytest.raises(ValueError, match=r"table l1 of shape \(2, 3, 3\), not None"):
        production.cluster_channels(products, 2, Clustering("kmeans", "manhattan"), draws)
    with pytest.raises(ValueError, match=r"table sums of shape \(2, 3\), not \(2, 3, 3\)"):
        production.cluster_channels(products, 2, Clustering("sign", "cosine", "mass"), draws, products)
    with pytest.raises(ValueError, match="0 groups"):
        production.cluster_channels(products, np.array([2, 0]), Clustering("kmeans", "cosine"), draws)
    many = np.tile(np.eye(MAX_EXPERTS + 1), (2, 1, 1))
    with pytest.raises(ValueError, match="65 experts"):
        production.cluster_channels(many, 2, Clustering("kmeans", "cosine"), draws)
    assert production.cluster_channels(products[:0], 2, Clustering("kmeans", "cosine"), draws[:0]).shape == (0, 3)
