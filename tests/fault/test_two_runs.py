"""Two runs of one recipe at once, on a local disk and on an object store."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fault.runs import FEW_BLOCKS, Undisturbed, World, until
from tests.support.faulty import begun, kept
from tests.support.store_gateway import Gateway, empty_bucket, moto_server

BUCKET = "outputs"
LEASES = {"storage.leases.LEASE_BEAT_S": 0.2, "storage.leases.LEASE_POLL_S": 0.1, "storage.leases.LEASE_TTL_S": 5.0}
WAITS = "waiting for another run of the same inputs"


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    with moto_server() as url, empty_bucket(url, BUCKET, monkeypatch) as gateway:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)  # nothing between them: it goes faster
        yield gateway


@pytest.fixture(params=["local", "s3"])
def case(request: pytest.FixtureRequest, world: World) -> tuple[World, Undisturbed]:
    """A world whose output and deltas lie on either kind of store, and what is expected there."""
    world.constants, world.memory = FEW_BLOCKS
    if request.param == "s3":
        request.getfixturevalue("bucket")
        world.output, world.deltas = f"s3://{BUCKET}/output", f"s3://{BUCKET}/deltas"
        world.constants = world.constants | LEASES
    return world, request.getfixturevalue("undisturbed_few")


def test_the_second_run_waits_and_finds_the_version(case: tuple[World, Undisturbed]) -> None:
    shared, undisturbed = case
    first = shared.held("merge")
    second = shared.start()
    until(lambda: WAITS in second.said or second.process.poll() is not None, "the second run to wait")
    shared.check_nothing_is_published()
    shared.faults.release()
    answers = [client.answer() for client in (first, second)]
    assert [answer["version"] for answer in answers] == [undisturbed.version] * 2
    assert [answer["new"] for answer in answers] == [True, False]
    assert begun(shared.faults.events()) == dict.fromkeys(undisturbed.work, 1)
    shared.check_whole(undisturbed)


def test_runs_that_start_at_once(world: World, undisturbed: Undisturbed) -> None:
    world.faults.script()
    answers = [client.answer() for client in [world.start() for _ in range(3)]]
    assert {answer["version"] for answer in answers} == {undisturbed.version}
    assert sorted(answer["new"] for answer in answers) == [False, False, True]
    assert begun(world.faults.events()) == dict.fromkeys(undisturbed.work, 1)
    world.check_whole(undisturbed)


def test_the_second_run_takes_over_from_one_that_is_killed(case: tuple[World, Undisturbed]) -> None:
    shared, undisturbed = case
    first = shared.held("merge")
    second = shared.start()
    until(lambda: WAITS in second.said or second.process.poll() is not None, "the second run to wait")
    first.process.kill()
    first.wait()
    before = shared.faults.events()
    shared.faults.release()
    answer = second.answer()
    assert (answer["version"], answer["new"]) == (undisturbed.version, True)
    again = begun(shared.faults.events()[len(before) :])
    assert not kept(before) & again.keys()
    assert begun(before).keys() | again.keys() == undisturbed.work
    shared.check_whole(undisturbed)


def test_two_outputs_share_what_is_ingested(world: World, undisturbed: Undisturbed) -> None:
    """Of a local store: on an object store two such runs ingest the same bytes twice."""
    first = world.held("ingest")
    world.output, output = str(world.folder / "other"), world.output
    second = world.start("--set", "merge.groups=3")
    until(lambda: "waiting for another run that ingests" in second.said or second.process.poll() is not None, "it to wait")
    world.faults.release()
    assert first.answer()["version"] == undisturbed.version
    assert second.answer()["version"] != undisturbed.version
    ingests = {work: count for work, count in begun(world.faults.events()).items() if work[0] == "ingest"}
    assert ingests == dict.fromkeys((work for work in undisturbed.work if work[0] == "ingest"), 1)
    world.check_deltas(undisturbed)
    world.output = output
    world.check_whole(undisturbed)
