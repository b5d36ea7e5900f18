"""Disks that are full, and disks that give back other bytes than were written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.fault.runs import Undisturbed, World, has_namespaces
from tests.support.faulty import Fault, Work, begun
from tests.support.tiny_experts import NAMES

UP_PROJ = "model.layers.0.mlp.up_proj.weight"
FIRST_CHUNK = range(8)
FULL = "No space left on device. Free space there and run again: finished work is kept."


@pytest.mark.parametrize(("stage", "cluster"), [("ingest", "none"), ("ingest", "local"), ("merge", "none"), ("pack", "none")])
def test_a_full_disk_ends_the_run(world: World, undisturbed: Undisturbed, stage: str, cluster: str) -> None:
    world.faults.script(Fault(stage, "full", after=1 if stage == "pack" else 3, moment="write"))
    client = world.run(cluster=cluster)
    assert client.wait() == 3
    (error,) = [line for line in client.said.splitlines() if not line.startswith(("note: ", "resolve: "))]
    place = world.deltas if stage == "ingest" else world.output
    assert error.startswith(f"error: {place}/")
    assert error.endswith(FULL)
    assert error == f"error: {json.loads(client.out.read_text())['error']}"
    assert [path for place in (world.deltas, world.output) for path in Path(place).rglob("*.part")] == []
    world.resume(undisturbed)


SHELL = ("unshare", "--map-root-user", "--mount", "sh", "-c")
TWICE = 'mount -t tmpfs -o size=32M none "$0" && ("$@"; echo $? >&2; rm "$0"/filler; "$@"; cp -r "$0" "$0"-after)'
"""On a small disk that only this shell and its children see, run a command before and after there is room again."""


@pytest.mark.skipif(not has_namespaces(), reason="a disk of its own needs user and mount namespaces; refused here")
@pytest.mark.parametrize("stage", ["ingest", "pack"])
def test_a_real_disk_fills_up(world: World, undisturbed: Undisturbed, stage: str) -> None:
    disk = world.folder / "disk"
    disk.mkdir()
    world.output, world.deltas = str(disk / "output"), str(disk / "deltas")
    world.faults.script(Fault(stage, "fill", after=1 if stage == "pack" else 3, path=str(disk / "filler")))
    client = world.start(before=(*SHELL, TWICE, str(disk)))
    assert client.wait() == 0, client.said
    error, code = [line for line in client.said.splitlines() if line.startswith("error: ") or line == "3"]
    assert (code, error.endswith(FULL)) == ("3", True)
    failure, _, answer = client.out.read_text().partition("\n}\n")
    assert FULL in failure
    assert json.loads(answer)["version"] == undisturbed.version
    world.output, world.deltas = str(Path(f"{disk}-after") / "output"), str(Path(f"{disk}-after") / "deltas")
    world.check_whole(undisturbed)
    assert set(begun(world.faults.events()).values()) <= {1, 2}


def ingested(experts: tuple[str, ...] = NAMES) -> set[Work]:
    """The work of bringing the first chunk of these experts' UP_PROJ into the store."""
    return {("ingest", expert, UP_PROJ, row) for expert in experts for row in FIRST_CHUNK}


def twice(world: World) -> set[Work]:
    return {work for work, count in begun(world.faults.events()).items() if count > 1}


@pytest.mark.parametrize("stage", ["similarity", "merge"])
def test_a_damaged_chunk_is_made_anew_within_the_run(world: World, undisturbed: Undisturbed, stage: str) -> None:
    world.settings = ("--set", "cluster.workers=1")
    world.faults.script(Fault(stage, "damage", label=UP_PROJ, path=f"{world.deltas}/*/*/{UP_PROJ}/c.0.0"))
    client = world.run()
    assert client.answer()["version"] == undisturbed.version
    assert client.said.count(f"chunk {UP_PROJ}/c.0.0 is lost or damaged; it is made anew") == len(NAMES)
    assert twice(world) == ingested() | {(stage, "", UP_PROJ, row) for row in FIRST_CHUNK}
    world.check_whole(undisturbed)


@pytest.mark.parametrize("kind", ["row_digests", "gram"])
def test_damage_beside_the_deltas_is_made_anew_too(world: World, undisturbed: Undisturbed, kind: str) -> None:
    world.settings = ("--set", "cluster.workers=1")
    world.faults.script(Fault("cluster", "damage", label="model.layers.0", path=f"{world.deltas}/**/{kind}/{UP_PROJ}/c.0.0*"))
    client = world.run()
    assert client.answer()["version"] == undisturbed.version
    again = {work for work in twice(world) if work[0] != "cluster"}
    assert again == (ingested() if kind == "row_digests" else {("similarity", "", UP_PROJ, row) for row in FIRST_CHUNK})
    world.check_whole(undisturbed)


def test_what_is_damaged_between_two_runs_is_made_anew(world: World, undisturbed: Undisturbed) -> None:
    """A byte flipped in an unfinished ingest, a chunk gone from it, both in a finished one."""
    world.settings = ("--set", "cluster.workers=2")
    world.faults.script(Fault("merge", "kill", label=UP_PROJ), Fault("ingest", "hold", label="model.norm"))
    world.run()
    assert not list(Path(world.deltas).rglob("complete.json"))
    first, second, *_ = sorted(Path(world.deltas).glob(f"*/*/{UP_PROJ}/c.0.0"))
    damage(first)
    second.unlink()
    world.faults.script()
    assert world.run().answer()["version"] == undisturbed.version
    of_chunk = {work for work in begun(world.faults.events()) if work in ingested()}
    assert len(of_chunk) == 2 * len(FIRST_CHUNK)
    assert set(begun(world.faults.events()).values()) <= {1, 2}
    world.check_whole(undisturbed)
    assert len(list(Path(world.deltas).rglob("complete.json"))) == len(NAMES) + 1
    damage(first)
    second.unlink()
    world.faults.script()
    world.output += "-of-three-groups"
    world.run("--set", "merge.groups=3").answer()
    assert {work for work in begun(world.faults.events()) if work[0] == "ingest"} == of_chunk
    world.check_deltas(undisturbed)


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
