"""What is printed, to terminals of any width and to pipes."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from rich.console import Console

from flows.output import counted, size, table_text, told
from storage.errors import PlanError
from tests.support.running import command
from tests.support.tiny_experts import NAMES, Family, write_checkpoint


def terminal(columns: int, *arguments: str | Path) -> tuple[str, int]:
    """What the command prints to a terminal of so many columns, without its colours, and the exit code."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    line = [str(Path(sys.executable).parent / "channel-merge"), *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    with subprocess.Popen(line, stdout=its, stderr=subprocess.DEVNULL, env={**environment, "TERM": "xterm"}) as process:
        os.close(its)
        found = b""
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # how Linux says that the last writer has closed a terminal
                break
            if not piece:
                break
            found += piece
    os.close(ours)
    return re.sub(r"\x1b\[[0-9;]*m", "", found.decode()).replace("\r\n", "\n"), process.returncode


@pytest.mark.parametrize("columns", [40, 80, 100])
def test_a_narrow_terminal_cuts_nothing_off(family: Family, columns: int) -> None:
    shown, code = terminal(columns, "plan", family.recipe())
    assert code == 0
    assert "…" not in shown
    table = shown[shown.index("tensors") : shown.index("to fetch")].splitlines()
    assert max(map(len, table)) <= columns
    for place in (family.folder / name for name in ("base", *NAMES)):
        assert str(place) in shown  # lines of the text, which a terminal wraps and a copy of them does not have
    if columns >= 80:
        names = [line.split()[0] for line in table]
        assert "model.layers.*.post_attention_layernorm.weight" in names
        assert re.search(r"model\.layers\.\*\.self_attn\.q_proj\.weight +x2 +merge, K=2 ", shown)


def test_a_folded_cell_is_whole() -> None:
    name, place = "model.layers.*.self_attn.q_proj.weight", "/a/very/long/place/without/a/blank/in/it/at/all"
    console = Console(width=30, force_terminal=True, color_system=None)
    lines = table_text(console, "t", ["a", "b", "c"], [[name, place, "linear"]], ["c"]).splitlines()
    assert max(map(len, lines)) <= 30
    cells = [re.split(r"\s{2,}", line) for line in lines[3:-2]]
    assert "".join(cell[0] for cell in cells) == name
    assert "".join(cell[1] for cell in cells if len(cell) > 1) == place
    assert "linear" not in "".join(lines)
    assert " ".join(" ".join(lines[-2:]).split()) == "(wider, or piped, it also shows: c)"


def test_a_piped_plan_has_a_line_per_row(family: Family) -> None:
    lines = command("plan", family.recipe()).stdout.splitlines()
    places = [line for line in lines if str(family.folder) in line]
    assert len(places) == 1 + len(NAMES)
    assert all("checkpoint, BF16 x21" in line for line in places)
    (row,) = [line for line in lines if "q_proj" in line]
    assert row.split() == ["model.layers.*.self_attn.q_proj.weight", "x2", "merge,", "K=2", "linear", "BF16", "16x16"]
    assert max(len(line) for line in lines if line.startswith("model.")) < 100
    assert all(line == line.rstrip() for line in lines)


def test_refused_tensors_are_short_on_a_terminal(family: Family) -> None:
    shutil.rmtree(family.expert("math"))
    misfit = {name: tensor[:-1] if "q_proj" in name else tensor for name, tensor in family.experts["math"].items()}
    write_checkpoint(family.expert("math"), misfit)
    shown, code = terminal(80, "plan", family.recipe())
    assert code == 2
    assert re.search(r"model\.layers\.\*\.self_attn\.q_proj\.weight +x2 +refused[ -]+1 problem", shown)


def test_a_few_problems_are_listed_one_by_one() -> None:
    three = PlanError.listing("no", [f"expert a: tensor t.{i}: is bad" for i in range(3)])
    assert told(three) == str(three)
    mixed = [*(f"expert a: tensor t.{i} is missing: why" for i in range(4)), "expert b: tensor u: is bad", "general"]
    assert told(PlanError.listing("no", mixed)).splitlines() == [
        "no: 6 problems",
        "  - expert a: tensor t.0 and 3 more is missing: why",
        "  - expert b: tensor u: is bad",
        "  - general",
    ]


def test_counts_and_sizes_are_words() -> None:
    assert [counted(1, "expert"), counted(0, "byte"), counted(2000, "row")] == ["1 expert", "0 bytes", "2,000 rows"]
    sizes = [size(1), size(1023), size(1536), size(3 * 2**20), size(5 * 2**30)]
    assert sizes == ["1 byte", "1,023 bytes", "1.50 KiB", "3.00 MiB", "5.00 GiB"]
