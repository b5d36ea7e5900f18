"""Tasks of preparation, in threads or on workers: in order, and given up when the run is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from distributed import Client, LocalCluster

from router_training.tasks import on_dask


class GivenUpError(Exception):
    """What the run says."""


def begin(folder: Path, number: int, seconds: float) -> int:
    """Leaves a trace."""
    (folder / str(number)).touch()
    time.sleep(seconds)
    return number


@contextmanager
def workers(count: int) -> Iterator[None]:
    """An active client of so many workers; with none tasks run in threads."""
    if not count:
        yield
        return
    options = {"n_workers": count, "threads_per_worker": 1, "dashboard_address": "127.0.0.1:0", "silence_logs": 50}
    with LocalCluster(**options) as cluster, Client(cluster):
        yield


@pytest.mark.parametrize("count", [0, 2])
def test_results_come_in_order(tmp_path: Path, count: int) -> None:
    with workers(count):
        calls = [(tmp_path, number, 0.0) for number in range(20)]
        assert on_dask(begin, calls, tmp_path, []) == list(range(20))
        assert on_dask(begin, [], tmp_path, []) == []


@pytest.mark.parametrize("count", [0, 2])
def test_a_run_that_is_given_up_begins_no_more_tasks(tmp_path: Path, count: int) -> None:
    def check() -> None:
        if len(list(tmp_path.iterdir())) > 3:
            raise GivenUpError

    with workers(count):
        with pytest.raises(GivenUpError):
            on_dask(begin, [(tmp_path, number, 0.2) for number in range(400)], tmp_path, [], check)
        time.sleep(1)  # what was at work ends
        begun = len(list(tmp_path.iterdir()))
        time.sleep(1)
        assert begun == len(list(tmp_path.iterdir())) < 100
