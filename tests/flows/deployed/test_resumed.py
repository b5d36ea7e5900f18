"""What comes of runs that were interrupted: read last, as the next run waits for the lease of the killed one."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage.artifact import Artifact
from tests.flows.deployed.conftest import Interrupted
from tests.support.faulty import begun
from tests.support.prefect_server import ROOT, Prefect
from tests.support.running import merged

pytestmark = pytest.mark.server


def test_the_next_run_goes_on_from_there(prefect: Prefect, interrupted: Interrupted, tmp_path: Path) -> None:
    prefect.wait(interrupted.last)
    again = begun(interrupted.faults.events())
    assert again.keys()
    assert not interrupted.finished & again.keys(), "what is finished is not done again"
    found = Artifact(str(prefect.store / "artifacts" / interrupted.name))
    assert found.verify() == []
    places = {"output": str(tmp_path / "output"), "deltas": str(tmp_path / "deltas"), "cluster": {"kind": "none"}}
    settings = {key: value for key, value in interrupted.asked["settings"].items() if not key.startswith("cluster")}
    parameters = {f"merge.{key}": interrupted.asked[key] for key in ("groups", "seed")}
    undisturbed = merged(ROOT / "flows" / "recipes" / "tiny.yaml", {**settings, **parameters, **places})
    assert found.manifest.version == undisturbed.version
