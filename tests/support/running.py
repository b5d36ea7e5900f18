"""Runs of the real thing for tests."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from flows.run import Outcome, run_recipe
from pipeline.engine import Silent
from pipeline.recipe import load_recipe
from pipeline.stages.intake import Intake
from serving.lookup import export
from storage.artifact import Artifact
from tests.support.tiny_experts import Tensors, read_checkpoint


def merged(recipe: Path, overrides: Mapping[str, Any] | None = None) -> Outcome:
    """Run a recipe file, with dotted keys set."""
    return run_recipe(load_recipe(recipe, overrides), Silent())


def rebuilt(outcome: Outcome, expert: str, folder: Path) -> Tensors:
    """An expert's tensors, exported and read with safetensors."""
    target = folder / f"{outcome.version}-{expert}"
    export(Artifact(outcome.path), expert, target)
    return read_checkpoint(target)


def command(
    *arguments: str | Path, cwd: Path | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    line = [str(Path(sys.executable).parent / "channel-merge"), *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False, cwd=cwd, env=environment, timeout=300)


def before_all(monkeypatch: pytest.MonkeyPatch, edit: Callable[[], object]) -> None:
    """Do something once, before any expert is read and after all have been hashed."""
    real, lock = Intake.wave, threading.Lock()
    done: list[object] = []

    def wave(*arguments: Any) -> bool:
        with lock:
            if not done:
                done.append(edit())
        return real(*arguments)

    monkeypatch.setattr(Intake, "wave", wave)
