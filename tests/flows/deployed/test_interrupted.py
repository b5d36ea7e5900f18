"""Runs that were cancelled, and runs whose processes were killed."""

from __future__ import annotations

import pytest

from tests.flows.deployed.conftest import Interrupted
from tests.support.prefect_server import Prefect

pytestmark = pytest.mark.server


def test_what_is_done_is_kept(interrupted: Interrupted) -> None:
    """How the runs ended, and that nothing was done twice, is checked while it happens: see ``interrupt``."""
    assert sum(work[0] == "merge" for work in interrupted.finished) > 0


@pytest.mark.parametrize("step", ["merge", "pack"])
def test_their_steps_are_shown_as_ended(prefect: Prefect, interrupted: Interrupted, step: str) -> None:
    """Of a run that is cancelled; who is killed can say nothing."""
    assert prefect.task_runs(interrupted.cancelled)[step]["state_type"] in ("CANCELLED", "CRASHED", "FAILED")
