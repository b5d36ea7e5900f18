"""``groups: auto`` in whole runs: the budget, what is bought with it, and what is said about it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from flows.run import Outcome
from pipeline import memory
from storage import layout
from storage.artifact import Artifact
from storage.errors import PlanError, RecipeError
from tests.support.reference import Floats, bits_of, cluster_channel
from tests.support.reference_methods import difference
from tests.support.running import merged, rebuilt
from tests.support.tiny_experts import NAMES, Family, Tensors, fine_tuned, random_tensors, write_checkpoint

BUDGETS = (0.25, 0.3, 0.5, 0.75, 1.0)
MATRIX = "model.layers.0.self_attn.k_proj.weight"


def run(family: Family, **merge: Any) -> Outcome:
    return merged(family.recipe(**{"merge.groups": "auto", **{f"merge.{key}": value for key, value in merge.items()}}))


def plain_family(folder: Path, dtype: torch.dtype = torch.bfloat16, names: Sequence[str] = NAMES) -> Family:
    """Experts of different sizes without equal rows; layer 1 of every expert is nearer to the base than layer 0."""
    base = random_tensors(0, dtype=dtype)
    experts: dict[str, Tensors] = {}
    for seed, name in enumerate(names, 1):
        far, near = (fine_tuned(base, seed, size=size * seed) for size in (0.008, 0.004))
        experts[name] = {tensor: (near if "layers.1" in tensor else far)[tensor] for tensor in base}
    write_checkpoint(folder / "base", base)
    for name, tensors in experts.items():
        write_checkpoint(folder / name, tensors)
    return Family(folder, base, experts)


def in_a_line(folder: Path) -> Family:
    """Experts whose deltas lie apart on a line, each gap wider than the last: every further group brings much less."""
    base = random_tensors(0, dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    direction = {name: torch.randn(tensor.shape, generator=generator) * 0.01 for name, tensor in base.items()}
    experts = {}
    for name, length in zip(NAMES, (0.8, 1.0, 1.6, 4.0), strict=True):
        experts[name] = {t: tensor + direction[t] * length for t, tensor in base.items()}
    write_checkpoint(folder / "base", base)
    for name, tensors in experts.items():
        write_checkpoint(folder / name, tensors)
    return Family(folder, base, experts)


def merged_names(outcome: Outcome) -> list[str]:
    return [name for name, record in outcome.manifest.tensors.items() if record.policy == "merge"]


def rows_of(outcome: Outcome, tensor: str) -> NDArray[np.int32]:
    """(channels, experts) pool rows."""
    artifact = Artifact(outcome.path)
    return np.stack([artifact.expert_rows(name)[tensor] for name in artifact.manifest.experts], axis=1)


def counts(outcome: Outcome, tensor: str) -> list[int]:
    """Pool rows of every channel."""
    return [len(set(row)) for row in rows_of(outcome, tensor).tolist()]


def share(outcome: Outcome) -> float:
    """Entries of the merged tensors' pool in those of all experts."""
    records = [record for record in outcome.manifest.tensors.values() if record.policy == "merge"]
    stored = sum(record.rows * record.shape[1] for record in records)
    return stored / (len(outcome.manifest.experts) * sum(record.shape[0] * record.shape[1] for record in records))


def stacked(family: Family, tensor: str) -> Floats:
    """(experts, rows, width) deltas."""
    return np.stack([difference(own[tensor], family.base[tensor]) for _, own in sorted(family.experts.items())])


def relative_error(deltas: Floats, labels: Sequence[Sequence[int]]) -> Floats:
    """(rows,) squared distances to the groups' means, each expert's in that of its delta of the matrix."""
    norms = (deltas**2).sum(axis=(1, 2))
    out = np.zeros(deltas.shape[1])
    for channel, found in enumerate(labels):
        for label in set(found):
            members = [n for n, mine in enumerate(found) if mine == label]
            centre = deltas[members, channel].mean(axis=0)
            out[channel] += sum(float(((deltas[n, channel] - centre) ** 2).sum()) / norms[n] for n in members)
    return out


def lost(family: Family, outcome: Outcome) -> float:
    """The error of the groups that were chosen, over all merged tensors."""
    return sum(
        float(relative_error(stacked(family, name), rows_of(outcome, name).tolist()).sum()) for name in merged_names(outcome)
    )


@pytest.mark.parametrize("special", [False, True], ids=["plain", "special rows"])
def test_budgets_hold_and_more_is_never_worse(tmp_path: Path, family: Family, special: bool) -> None:
    family = family if special else plain_family(tmp_path / "plain" / "family")
    outcomes = [run(family, budget=budget) for budget in BUDGETS]
    errors = [lost(family, outcome) for outcome in outcomes]
    assert all(share(outcome) <= budget for outcome, budget in zip(outcomes, BUDGETS, strict=True))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0
    if not special:  # nothing is left unspent but what is less than the dearest step
        everything = 4 * sum(tensor.numel() for name, tensor in family.base.items() if name in merged_names(outcomes[0]))
        left = [budget - share(outcome) for budget, outcome in zip(BUDGETS, outcomes, strict=True)]
        assert max(left) <= 3 * 24 / everything
        assert len({round(error, 9) for error in errors}) == len(BUDGETS)
    for outcome, budget in zip(outcomes, BUDGETS, strict=True):
        assert any(note.startswith(f"groups: auto: budget {budget} of the experts' entries") for note in outcome.manifest.notes)
        assert {outcome.manifest.tensors[name].groups for name in merged_names(outcome)} == {"auto"}
        assert Artifact(outcome.path).verify() == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("singleton", ["keep", "scale"])
def test_the_whole_budget_gives_every_bit_back(tmp_path: Path, dtype: torch.dtype, singleton: str) -> None:
    family = plain_family(tmp_path / "family", dtype)
    outcome = run(family, budget=1.0, singleton=singleton, method="dare")
    assert share(outcome) == 1
    for name, own in family.experts.items():
        found = rebuilt(outcome, name, tmp_path)
        assert all(torch.equal(bits_of(found[tensor]), bits_of(values)) for tensor, values in own.items())


def test_the_whole_budget_gives_special_rows_back(family: Family, tmp_path: Path) -> None:
    """Every number; -0.0 where the base has 0.0 is no difference that a row would be bought for."""
    outcome = run(family, budget=1.0)
    assert share(outcome) < 1
    for name, own in family.experts.items():
        found = rebuilt(outcome, name, tmp_path)
        assert all(torch.equal(found[tensor], values) for tensor, values in own.items())


@pytest.mark.parametrize("count", [2, 3, 4, 6, 7])
def test_the_least_budget_is_one_model(tmp_path: Path, count: int) -> None:
    """1 / N to the last bit, and the same bytes as K=1."""
    family = plain_family(tmp_path / "family", names=[f"expert-{n}" for n in range(count)])
    outcome = run(family, budget=1 / count)
    assert {k for name in merged_names(outcome) for k in counts(outcome, name)} == {1}
    assert merged(family.recipe(**{"merge.groups": 1})).version == outcome.version


def test_a_budget_below_one_model_is_refused(family: Family) -> None:
    with pytest.raises(RecipeError, match=r"merge\.budget: one row per channel is 1/4 of 4 experts; got 0\.24"):
        run(family, budget=0.24)
    rules = [{"match": "*layers.0.*", "groups": 4}]
    with pytest.raises(
        PlanError, match=r"merge\.budget: one row per channel and .* rules set need 0\.6250, got 0\.5; raise it"
    ):
        run(family, budget=0.5, rules=rules)
    assert share(run(family, budget=0.625, rules=rules)) <= 0.625


def test_without_a_budget_the_knee_is_taken_and_explained(tmp_path: Path) -> None:
    family = plain_family(tmp_path / "family")
    outcome = run(family)
    (note,) = [note for note in outcome.manifest.notes if note.startswith("groups: auto")]
    assert note.startswith("groups: auto: no budget: ")
    for reason in ("of the full cost", "than the average one", "K=", "of the error of one model"):
        assert reason in note
    assert f"{100 * share(outcome):.1f} % of the merged entries" in note
    single = merged(family.recipe(**{"merge.groups": 1}))
    assert f"{100 * lost(family, outcome) / lost(family, single):.1f} % of the error" in note
    assert 0.25 < share(outcome) < 1


def test_two_experts_need_no_knee(tmp_path: Path) -> None:
    outcome = run(plain_family(tmp_path / "family", names=("a", "b")))
    assert any(note.startswith("groups: auto: no budget: ") for note in outcome.manifest.notes)
    assert 0.5 <= share(outcome) <= 1


def test_the_same_bytes_in_any_pieces(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    def digests(cluster: Mapping[str, Any]) -> dict[str, str]:
        for folder in ("deltas", "output"):
            shutil.rmtree(family.folder.parent / folder, ignore_errors=True)
        outcome = merged(family.recipe(**{"merge.groups": "auto", "merge.budget": 0.55, "cluster": dict(cluster)}))
        assert outcome.new
        return {name: record.sha256 for name, record in outcome.manifest.files.items() if name not in layout.DOCUMENTS}

    expected = digests({"kind": "none"})
    assert digests({"kind": "local", "workers": 1}) == expected
    monkeypatch.setattr(layout, "CHUNK_ELEMENTS", 5 * 16)
    assert digests({"kind": "none", "memory": "16KB"}) == expected
    monkeypatch.setattr(memory, "SLICE_ELEMENTS", 16)
    assert digests({"kind": "none"}) == expected


def test_a_matrix_as_a_whole_has_one_k(tmp_path: Path) -> None:
    family = plain_family(tmp_path / "family")
    outcome = run(family, budget=0.6, granularity="layer")
    assert share(outcome) <= 0.6
    chosen = {name: set(counts(outcome, name)) for name in merged_names(outcome)}
    assert {len(found) for found in chosen.values()} == {1}
    assert len(set.union(*chosen.values())) > 1


@pytest.mark.parametrize(("budget", "k"), [(0.25, 1), (0.49, 1), (0.5, 2), (0.74, 2), (0.75, 3), (0.9, 3), (1.0, 4)])
@pytest.mark.parametrize("kind", ["falling gains", "rising gains"])
def test_the_model_as_a_whole_has_the_k_that_is_paid_for(tmp_path: Path, budget: float, k: int, kind: str) -> None:
    """Every further group of the family lowers the error, whether by less or by more than the one before."""
    family = in_a_line(tmp_path / "family") if kind == "falling gains" else plain_family(tmp_path / "family")
    outcome = run(family, budget=budget, granularity="model", metric="euclidean")
    assert {found for name in merged_names(outcome) for found in counts(outcome, name)} == {k}


@pytest.mark.parametrize("general", ["auto", 2])
def test_a_k_that_is_set_counts_towards_the_budget(tmp_path: Path, general: str | int) -> None:
    """A rule sets K beside auto, or auto beside K: the same run."""
    family = plain_family(tmp_path / "family")
    layer, groups = ("0", 2) if general == "auto" else ("1", "auto")
    outcome = run(family, groups=general, budget=0.6, rules=[{"match": f"*layers.{layer}.*", "groups": groups}])
    for name in merged_names(outcome):
        fixed = "layers.0" in name
        assert outcome.manifest.tensors[name].groups == (2 if fixed else "auto")
        assert (set(counts(outcome, name)) == {2}) == fixed
    assert 0.59 < share(outcome) <= 0.6
    alone = [counts(outcome, name) for name in merged_names(outcome) if "layers.1" in name]
    assert np.mean([k for ks in alone for k in ks]) == pytest.approx(2.8, abs=0.1)


def test_equal_experts_cost_no_second_row(tmp_path: Path) -> None:
    """Three different experts of four: three quarters of the entries are all of them."""
    family = plain_family(tmp_path / "family")
    shutil.rmtree(family.folder / "math")
    write_checkpoint(family.folder / "math", family.experts["code"])
    twins = Family(family.folder, family.base, {**family.experts, "math": family.experts["code"]})
    outcome = run(twins, budget=0.75)
    assert share(outcome) == 0.75
    for name, own in twins.experts.items():
        found = rebuilt(outcome, name, tmp_path)
        assert all(torch.equal(bits_of(found[tensor]), bits_of(values)) for tensor, values in own.items())


def cheapest(curves: Floats, rows: int) -> float:
    """The least error that this many rows can buy, over every K of every channel."""
    best = np.full(rows + 1, np.inf)
    best[0] = 0
    for curve in curves:
        after = np.full_like(best, np.inf)
        for k, error in enumerate(curve, 1):
            after[k:] = np.minimum(after[k:], best[: len(best) - k] + error)
        best = after
    return float(best.min())


@pytest.mark.parametrize(("metric", "convex"), [("euclidean", True), ("manhattan", True), ("cosine", False)])
def test_no_other_choice_is_much_better(tmp_path: Path, metric: str, convex: bool) -> None:
    """One matrix of 8 channels against all choices there are: the best of all where every further group brings less."""
    family = in_a_line(tmp_path / "family") if convex else plain_family(tmp_path / "family")
    deltas = stacked(family, MATRIX)
    labels = [[cluster_channel(deltas[:, channel], k, metric=metric)[0] for channel in range(8)] for k in range(1, 5)]
    curves = np.stack([relative_error(deltas, found) for found in labels], axis=1)
    gains = curves[:, :-1] - curves[:, 1:]
    assert bool((gains[:, :-1] >= gains[:, 1:]).all()) == convex
    largest = (curves[:, :1] - curves).max()  # an envelope may be one step
    rules = [{"match": MATRIX, "policy": "merge"}, {"match": "*", "policy": "private"}]
    for rows in (8, 13, 24, 31):
        outcome = run(family, budget=rows / 32, metric=metric, rules=rules)
        chosen = counts(outcome, MATRIX)
        assert sum(chosen) == rows if convex else sum(chosen) <= rows
        found = float(curves[np.arange(8), np.array(chosen) - 1].sum())
        best = cheapest(curves, rows)
        assert found == pytest.approx(best, abs=1e-9) if convex else best - 1e-9 <= found <= best + largest + 1e-9


@pytest.mark.parametrize(
    "merge",
    [
        {"method": "ties", "trim_scope": "model"},
        {"clustering": "sign", "singleton": "scale"},
        {"clustering": "random", "method": "dare", "rescale": "l1"},
        {"clustering": "spherical", "method": "dare_ties", "scaling": 0.5},
        {"method": "average", "granularity": "layer", "metric": "manhattan"},
    ],
    ids=lambda merge: "-".join(map(str, merge.values())),
)
def test_auto_goes_with_other_options(family: Family, merge: dict[str, Any]) -> None:
    outcome = run(family, budget=0.6, **merge)
    assert 0.4 < share(outcome) <= 0.6
    assert Artifact(outcome.path).verify() == []
