from __future__ import annotations

import pytest

from benchmarks.queries import main


def test_every_case_is_a_line_of_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--rows", "8000"])
    head, rule, *lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len(cells) == 4
    assert {len(row) for row in cells} == {head.count("|") - 1} == {rule.count("|") - 1}
    assert {(row[0], row[3], row[4]) for row in cells} == {("8,000", "7,280", run) for run in ("one thread", "Dask's threads")}
    assert all(float(row[5]) > 0 and int(row[6]) > 0 for row in cells)
