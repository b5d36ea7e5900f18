"""Runs that are ended while a block of the stage merge is at work. One worker does one block after the other."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.support.faulty import Fault, Faults, Work, begun, kept
from tests.support.prefect_server import Prefect, until

BLOCKS = 6
"""Of the stage merge."""


def held(prefect: Prefect, faults: Faults, asked: Mapping[str, Any], after: int) -> str:
    """A run that has done so many blocks of the stage merge, and is at work on the next until it is ended."""
    faults.script(Fault("merge", "hold", after))
    run = prefect.run("merge/tiny", faults.environment({}), **asked)
    until(lambda: faults.happened() or prefect.flow_run(run)["state_type"] == "FAILED", lambda: prefect.told(run))
    assert prefect.flow_run(run)["state_name"] == "Running", prefect.told(run)
    return run


def check_progress(prefect: Prefect, run: str, name: str, blocks: int) -> None:
    """The artifact of the stage stands where the held run does."""

    def stands() -> float:
        return float(prefect.artifacts(run)[f"{name}-merge"]["data"])

    until(lambda: stands() > 0, lambda: prefect.told(run))
    until(lambda: stands() >= 100 * blocks / BLOCKS, lambda: f"{stands()}\n{prefect.told(run)}")
    assert stands() == 100 * blocks / BLOCKS


def check_ended(prefect: Prefect, faults: Faults, run: str, state: str, hook: str) -> set[Work]:
    """In this state, without processes or a version, with a last word in its log. Returns what it had done."""
    prefect.wait(run, state)
    until(lambda: not faults.survivors(), lambda: f"processes {faults.survivors()} to end")
    prefect.logged(run, f"{hook}: finished blocks are kept beside the output and in the delta store.")
    name = prefect.flow_run(run)["parameters"]["settings"]["name"]
    assert not list((prefect.store / "artifacts" / name).glob("*/manifest.json"))
    return kept(faults.events())


def engine(faults: Faults) -> int:
    """The process of the flow run."""
    (found,) = (one for one in faults.survivors() if b"prefect.engine" in Path(f"/proc/{one}/cmdline").read_bytes())
    return found


def cancelled(prefect: Prefect, faults: Faults, asked: Mapping[str, Any]) -> tuple[str, set[Work]]:
    """A run that was cancelled by the command, and what it had done."""
    run = held(prefect, faults, asked, 2)
    check_progress(prefect, run, asked["settings"]["name"], 2)
    prefect.command("prefect", "flow-run", "cancel", run)
    return run, check_ended(prefect, faults, run, "Cancelled", "Cancelling")


def killed(prefect: Prefect, faults: Faults, asked: Mapping[str, Any], done: set[Work]) -> tuple[str, set[Work]]:
    """A run whose group of processes was killed, and what it had done."""
    run = held(prefect, faults, asked, 1)
    assert not done & begun(faults.events()).keys(), "what is finished is not done again"
    check_progress(prefect, run, asked["settings"]["name"], 3)
    group = os.getpgid(engine(faults))
    assert group != os.getpgid(prefect.processes["worker"].pid)
    os.killpg(group, signal.SIGKILL)
    return run, check_ended(prefect, faults, run, "Crashed", "Crashed")
