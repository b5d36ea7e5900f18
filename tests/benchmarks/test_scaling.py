"""The model by hand on small cases, against the plan's own forecast, and the page that shows it."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.costs import (
    Rates,
    Scenario,
    Site,
    Work,
    distinct_groups,
    hashing_seconds,
    moved_bytes,
    partitions,
    passes,
    run_times,
    sums,
    tensors_of,
    timed,
    total,
    useful_workers,
)  # fmt: skip
from benchmarks.families import SHAPES, Shape, write_family
from benchmarks.scaling import (
    BEGIN,
    CLOUD,
    END,
    MEASURED,
    OBSERVED,
    SCENARIOS,
    between_markers,
    duration,
    observed_of,
    rates_of,
    report,
    scenario_of,
    size,
)  # fmt: skip
from flows.planning import judge
from pipeline.recipe import load_recipe

PAGE = Path(__file__).parent.parent.parent / "docs" / "scaling.md"
SMALL = Scenario("3 x 236", Shape(4, 8, 1, 2, 1, 10), 3, 2)
RATES = Rates(100.0, 200.0, 50.0, 400.0, 10.0, {4: 10.0, 8: 5.0}, {4: 100.0, 8: 50.0}, 1000.0, 0.5, 2.0, 10.0, "by hand")
NEAR = Site(math.inf, math.inf, 0.0, 2, sources_local=True)


def test_the_sums_of_a_small_family() -> None:
    """Embedding 10x4, q 4x4, k 2x4, v 2x4, o 4x4, gate and up 8x4, down 4x8, three norms of 4, head 10x4."""
    found = sums(SMALL, 0.5)
    assert found.parameters == 40 + 16 + 8 + 8 + 16 + 32 + 32 + 32 + 4 + 4 + 4 + 40
    assert found.merged == 16 + 8 + 8 + 16 + 32 + 32 + 32
    assert found.channels == 4 + 2 + 2 + 4 + 8 + 8 + 4
    assert found.checkpoints == 4 * 236 * 2
    beside = (10 + 32 + 3 + 10) * (16 + 8) + 12 * 32768 * 4  # digest and square of 55 rows, counts of 12 chunks
    assert found.deltas == 3 * (236 + beside)
    assert found.tables == 32 * 9 * 8
    assert found.chunks == 3 * 12 * 4
    assert found.objects == 3 * (12 + 12) * 4
    assert found.artifact == 2 * (2 * 144 + 3 * 92)
    assert found.pool_files == 1
    # of 3 partitions of 3 experts in two groups each of 6 groups is in one: 6 (1 - (2/3)^rows), and 5 private tensors
    assert found.spans == round(sum(6 * (1 - (2 / 3) ** rows) for rows in (4, 2, 2, 4, 8, 8, 4))) + 3 * 5
    assert (found.ingest_tasks, found.merge_tasks, found.similarity_tasks, found.cluster_tasks) == (4, 4, 1, 2)


@pytest.mark.parametrize(("count", "groups", "channels"), [(3, 2, 1), (4, 2, 2), (4, 3, 2)])
def test_distinct_groups_are_counted_over_all_draws(count: int, groups: int, channels: int) -> None:
    labels = [one for one in itertools.product(range(groups), repeat=count) if len(set(one)) == groups]
    found = {frozenset(frozenset(n for n in range(count) if one[n] == g) for g in range(groups)) for one in labels}
    assert partitions(count, groups) == len(found)
    draws = [len(frozenset().union(*drawn)) for drawn in itertools.product(found, repeat=channels)]
    assert distinct_groups(count, groups, channels) == pytest.approx(sum(draws) / len(draws))


def test_the_sums_are_those_of_the_plan(tmp_path: Path) -> None:
    """The plan's forecast reads the headers of real files and knows every tensor's policy from its role."""
    scenario = Scenario("tiny", SHAPES["tiny"], 4, 2)
    family = write_family(tmp_path, scenario.shape, scenario.experts)
    recipe = {
        "name": "tiny", "base": str(family.base), "experts": {name: str(folder) for name, folder in family.experts.items()},
        "merge": {"groups": scenario.groups}, "deltas": str(tmp_path / "deltas"), "output": str(tmp_path / "out"),
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    told, found = judge(load_recipe(tmp_path / "recipe.yaml")), sums(scenario, 1.0)
    policies = {tensor.name: tensor.policy == "merge" for tensor in told.draft.plan.tensors.values()}
    assert policies == {tensor.name: tensor.merged for tensor in tensors_of(scenario.shape)}
    assert told.forecast.deltas == found.deltas + found.tables
    assert told.forecast.pool * 2 == found.artifact
    assert told.forecast.peak == found.task_peak
    assert told.forecast.blocks == 4 * found.ingest_tasks + found.similarity_tasks + found.merge_tasks


@pytest.mark.parametrize(
    ("workers", "site", "seconds", "bound"),
    [
        # four of ten tasks are the busiest's where three work: 40 s of cores, 4 s of network, 2 s of requests
        (3, Site(100.0, math.inf, 0.5, 1, sources_local=False), 46.0, "cores"),
        (3, Site(2.0, math.inf, 0.5, 1, sources_local=False), 242.0, "network"),
        (3, Site(100.0, math.inf, 100.0, 1, sources_local=False), 444.0, "requests"),
        (3, Site(100.0, 10.0, 0.5, 1, sources_local=False), 100.0, "store"),
        (100, Site(math.inf, math.inf, 0.0, 1, sources_local=False), 10.0, "cores"),
        (1, Site(math.inf, math.inf, 0.0, 1, sources_local=False), 100.0, "cores"),
    ],
)
def test_the_time_of_a_stage(workers: int, site: Site, seconds: float, bound: str) -> None:
    found = timed(Work("stage", 100.0, 10, 1000.0, 10.0), workers, RATES, site)
    assert found.seconds == pytest.approx(seconds)
    assert found.bound == bound


def test_a_scheduler_hands_out_so_many_tasks_a_second() -> None:
    found = timed(Work("stage", 100.0, 1000, 0.0, 0.0), 1000, RATES, NEAR)
    assert found.seconds == pytest.approx(100.0)
    assert found.bound == "scheduler"


def test_the_stages_of_runs_beside_files() -> None:
    """One worker: all bytes at the measured rates, in turn."""
    found = {one.stage: one.seconds for one in run_times(SMALL, 1, RATES, NEAR)}
    hashing = 4 * 472 / 1000 / 2  # two cores of the client
    assert hashing_seconds(SMALL, RATES, 2) == pytest.approx(hashing)
    assert found == pytest.approx(
        {
            "start": 2 + hashing, "ingest": 3 * 2 * 472 / 100, "similarity": 4 * 288 / 200, "cluster": 32 / 10,
            "merge": 4 * 472 / 50, "pack": 2 * 1128 / 400,
        }
    )  # fmt: skip
    again = {one.stage: one.seconds for one in run_times(SMALL, 1, RATES, NEAR, stored=True)}
    assert again == pytest.approx({"start": 2.0, **{stage: found[stage] for stage in ("cluster", "merge", "pack")}})


def test_a_base_far_away_is_copied_and_counted() -> None:
    far = Site(math.inf, math.inf, 0.0, 2, sources_local=False)
    group = sums(SMALL, 0.5).deltas / 3
    work = {one.stage: one for one in passes(SMALL, RATES, far)}
    assert work["base"].core_seconds == pytest.approx(472 / 100)
    assert work["base"].moved == pytest.approx(472 + group)
    assert work["base"].requests == pytest.approx(12 * 4 + 12)
    assert work["ingest"].moved == pytest.approx(472 + 2 * group)
    assert work["ingest"].requests == pytest.approx(12 * 4 + 2 * 12)
    assert work["merge"].moved == pytest.approx(4 * group + 1128)
    assert work["similarity"].moved == pytest.approx(4 * group * 144 / 236 + 2304)
    assert moved_bytes(SMALL, RATES, far) == pytest.approx(sum(one.moved for one in passes(SMALL, RATES, far)))
    assert [one.stage for one in passes(SMALL, RATES, far)] == [
        "base", "ingest", "ingest", "ingest", "similarity", "cluster", "merge", "pack",
    ]  # fmt: skip


def test_kernels_of_pairs_take_longer_with_more_experts() -> None:
    eight = Scenario("8", SMALL.shape, 8, 2)
    work = {one.stage: one.core_seconds for one in passes(eight, RATES, NEAR)}
    raw = 9 * 144 * 2
    assert work["similarity"] == pytest.approx(raw / 200 + raw * (1 / 50 - 1 / 100))
    assert work["cluster"] == pytest.approx(32 / 10 + 32 * (1 / 5 - 1 / 10))


def test_groups_that_need_no_clustering_need_no_tables() -> None:
    stages = {one.stage for one in passes(Scenario("one model", SMALL.shape, 3, 1), RATES, NEAR)}
    assert stages == {"ingest", "merge", "pack"}


def test_more_workers_than_tasks_are_not_worth_having() -> None:
    assert useful_workers(SMALL, RATES, NEAR) <= 4
    assert useful_workers(SCENARIOS[-1], MEASURED, CLOUD) > useful_workers(SMALL, RATES, NEAR)


@pytest.fixture
def document() -> dict[str, Any]:
    """As benchmarks.pipeline prints it, with round numbers."""
    run = {
        "seconds": 20.0, "largest": {"program": 5, "worker": 7},
        "stages": {"ingest": 4.0, "similarity": 2.0, "cluster": 1.0, "merge": 2.0, "pack": 1.0},
        "moved": {"ingest read": 8e9, "similarity read": 4e9, "merge read": 6e9, "pack read": 2e9},
    }  # fmt: skip
    found = sums(Scenario("", SHAPES["tiny"], 4, 2), 0.75)
    return {
        "date": "2026-01-02", "cores": 2, "shape": "tiny", "parameters": found.parameters, "experts": 4,
        "groups": {"first": 2, "second": 3}, "runs": {"first": [run], "second": [{**run, "seconds": 9.0}]},
        "bytes": {"deltas": found.deltas + found.tables, "artifact first": 11},
    }  # fmt: skip


def test_rates_are_taken_from_a_measurement(document: dict[str, Any]) -> None:
    known = replace(RATES, sha256=1e6)
    found = rates_of(document, known)
    assert (found.ingest, found.similarity, found.merge, found.pack) == (1e9, 1e9, 1.5e9, 1e9)
    assert found.cluster == sums(scenario_of(document), 1.0).channels / 2
    assert found.compressed == pytest.approx(0.75, abs=1e-5)
    hashing = 5 * 2 * document["parameters"] / 1e6 / 2
    assert found.start_seconds == pytest.approx(20 - 10 - hashing)
    assert (found.sha256, found.gram) == (known.sha256, known.gram)
    seen = observed_of(document)
    assert (seen.first_seconds, seen.second_seconds, seen.artifact, seen.worker_peak) == (20.0, 9.0, 11, 7)


def test_stages_that_overlapped_share_the_time_of_the_run(document: dict[str, Any]) -> None:
    document["runs"]["first"][0]["seconds"] = 5.0
    found = rates_of(document, MEASURED)  # hashing a tiny family takes no time
    assert found.ingest == pytest.approx(2e9, rel=0.01)
    assert found.start_seconds == pytest.approx(0.0, abs=1e-6)


def test_the_model_is_near_the_runs_that_were_measured() -> None:
    """A run's time within a third, its bytes within a twentieth."""
    for one in OBSERVED:
        site = Site(math.inf, math.inf, 0.0, one.workers, sources_local=True)
        for seconds, stored in ((one.first_seconds, False), (one.second_seconds, True)):
            assert total(run_times(one.scenario, one.workers, MEASURED, site, stored=stored)) == pytest.approx(
                seconds, rel=0.34
            )
        found = sums(one.scenario, MEASURED.compressed)
        assert found.deltas + found.tables == pytest.approx(one.deltas, rel=0.05)
        assert found.artifact == pytest.approx(one.artifact, rel=0.02)


@pytest.mark.parametrize(
    ("count", "text"), [(999, "999 bytes"), (1000, "1.00 kB"), (41.9e9, "41.9 GB"), (791e9, "791 GB"), (13.8e12, "13.8 TB")]
)
def test_sizes_have_three_digits(count: float, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.04, "3.0 s"), (98, "98 s"), (288, "4.8 min"), (720, "12 min"), (8000, "2.2 h"), (400_000, "111 h")]
)
def test_durations_have_two(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_page_shows_what_the_script_prints() -> None:
    """Else: python -m benchmarks.scaling --page docs/scaling.md."""
    page = PAGE.read_text("utf-8")
    assert between_markers(page, report(MEASURED, OBSERVED)) == page


def test_a_page_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="no lines"):
        between_markers("nothing", "content")
    assert between_markers(f"a\n{BEGIN}\nold\n{END}\nb\n", "new") == f"a\n{BEGIN}\n\nnew\n\n{END}\nb\n"
