from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.kernels import clustering as production
from pipeline.kernels.clustering import Clustering, cosines, drawn_partition, growth_labels, partitions
from pipeline.kernels.gram import gram
from tests.support.reference import cluster_channel, set_partitions


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
    return gram(torch.from_numpy(deltas.astype(np.float32))).numpy()


def cluster_channels(gram: NDArray[np.float64], groups: int, kind: str = "kmeans", metric: str = "cosine") -> NDArray[np.uint8]:
    return production.cluster_channels(gram, groups, Clustering(kind, metric), np.zeros(len(gram), np.int64))


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
    whole = gram(deltas)
    parts = torch.cat([gram(deltas[:, start : start + 5]) for start in range(0, 33, 5)])
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
