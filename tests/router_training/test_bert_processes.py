"""Several processes of one training: what they say, how they fail, and that they end with the one that started them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from router_training.processes import run_together
from storage.errors import ClusterError, RecipeError

ROOT = Path(__file__).parents[2]
HEAD = """
import os, signal, sys, time
from pathlib import Path
from router_training.processes import end_with_parent, say
end_with_parent()
rank, work = int(os.environ["RANK"]), Path(sys.argv[1])
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, and a place for the module ``one_of_several``."""
    (tmp_path / "modules").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def module(work: Path, body: str) -> str:
    (work.parent / "modules" / "one_of_several.py").write_text(HEAD + body)
    return "one_of_several"


def test_each_has_its_place_and_what_it_says_is_told(work: Path) -> None:
    body = """
print("something that is no record")
print("[1]")
say(tell=f"{rank} of {os.environ['WORLD_SIZE']}, {os.environ['LOCAL_RANK']}, {os.environ['MASTER_ADDR']}")
(work / f"port-{rank}").write_text(os.environ["MASTER_PORT"])
print("a warning", file=sys.stderr)
"""
    said: list[str] = []
    run_together(module(work, body), 3, work, said.append)
    assert sorted(said) == ["0 of 3, 0, 127.0.0.1", "1 of 3, 1, 127.0.0.1", "2 of 3, 2, 127.0.0.1"]
    assert len({(work / f"port-{rank}").read_text() for rank in range(3)}) == 1
    assert (work / "processes.log").read_text().count("a warning") == 3


def test_an_error_that_one_says_is_raised_and_ends_the_others(work: Path) -> None:
    body = """
(work / f"pid-{rank}").write_text(str(os.getpid()))
if rank == 1:
    while not (work / "pid-0").exists():
        time.sleep(0.01)
    say(error="RecipeError", text="router.accumulate: set it to 2")
    sys.exit(1)
time.sleep(100)
"""
    started = time.monotonic()
    with pytest.raises(RecipeError, match=r"^router.accumulate: set it to 2$"):
        run_together(module(work, body), 2, work, lambda _: None)
    assert time.monotonic() - started < 60
    for rank in range(2):
        assert not Path(f"/proc/{(work / f'pid-{rank}').read_text()}").exists()


@pytest.mark.parametrize(
    ("death", "message"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", r"exit codes -9, -9 \(none of them wrote why\)\. Run again: it goes on"),
        ("raise LookupError('no such part')", r"exit codes -9, 1 \(LookupError: no such part\)"),
    ],
    ids=["killed", "raised"],
)
def test_one_that_dies_ends_them_all(work: Path, death: str, message: str) -> None:
    body = f"""
if rank == 1:
    {death}
time.sleep(100)
"""
    with pytest.raises(ClusterError, match=message):
        run_together(module(work, body), 2, work, lambda _: None)


def test_they_end_with_the_process_that_started_them(work: Path) -> None:
    body = """
(work / f"pid-{rank}").write_text(str(os.getpid()))
time.sleep(100)
"""
    script = "import sys; from pathlib import Path; from router_training.processes import run_together\n"
    call = f"run_together({module(work, body)!r}, 2, Path({str(work)!r}), print)"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ['PYTHONPATH']}"}
    starter = subprocess.Popen([sys.executable, "-c", script + call], env=environment, cwd=work)
    deadline = time.monotonic() + 60
    places = [work / f"pid-{rank}" for rank in range(2)]
    while not all(place.exists() and place.read_text() for place in places):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    starter.kill()
    starter.wait()
    while any(Path(f"/proc/{place.read_text()}").exists() for place in places):
        assert time.monotonic() < deadline
        time.sleep(0.01)
