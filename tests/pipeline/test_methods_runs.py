"""What every merge method must come to in a whole run: identities, ends of its options, and what it stores."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from flows.run import Outcome
from serving.lookup import export
from storage.artifact import Artifact
from storage.errors import RecipeError
from tests.support.reference import Options, as_float64, bits_of, spread, ulps
from tests.support.reference_methods import difference, merge_model
from tests.support.running import merged, rebuilt
from tests.support.tiny_experts import NAMES, Family, Tensors, fine_tuned, random_tensors, write_checkpoint, write_family

METHODS: dict[str, dict[str, Any]] = {
    "average": {"groups": 2},
    "task_arithmetic": {"groups": 2},
    "ties": {"groups": 2, "density": 0.5},
    "ties by row": {"groups": 2, "method": "ties", "trim_scope": "row"},
    "ties by model": {"groups": 2, "method": "ties", "trim_scope": "model"},
    "dare": {"groups": 2},
    "dare l1": {"groups": 2, "method": "dare", "rescale": "l1"},
    "dare_ties": {"groups": 2},
    "slerp": {"groups": 3},
    "byom": {"groups": 1},
    "byom delta": {"groups": 1, "method": "byom", "residual": "delta"},
}


def run(family: Family, **merge: Any) -> Outcome:
    return merged(family.recipe(**{f"merge.{key}": value for key, value in merge.items()}))


def settings_of(name: str) -> dict[str, Any]:
    return {"method": name, **METHODS[name]}


def written(folder: Path, base: Tensors, experts: Mapping[str, Tensors]) -> Family:
    """A family of checkpoints with these tensors."""
    write_checkpoint(folder / "base", base)
    for name, tensors in experts.items():
        write_checkpoint(folder / name, tensors)
    return Family(folder, base, dict(experts))


def moved_by(base: Tensors, change: Callable[[torch.Tensor], torch.Tensor]) -> Tensors:
    """The base with a delta made of each of its tensors, in its type."""
    return {name: (tensor.float() + change(tensor)).to(tensor.dtype) for name, tensor in base.items()}


def merged_names(outcome: Outcome) -> list[str]:
    return [name for name, record in outcome.manifest.tensors.items() if record.policy == "merge"]


def assert_same(found: Tensors, expected: Tensors) -> None:
    """To the bit."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(bits_of(found[name]), bits_of(tensor)), name


def rows_of(outcome: Outcome, tensor: str) -> NDArray[np.int32]:
    """(channels, experts) pool rows, as far as the base has them."""
    artifact = Artifact(outcome.path)
    return np.stack([artifact.expert_rows(name)[tensor] for name in artifact.manifest.experts], axis=1)


def test_lambda_of_one_over_n_is_the_average(family: Family) -> None:
    """The version is a digest of the contents: equal versions are equal bytes."""
    average = run(family, groups=1, method="average")
    assert run(family, groups=1, scaling=0.25).version == average.version
    assert run(family, groups=1, scaling=1.0, combine="mean").version == average.version
    assert run(family, groups=1, scaling=0.5).version != average.version


@pytest.mark.parametrize("scaling", ["mean", 0.5])
def test_with_full_density_nothing_is_pruned(family: Family, scaling: float | str) -> None:
    plain = run(family, scaling=scaling)
    assert run(family, method="dare", density=1.0, scaling=scaling).version == plain.version
    assert run(family, method="dare", density=1.0, rescale="l1", scaling=scaling).version == plain.version
    ties = run(family, method="ties", density=1.0, scaling=scaling)
    assert run(family, method="dare_ties", density=1.0, scaling=scaling, seed=7).version == ties.version
    assert ties.version != plain.version
    assert {record.trimmed_to for record in ties.manifest.experts.values()} == {None}


def test_ties_of_equal_signs_is_the_mean(tmp_path: Path) -> None:
    base = random_tensors(0)
    generator = torch.Generator().manual_seed(1)

    def raised(tensor: torch.Tensor) -> torch.Tensor:
        return torch.rand(tensor.shape, generator=generator) * 0.02 + 0.004

    family = written(tmp_path / "family", base, {name: moved_by(base, raised) for name in ("a", "b", "c")})
    mean, ties = run(family, groups=1, method="average"), run(family, groups=1, method="ties", density=1.0)
    left, right = rebuilt(mean, "a", tmp_path / "mean"), rebuilt(ties, "a", tmp_path / "ties")
    for name in merged_names(mean):
        assert all(bool((difference(own[name], base[name]) > 0).all()) for own in family.experts.values())
        assert ulps(left[name], as_float64(right[name])).max() <= 1


def test_of_two_that_disagree_ties_keeps_the_larger(tmp_path: Path) -> None:
    base = random_tensors(0)
    first = fine_tuned(base, 1)
    generator = torch.Generator().manual_seed(2)
    second = {}
    for name, own in first.items():
        away = (base[name].float() - own.float()) * (torch.rand(own.shape, generator=generator) + 0.5)
        second[name] = (base[name].float() + away).to(own.dtype)
    family = written(tmp_path / "family", base, {"a": first, "b": second})
    outcome = run(family, groups=1, method="ties", density=1.0)
    found = rebuilt(outcome, "a", tmp_path)
    for name in merged_names(outcome):
        a, b = difference(first[name], base[name]), difference(second[name], base[name])
        assert bool((a * b <= 0).all())
        larger = np.where((np.abs(a) > np.abs(b)) | ((np.abs(a) == np.abs(b)) & (a > 0)), a, b)
        assert ulps(found[name], as_float64(base[name]) + larger).max() <= 1
        assert bool((np.abs(a) > np.abs(b)).any() and (np.abs(a) < np.abs(b)).any())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_byom_that_keeps_everything_gives_experts_back(tmp_path: Path, dtype: torch.dtype) -> None:
    family = write_family(tmp_path / "family", dtype)
    outcome = run(family, groups=1, method="byom", keep=1.0, scaling=0.7)
    for name, own in family.experts.items():
        assert_same(rebuilt(outcome, name, tmp_path), own)


@pytest.mark.parametrize("residual", ["merged", "delta"])
def test_byom_that_keeps_no_entry_is_task_arithmetic(family: Family, tmp_path: Path, residual: str) -> None:
    """round(0.01 * 24) = 0 entries of a row."""
    plain = run(family, groups=1)
    kept = run(family, groups=1, method="byom", keep=0.01, residual=residual)
    assert kept.manifest.parameters.residue == 0
    assert Artifact(kept.path).verify() == []
    for name in NAMES:
        assert_same(rebuilt(kept, name, tmp_path / "byom"), rebuilt(plain, name, tmp_path / "plain"))


@pytest.mark.parametrize("residual", ["merged", "delta"])
def test_byom_stores_one_model_and_its_entries(family: Family, residual: str) -> None:
    outcome = run(family, groups=1, method="byom", keep=0.3, residual=residual)
    artifact, manifest = Artifact(outcome.path), outcome.manifest
    assert artifact.verify() == []
    names = merged_names(outcome)
    sizes = {name: (family.base[name].shape[0], round(0.3 * family.base[name].shape[1])) for name in names}
    for expert in NAMES:
        residue = artifact.residue(expert)
        assert {name: columns.shape for name, (columns, _) in residue.items()} == sizes
        assert {name: values.shape for name, (_, values) in residue.items()} == sizes
        for columns, _ in residue.values():
            assert bool((np.diff(columns, axis=1) > 0).all())
    kept = len(NAMES) * sum(rows * count for rows, count in sizes.values())
    special = "model.layers.0.mlp.up_proj.weight"
    assert {n for n in names if manifest.tensors[n].rows != len(family.base[n])} <= {special}
    pool = sum(record.rows * record.shape[-1] for record in manifest.tensors.values())
    assert (manifest.parameters.residue, manifest.parameters.pool) == (kept, pool)
    assert manifest.parameters.ratio == pytest.approx((kept + pool) / manifest.parameters.experts)


def test_an_export_of_byom_is_a_plain_checkpoint(family: Family, tmp_path: Path) -> None:
    """What an expert keeps beside the pool is in its weights, not in a file beside them."""
    names = {path.name for path in export(Artifact(run(family, groups=1, method="byom").path), "code", tmp_path / "code")}
    assert names == {"model.safetensors", "config.json", "tokenizer_config.json"}


def test_byom_that_keeps_more_is_nearer(family: Family) -> None:
    errors = [
        run(family, groups=1, method="byom", keep=keep).manifest.experts["code"].reconstruction_error
        for keep in (0.1, 0.4, 0.9)
    ]
    assert errors[0] is not None
    assert errors == sorted(errors, key=lambda error: -(error or 0))
    assert len(set(errors)) == 3


@pytest.mark.parametrize(("t", "end"), [(0.0, 0), (1.0, -1)])
def test_slerp_ends_at_the_members_of_a_pair(family: Family, tmp_path: Path, t: float, end: int) -> None:
    outcome = run(family, groups=3, method="slerp", t=t)
    found = {name: rebuilt(outcome, name, tmp_path) for name in NAMES}
    pairs = 0
    for tensor in merged_names(outcome):
        for channel, rows in enumerate(rows_of(outcome, tensor)):
            for row in set(rows.tolist()):
                members = [name for name, mine in zip(NAMES, rows, strict=True) if mine == row]
                if len(members) == 2:
                    pairs += 1
                    expected = as_float64(family.experts[members[end]][tensor][channel])
                    assert all(ulps(found[name][tensor][channel], expected).max() <= 1 for name in members)
    assert pairs > 200


def test_slerp_of_orthogonal_deltas_keeps_their_length(tmp_path: Path) -> None:
    base = random_tensors(0, dtype=torch.float32)
    even, odd = dict(base), dict(base)
    for name, tensor in base.items():
        noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(5)) * 0.01
        noise[..., 1::2] = noise[..., ::2]
        columns = torch.arange(tensor.shape[-1]) % 2 == 0
        even[name], odd[name] = tensor + noise * columns, tensor + noise * ~columns
    family = written(tmp_path / "family", base, {"a": even, "b": odd})
    outcome = run(family, groups=1, method="slerp", t=0.25)
    found = rebuilt(outcome, "b", tmp_path)
    for name in merged_names(outcome):
        before = np.linalg.norm(difference(even[name], base[name]), axis=1)
        np.testing.assert_allclose(np.linalg.norm(difference(found[name], base[name]), axis=1), before, rtol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_experts_that_are_the_base_give_the_base(tmp_path: Path, name: str) -> None:
    base = random_tensors(0)
    base["model.layers.0.mlp.up_proj.weight"][3, :4] = -0.0
    family = written(tmp_path / "family", base, dict.fromkeys(NAMES, base))
    for singleton in ("keep", "scale"):
        outcome = run(family, singleton=singleton, **settings_of(name))
        for expert in ("chinese", "math"):
            assert_same(rebuilt(outcome, expert, tmp_path / singleton), base)


@pytest.mark.parametrize("name", METHODS)
def test_experts_that_are_equal_give_that_expert(tmp_path: Path, name: str) -> None:
    base = random_tensors(0)
    tuned = fine_tuned(base, 1)
    family = written(tmp_path / "family", base, dict.fromkeys(NAMES, tuned))
    kept = run(family, **settings_of(name))
    assert all(record.rows == (len(base[n]) if base[n].dim() > 1 else 1) for n, record in kept.manifest.tensors.items())
    for expert in ("chinese", "math"):
        assert_same(rebuilt(kept, expert, tmp_path / "kept"), tuned)
    if name in ("average", "task_arithmetic", "slerp", "byom"):
        found = rebuilt(run(family, singleton="scale", **settings_of(name)), "code", tmp_path / "scaled")
        assert all(ulps(found[tensor], as_float64(tuned[tensor])).max() <= 1 for tensor in merged_names(kept))


def spread_of(family: Family, tensor: str, labels: NDArray[np.int64]) -> float:
    """k-means' objective over the channels of a matrix."""
    deltas = np.stack([difference(own[tensor], family.base[tensor]) for own in family.experts.values()])
    blocks = [[np.flatnonzero(found == label).tolist() for label in set(found.tolist())] for found in labels]
    return sum(spread(deltas[:, channel], groups) for channel, groups in enumerate(blocks))


@pytest.mark.parametrize("singleton", ["keep", "scale"])
def test_the_error_is_k_means_own_and_falls_with_k(tmp_path: Path, singleton: str) -> None:
    """Metric euclidean and the mean: what is lost is the objective that was minimised."""
    family = write_family(tmp_path / "family", torch.float32)
    found = []
    for groups in (1, 2, 3, 4):
        outcome = run(family, groups=groups, metric="euclidean", method="average", singleton=singleton)
        names = merged_names(outcome)
        norms = {
            n: sum(float((difference(own[t], family.base[t]) ** 2).sum()) for t in names) for n, own in family.experts.items()
        }
        squares = {n: (record.reconstruction_error or 0.0) ** 2 * norms[n] for n, record in outcome.manifest.experts.items()}
        reference = merge_model(
            family.base, family.experts, names, Options(groups, "average", metric="euclidean", singleton=singleton)
        )
        for n, own in family.experts.items():
            expected = sum(float(((reference.tensors[t].rebuilt[n] - as_float64(own[t])) ** 2).sum()) for t in names)
            assert squares[n] == pytest.approx(expected, rel=1e-4, abs=1e-12)
        found.append(sum(squares.values()))
        spreads = [spread_of(family, tensor, reference.tensors[tensor].labels) for tensor in names]
        assert found[-1] == pytest.approx(sum(spreads), rel=1e-4, abs=1e-12)
    assert found[0] > found[1] > found[2] > found[3] == 0


@pytest.mark.parametrize("name", ["average", "ties", "slerp", "byom", "byom delta"])
def test_names_of_experts_only_label_them(family: Family, tmp_path: Path, name: str) -> None:
    """Also where they reverse the order; SLERP goes half the way."""
    names = dict(zip(NAMES, ("zulu", "yankee", "xray", "whisky"), strict=True))
    first = run(family, **settings_of(name))
    merge = {f"merge.{key}": value for key, value in settings_of(name).items()}
    second = merged(family.recipe(**merge, experts={new: f"./{old}" for old, new in names.items()}))
    assert [record.rows for record in first.manifest.tensors.values()] == [r.rows for r in second.manifest.tensors.values()]
    for old, new in names.items():
        left, right = rebuilt(first, old, tmp_path / "first"), rebuilt(second, new, tmp_path / "second")
        far = 0
        for tensor, values in left.items():
            distance = ulps(values, as_float64(right[tensor]))
            assert distance.max() <= 1
            far += int((distance > 0).sum())
        assert far <= 0.002 * sum(values.numel() for values in left.values())


@pytest.mark.parametrize("name", ["task_arithmetic", "ties", "ties by row", "ties by model", "slerp", "byom"])
def test_the_order_of_channels_goes_through(tmp_path: Path, name: str) -> None:
    family = write_family(tmp_path / "family")
    names = [n for n, tensor in family.base.items() if tensor.dim() == 2 and "layers" in n]
    generator = torch.Generator().manual_seed(9)
    orders = {n: torch.randperm(len(family.base[n]), generator=generator) for n in names}

    def shuffled(tensors: Tensors) -> Tensors:
        return {n: tensor[orders[n]] if n in orders else tensor for n, tensor in tensors.items()}

    other = written(tmp_path / "other", shuffled(family.base), {n: shuffled(own) for n, own in family.experts.items()})
    first, second = run(family, **settings_of(name)), run(other, **settings_of(name))
    for expert in NAMES:
        assert_same(rebuilt(second, expert, tmp_path / "second"), shuffled(rebuilt(first, expert, tmp_path / "first")))


@pytest.mark.parametrize(("groups", "low", "high"), [(1, 6, 6), (2, 2, 3), (3, 1, 1), (4, 0, 0)])
def test_similarities_of_four_experts_are_bounded(family: Family, groups: int, low: float, high: float) -> None:
    """Share of channels in one group, over the six pairs; of any three experts two are together with K=2."""
    outcome = run(family, groups=groups)
    names = [n for n in merged_names(outcome) if n != "model.layers.0.mlp.up_proj.weight"]  # equal rows are stored once
    rows = np.concatenate([rows_of(outcome, name) for name in names])
    similar = {pair: float((rows[:, pair[0]] == rows[:, pair[1]]).mean()) for pair in itertools.combinations(range(4), 2)}
    assert low - 1e-12 <= sum(similar.values()) <= high + 1e-12
    if groups == 2:
        assert 2 < sum(similar.values()) < 3
        for trio in itertools.combinations(range(4), 3):
            assert sum(similar[pair] for pair in itertools.combinations(trio, 2)) >= 1


def noise(seed: int, size: float) -> Callable[[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda tensor: torch.randn(tensor.shape, generator=generator) * size


def planted(folder: Path) -> Family:
    """Ten experts in three directions."""
    base = random_tensors(0)
    directions = [fine_tuned(base, seed, size=0.02) for seed in (1, 2, 3)]
    return written(folder, base, {f"expert-{n}": moved_by(directions[n % 3], noise(100 + n, 0.002)) for n in range(10)})


@pytest.mark.parametrize(
    "merge",
    [{}, {"metric": "manhattan", "method": "ties"}, {"clustering": "spherical"}, {"clustering": "sign"}],
    ids=lambda merge: "-".join(merge.values()) or "defaults",
)
def test_ten_experts_find_the_groups_they_were_made_in(tmp_path: Path, merge: dict[str, Any]) -> None:
    family = planted(tmp_path / "family")
    outcome = run(family, groups=3, **merge)
    assert Artifact(outcome.path).verify() == []
    for name in merged_names(outcome):
        rows = rows_of(outcome, name)
        together = rows[:, :, None] == rows[:, None, :]
        expected = (np.arange(10)[:, None] - np.arange(10)) % 3 == 0
        assert (together == expected).mean() > (0.98 if merge.get("clustering") == "sign" else 0.999)
        assert {len(set(row)) for row in rows.tolist()} == {3}


def test_thresholds_are_found_once(family: Family) -> None:
    """Another K reads tables and thresholds, no delta; another density or scope does."""
    first = run(family, method="ties", density=0.5)
    assert first.manifest.moved["similarity read"] > 0
    second = run(family, method="ties", density=0.5, groups=3)
    assert second.new
    assert second.manifest.moved["similarity read"] == 0
    assert {n: r.trimmed_to for n, r in second.manifest.experts.items()} == {
        n: r.trimmed_to for n, r in first.manifest.experts.items()
    }
    for other in ({"density": 0.4}, {"density": 0.5, "trim_scope": "model"}):
        assert run(family, method="ties", **other).manifest.moved["similarity read"] > 0
    assert run(family, method="ties", density=0.5, trim_scope="row").manifest.moved["similarity read"] == 0


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"garbage",
        b"\xff\x00",
        b"[]",
        b"null",
        b'{"thresholds":{},"kept":1,"entries":1}',
        b'{"thresholds":{"":"x"},"kept":1}',
    ],
    ids=["empty", "no-json", "no-text", "list", "null", "no-tensors", "no-number"],
)
def test_damaged_thresholds_are_found_again(family: Family, garbage: bytes) -> None:
    merge = {"method": "ties", "density": 0.5, "groups": 3}
    expected = run(family, method="ties", density=0.5)
    files = sorted((family.folder.parent / "deltas").glob("*/thresholds/*/*.json"))
    assert len(files) == len(NAMES)
    contents = [path.read_bytes() for path in files]
    files[1].write_bytes(garbage)
    again = run(family, **merge)
    assert again.manifest.moved["similarity read"] > 0
    assert [path.read_bytes() for path in files] == contents
    assert [r.trimmed_to for r in again.manifest.experts.values()] == [r.trimmed_to for r in expected.manifest.experts.values()]


@pytest.mark.parametrize(
    ("merge", "message"),
    [
        ({"groups": 2, "method": "slerp"}, "merge.groups: slerp merges pairs: with 4 experts expected at least 3, got 2"),
        (
            {"groups": 3, "clustering": "sign", "sign": "mass"},
            "merge.groups: the sign of a sum makes two groups: expected 2, got 3",
        ),
        (
            {"groups": 4, "method": "slerp", "clustering": "sign", "sign": "mass"},
            "merge.sign: slerp merges pairs, and the sign of a sum may put three experts together",
        ),
    ],
)
def test_what_four_experts_cannot_do_is_refused(family: Family, merge: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        run(family, **merge)
