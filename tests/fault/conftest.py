from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fault.runs import FEW_BLOCKS, Undisturbed, World, stored, world_in
from tests.support.faulty import begun, kept
from tests.support.tiny_experts import write_family


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a family that no test changes."""
    return write_family(tmp_path_factory.mktemp("sources") / "family").recipe()


def never_disturbed(world: World) -> Undisturbed:
    """A run that nothing happens to."""
    world.faults.script()
    answer = world.run().answer()
    events = world.faults.events()
    assert begun(events) == dict.fromkeys(kept(events), 1)
    return Undisturbed(answer["version"], stored(world.deltas), frozenset(kept(events)))


@pytest.fixture(scope="session")
def undisturbed(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    with world_in(tmp_path_factory.mktemp("undisturbed"), recipe) as world:
        return never_disturbed(world)


@pytest.fixture(scope="session")
def undisturbed_few(recipe: Path, undisturbed: Undisturbed, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """In few blocks."""
    with world_in(tmp_path_factory.mktemp("few"), recipe) as world:
        world.constants, world.memory = FEW_BLOCKS
        found = never_disturbed(world)
    assert found.version == undisturbed.version
    return found


@pytest.fixture
def world(recipe: Path, tmp_path: Path) -> Iterator[World]:
    with world_in(tmp_path, recipe) as found:
        yield found
