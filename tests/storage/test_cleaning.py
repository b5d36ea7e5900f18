"""What is removed, of stores in a folder and in a bucket, against what may be told by hand to be needed."""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage import leases
from storage.cleaning import _NeededError, _remove, clean, leftovers
from storage.deltas import run_record, table_group
from storage.errors import StoreError
from storage.layout import DOCUMENTS
from storage.needed import BusyError, is_busy, raise_busy, survey
from storage.stores import Store, open_store
from tests.support.places import BUCKET, KINDS
from tests.support.store_gateway import Gateway

NOW = datetime.now(UTC)
OLD, RECENT = NOW - timedelta(days=30), NOW - timedelta(days=1)
BASE = "ba5e" * 10
A, B, C, D = (letter * 40 for letter in "abcd")
FIRST, SECOND, THIRD = ("1" * 64, "2" * 64, "3" * 64)
"""Inputs of jobs."""
GONE = "/nowhere/at/all/output"


@pytest.fixture(params=KINDS)
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where deltas and outputs are made."""
    if request.param == "s3":
        request.getfixturevalue("gateway")
        return f"s3://{BUCKET}/team"
    return str(tmp_path)


@pytest.fixture
def deltas(root: str) -> Store:
    return open_store(f"{root}/deltas")


@pytest.fixture
def output(root: str) -> Store:
    return open_store(f"{root}/output")


def group(store: Store, key: str) -> None:
    for name in ("complete.json", "zarr.json", "model.norm/zarr.json", "model.norm/c.0.0"):
        store.put(f"{key}/{name}", b"{}")


def experts(store: Store, *ids: str, base: str = BASE) -> None:
    for one in ids:
        group(store, f"{base}/{one}")
        store.put(f"{base}/thresholds/{one}/{'e' * 40}.json", b"{}")


def tables(store: Store, *ids: str, base: str = BASE) -> str:
    """The tables of these experts; where they lie."""
    place = table_group(store, base, ids).place.removeprefix(f"{store.place}/")
    group(store, place)
    return place


def record(output: str, ids: Sequence[str], started: datetime, host: str = "", base: str = BASE) -> bytes:
    fields = {"name": "x", "started": started.isoformat(), "host": host or platform.node(), "output": output, "base": base}
    return json.dumps({**fields, "experts": sorted(ids)}).encode()


def artifact(output: Store, version: str, ids: Sequence[str], inputs: str = FIRST, base: str = BASE) -> None:
    named = {f"expert-{n}": {"id": one} for n, one in enumerate(ids)}
    output.put(f"{version}/manifest.json", json.dumps({"inputs": inputs, "base": {"id": base}, "experts": named}).encode())
    output.put(f"{version}/pool-00001-of-00001.safetensors", b"rows")
    output.put("latest.json", b"{}")


def cleaned(deltas: Store, output: Store, days: float = 7, *, delete: bool = True) -> Any:
    told: list[str] = []
    return clean(deltas, output, days, delete=delete, tell=told.append)


def removed(deltas: Store, output: Store, days: float = 7) -> set[tuple[str, str]]:
    """(kind, last part of the place) of what is removed."""
    return {(one.kind, one.key.rpartition("/")[2]) for one in cleaned(deltas, output, days).leftovers}


def test_what_no_artifact_has_is_removed(deltas: Store, output: Store) -> None:
    experts(deltas, A, B, C)
    group(deltas, f"{BASE}/base")
    kept = tables(deltas, A, B)
    others = [tables(deltas, A, B, C), tables(deltas, B, C), tables(deltas, A)]
    artifact(output, "0" * 16, [B, A])
    before = deltas.sizes()
    gone = (f"{BASE}/{C}/", f"{BASE}/thresholds/{C}/", *(f"{place}/" for place in others))
    found = cleaned(deltas, output, delete=False)
    assert deltas.sizes() == before
    assert not found.removed
    assert {f"{one.key}/" for one in found.leftovers} == set(gone)
    assert sum(one.bytes for one in found.leftovers) == sum(size for key, size in before.items() if key.startswith(gone))
    assert sum(one.files for one in found.leftovers) == 4 * 4 + 1
    assert cleaned(deltas, output).leftovers == found.leftovers
    assert deltas.sizes() == {key: size for key, size in before.items() if not key.startswith(gone)}
    assert f"{kept}/complete.json" in deltas.sizes()
    assert cleaned(deltas, output).leftovers == ()


def test_a_base_of_no_artifact_goes_whole(deltas: Store, output: Store) -> None:
    experts(deltas, A, B)
    experts(deltas, A, base=C)
    for base in (BASE, C):
        group(deltas, f"{base}/base")
        tables(deltas, A, B, base=base)
        deltas.put(run_record(base, FIRST), record(GONE, [A], OLD, base=base))
    with deltas.under(BASE).lock(A, raise_busy), deltas.under(f"{BASE}/tables").lock(B, raise_busy):
        pass  # what a run leaves of its locks
    artifact(output, "0" * 16, [A], base=C)
    cleaned(deltas, output)
    assert deltas.children() == [C]
    assert {key.partition("/")[2].partition("/")[0] for key in deltas.sizes()} == {A, "base", "thresholds"}


def test_a_folder_of_a_base_is_left_to_who_begins_to_write_there(tmp_path: Path) -> None:
    deltas, output = open_store(str(tmp_path / "deltas")), open_store(str(tmp_path / "output"))
    experts(deltas, A)
    artifact(output, "0" * 16, [B])
    with deltas.under(BASE).lock(B, raise_busy):
        assert removed(deltas, output) == {("expert", A), ("thresholds", A)}
        assert (tmp_path / "deltas" / BASE / f".{B}.lock").exists()


def test_a_version_that_was_never_whole_goes_with_all_its_files(deltas: Store, output: Store) -> None:
    artifact(output, "0" * 16, [B])
    for name in ("pool-00001-of-00001.safetensors", "experts/math/config.json", "router/router.json", *DOCUMENTS):
        output.put(f"{'8' * 16}/{name}", b"half")
    cleaned(deltas, output)
    assert not [key for key in output.sizes() if key.startswith("8")]


def test_what_is_not_ours_is_left(deltas: Store, output: Store) -> None:
    experts(deltas, A)
    strangers = [
        "notes/todo.txt", "README.md", f"{'9' * 40}/model.safetensors", f"{BASE}/backup/model.safetensors",
        f"{BASE}/tables/mine/complete.json", f"{BASE}/thresholds/mine.json", f"{BASE}/{A}/notes.txt",
    ]  # fmt: skip
    for key in strangers:
        deltas.put(key, b"mine")
    artifact(output, "0" * 16, [B])
    for key in ("mine/pool.bin", ".work/mine/pool.bin", f"{'8' * 16}/thesis.txt", "dead.beef.version"):
        output.put(key, b"mine")
    before = output.sizes()
    found = cleaned(deltas, output)
    assert set(deltas.sizes()) == set(strangers)
    assert output.sizes() == before
    for name in ("notes", "README.md", "9" * 40, f"{BASE}/backup", f"{BASE}/tables/mine", f"{BASE}/thresholds/mine.json"):
        assert any(note == f"{deltas.place}/{name} is nothing of a delta store; it is left" for note in found.notes), name
    assert any(f"{BASE}/{A} holds what is not ours (" in note and "notes.txt" in note for note in found.notes)
    assert any(".work/mine is nothing of a run" in note for note in found.notes)


@pytest.mark.parametrize(
    ("started", "place", "host", "stays"),
    [
        (RECENT, GONE, "", True),
        (OLD, GONE, "", False),
        (OLD, GONE, "elsewhere", True),
        (OLD, "s3://no-such-bucket/output", "", True),
        (OLD, "{root}/second", "", False),
        (OLD, "{root}/other", "", True),
        (OLD, "{root}/other", "elsewhere", True),
        (OLD, "{root}/output", "elsewhere", False),
    ],
)
def test_run_records_lead_to_what_is_needed(
    root: str, deltas: Store, output: Store, gateway: Gateway, started: datetime, place: str, host: str, stays: bool
) -> None:
    """Of the run of C: recent, or with an artifact, or nobody here can tell."""
    experts(deltas, A, B, C)
    artifact(output, "0" * 16, [A])
    artifact(open_store(f"{root}/other"), "5" * 16, [B, C], inputs=SECOND)
    deltas.put(run_record(BASE, SECOND), record(place.format(root=root), [C], started, host))
    found = cleaned(deltas, output)
    left = {key.split("/")[1] for key in deltas.sizes()}
    with_artifact = place == "{root}/other"
    assert (C in left) is stays
    assert (B in left) is with_artifact
    assert ("runs" in left) is stays
    told = [note for note in found.notes if "cannot be looked at" in note]
    assert len(told) == (started == OLD and stays and not with_artifact) or (host == "" and place == GONE)
    assert A in left


def test_a_record_goes_with_the_artifact_of_its_run(deltas: Store, output: Store) -> None:
    """Two runs in one output, of which one's artifact was removed, and a third that came to the bytes of the first."""
    experts(deltas, A, B, C)
    artifact(output, "0" * 16, [A], inputs=FIRST)
    output.put(f".work/{THIRD}.{'0' * 16}.version", b"")
    for inputs, one in ((FIRST, A), (SECOND, B), (THIRD, A)):
        deltas.put(run_record(BASE, inputs), record(output.place, [one], OLD))
    assert removed(deltas, output) >= {("run record", f"{'2' * 40}.json"), ("expert", B)}
    assert set(deltas.children(f"{BASE}/runs")) == {f"{'1' * 40}.json", f"{'3' * 40}.json"}


def test_what_cannot_be_read_takes_nothing_with_it(deltas: Store, output: Store) -> None:
    experts(deltas, A, B, C)
    artifact(output, "0" * 16, [A])
    output.put(f"{'7' * 16}/manifest.json", b"{")
    deltas.put(run_record(BASE, SECOND), record(output.place, [B], OLD))
    deltas.put(run_record(BASE, THIRD), b'{"started": "yesterday"}')
    found = cleaned(deltas, output)
    assert {one.key for one in found.leftovers} == {f"{BASE}/{C}", f"{BASE}/thresholds/{C}"}
    assert any(f"{'7' * 16}/manifest.json cannot be read; what runs there used is kept" in note for note in found.notes)
    assert any(f"runs/{'3' * 40}.json cannot be read" in note for note in found.notes)


def test_a_recipe_without_an_output_is_no_error(deltas: Store, output: Store) -> None:
    found = cleaned(deltas, output)
    assert (found.leftovers, found.notes) == ((), (f"{output.place} holds no artifacts and no unfinished runs",))


def test_a_store_that_is_not_there_is_an_error(gateway: Gateway, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no-such-bucket"):
        cleaned(open_store("s3://no-such-bucket/deltas"), open_store(str(tmp_path / "output")))


def job(output: Store, inputs: str, started: datetime | None, ids: Sequence[str] = (A,)) -> str:
    key = f".work/{inputs[:40]}"
    output.put(f"{key}/staged/pool-00001-of-00001.safetensors", b"rows")
    if started is not None:
        output.put(f"{key}/job.json", record(output.place, ids, started))
    return key


def test_old_unfinished_runs_go(deltas: Store, output: Store) -> None:
    for inputs, started in ((FIRST, OLD), (SECOND, RECENT), (THIRD, None)):
        job(output, inputs, started)
    experts(deltas, A, B)
    assert removed(deltas, output) == {
        ("unfinished run", "1" * 40), ("unfinished run", "3" * 40), ("expert", B), ("thresholds", B),
    }  # fmt: skip
    assert output.children(".work") == ["2" * 40]


def test_a_run_at_work_keeps_its_place_and_its_experts(deltas: Store, output: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long ago it began, and although its output does not say that a run was recent."""
    monkeypatch.setattr(leases, "LEASE_BEAT_S", 0.1)
    experts(deltas, A, B)
    key = job(output, FIRST, OLD)
    before = output.sizes()
    with output.lock(key, raise_busy):
        found = cleaned(deltas, output)
        assert {one.key for one in found.leftovers} == {f"{BASE}/{B}", f"{BASE}/thresholds/{B}"}
        assert any(f"{key} is left: a run holds its lock" in note for note in found.notes)
        with pytest.raises(BusyError), output.lock(key, raise_busy):
            pass
    assert output.sizes() == before
    assert not is_busy(output, key)
    assert removed(deltas, output) >= {("unfinished run", "1" * 40), ("expert", A)}


def test_the_lock_of_a_killed_run_in_a_bucket_lapses(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    deltas, output = (open_store(f"s3://{BUCKET}/{name}") for name in ("deltas", "output"))
    monkeypatch.setattr(leases, "LEASE_TTL_S", 0.5)
    key = job(output, FIRST, OLD)
    lease = f"{key}{leases.LEASE}"
    output.put(lease, b'{"owner": "dead", "beat": 3, "released": false}')
    dry = cleaned(deltas, output, delete=False)
    assert dry.leftovers == ()
    assert any("or was killed; --delete looks which" in note for note in dry.notes)
    told: list[str] = []
    found = clean(deltas, output, 7, delete=True, tell=told.append)
    assert [one.key for one in found.leftovers] == [key]
    assert len(told) == 1
    assert "1 lock" in told[0]
    assert output.tagged(lease) is None


def test_who_will_not_wait_for_a_lock_takes_nothing(output: Store) -> None:
    output.put(".work/x", b"")
    entered = False
    with output.lock("name", raise_busy):
        for _ in range(2):
            with pytest.raises(BusyError), output.lock("name", raise_busy):
                entered = True
        assert is_busy(output, "name")
    assert not entered
    with output.lock("name", raise_busy):
        entered = True
    assert entered


def test_versions_that_no_run_can_complete_go(deltas: Store, output: Store) -> None:
    """0: whole; 4: by an old run; 5: by a recent one; 6: by whom, is not known; 7: named, and not there."""
    artifact(output, "0" * 16, [A])
    for digit in "456":
        output.put(f"{digit * 16}/pool-00001-of-00001.safetensors", b"half")
        output.put(f"{digit * 16}/experts/math/rows.safetensors", b"half")
    for inputs, digit in ((FIRST, "0"), (FIRST, "4"), (SECOND, "5"), (FIRST, "7"), (SECOND, "8")):
        output.put(f".work/{inputs}.{digit * 16}.version", b"")
    job(output, FIRST, OLD)
    recent = job(output, SECOND, RECENT)
    found = cleaned(deltas, output)
    assert {one.key for one in found.leftovers} == {
        f".work/{'1' * 40}", "4" * 16, f".work/{FIRST}.{'4' * 16}.version", f".work/{FIRST}.{'7' * 16}.version",
    }  # fmt: skip
    left = {key.split("/")[0] for key in output.sizes()}
    assert left == {"0" * 16, "5" * 16, "6" * 16, "latest.json", ".work"}
    output.clear(recent)
    cleaned(deltas, output)
    assert {key.split("/")[0] for key in output.sizes()} == {"0" * 16, "latest.json", ".work"}
    assert output.children(".work") == [f"{FIRST}.{'0' * 16}.version"]


def test_nothing_of_a_publish_under_way_is_touched(deltas: Store, output: Store) -> None:
    artifact(output, "0" * 16, [A])
    output.put(f"{'4' * 16}/pool-00001-of-00001.safetensors", b"half")
    with output.lock(".work/publish", raise_busy):
        found = survey(deltas, output, OLD)
        (item,) = leftovers(found, NOW)[0]
        with pytest.raises(BusyError):
            _remove(found, item)
        output.put(f"{'4' * 16}/manifest.json", b"{}")
    with pytest.raises(_NeededError):
        _remove(found, item)
    assert f"{'4' * 16}/pool-00001-of-00001.safetensors" in output.sizes()


def test_a_run_that_begins_meanwhile_keeps_its_experts(deltas: Store, output: Store) -> None:
    experts(deltas, A, B)
    deltas.put(run_record(BASE, FIRST), record(GONE, [A], OLD))
    job(output, FIRST, OLD)
    found = survey(deltas, output, NOW - timedelta(days=7))
    items = {one.key: one for one in leftovers(found, NOW)[0]}
    deltas.put(run_record(BASE, FIRST), record(GONE, [A], NOW))
    output.put(f".work/{'1' * 40}/job.json", record(output.place, [A], NOW))
    for key in (f"{BASE}/{A}", f"{BASE}/thresholds/{A}", run_record(BASE, FIRST), f".work/{'1' * 40}"):
        with pytest.raises(_NeededError):
            _remove(found, items[key])
    _remove(found, items[f"{BASE}/{B}"])
    assert {key.split("/")[1] for key in deltas.sizes()} == {A, "runs", "thresholds"}


def test_a_group_that_is_being_written_is_left(tmp_path: Path) -> None:
    deltas, output = open_store(str(tmp_path / "deltas")), open_store(str(tmp_path / "output"))
    experts(deltas, A)
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with deltas.under(BASE).lock(A, raise_busy):
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        held.wait()
        found = cleaned(deltas, output)
    finally:
        done.set()
        thread.join()
    assert [one.key for one in found.leftovers] == [f"{BASE}/thresholds/{A}"]
    assert f"{deltas.place}/{BASE}/{A} is left: a run holds its lock" in found.notes
    assert f"{BASE}/{A}/complete.json" in deltas.sizes()


def test_files_under_way_go_a_day_after_they_were_written(tmp_path: Path) -> None:
    deltas, output = open_store(str(tmp_path / "deltas")), open_store(str(tmp_path / "output"))
    experts(deltas, A, B)
    artifact(output, "0" * 16, [A])
    paths = {}
    for name, days in (("old", 2.0), ("new", 0.5)):
        for folder in (
            deltas.under(f"{BASE}/{A}/model.norm"), deltas.under(f"{BASE}/{B}"), output, output.under(".work"),
            output.under("0" * 16), deltas.under("mine"),
        ):  # fmt: skip
            path = Path(folder.place) / f".{name}.json.0123abcd.part"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"half")
            written = time.time() - days * 86400
            os.utime(path, (written, written))
            paths[path] = name == "old" and folder.place.rpartition("/")[2] not in ("0" * 16, "mine")
    other = Path(output.place) / ".old.part"
    other.write_bytes(b"mine")
    os.utime(other, (0, 0))
    found = cleaned(deltas, output)
    partial = {one.place: one.bytes for one in found.leftovers if one.kind == "temporary file"}
    assert partial == {str(path): 4 for path, goes in paths.items() if goes and B not in str(path)}
    assert [path for path in paths if path.exists()] == [p for p, goes in paths.items() if not goes and B not in str(p)]
    assert other.exists()


def state(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    files = {path: path.lstat() for path in [folder, *folder.rglob("*")]}
    return {str(p): (s.st_mode, s.st_mtime_ns, p.read_bytes() if p.is_file() else b"") for p, s in files.items()}


def test_a_dry_run_writes_nothing(root: str, deltas: Store, output: Store, request: pytest.FixtureRequest) -> None:
    experts(deltas, A, B)
    deltas.put(run_record(BASE, FIRST), record(GONE, [A], OLD))
    artifact(output, "0" * 16, [C])
    output.put(f"{'4' * 16}/pool-00001-of-00001.safetensors", b"half")
    with output.lock(job(output, FIRST, OLD), raise_busy):
        pass
    job(output, SECOND, OLD)
    if root.startswith("s3"):
        gateway: Gateway = request.getfixturevalue("gateway")
        gateway.asked.clear()
        assert len(cleaned(deltas, output, delete=False).leftovers) == 8
        assert set(gateway.asked) <= {"GET", "HEAD"}
    else:
        before = state(Path(root))
        assert len(cleaned(deltas, output, delete=False).leftovers) == 8
        assert state(Path(root)) == before


IDS = [letter * 40 for letter in "abcde"]
BASES = ["0" * 40, "f" * 40]
USES = st.tuples(st.sampled_from(BASES), st.lists(st.sampled_from(IDS), min_size=1, max_size=3))


@settings(max_examples=30)  # each makes and removes many files
@given(
    artifacts=st.lists(USES, max_size=3),
    runs=st.lists(st.tuples(USES, st.booleans(), st.booleans()), max_size=4),
    there=st.sets(st.tuples(st.sampled_from(BASES), st.sampled_from(IDS))),
    compared=st.lists(USES, max_size=4),
)
def test_just_what_is_used_stays(
    artifacts: list[tuple[str, list[str]]],
    runs: list[tuple[tuple[str, list[str]], bool, bool]],
    there: set[tuple[str, str]],
    compared: list[tuple[str, list[str]]],
) -> None:
    """Artifacts, runs (recent or not, with an output that can be looked at or not), groups and tables of any experts."""
    with TemporaryDirectory() as folder:
        deltas, output = open_store(f"{folder}/deltas"), open_store(f"{folder}/output")
        output.put("latest.json", b"{}")
        for n, (base, ids) in enumerate(artifacts):
            artifact(output, f"{n:016x}", ids, inputs=f"{n:064x}"[::-1], base=base)
        for n, ((base, ids), is_recent, is_away) in enumerate(runs):
            data = record(GONE, ids, RECENT if is_recent else OLD, "elsewhere" if is_away else "", base)
            deltas.put(run_record(base, f"{n + 99:064x}"[::-1]), data)
        for base, one in there:
            group(deltas, f"{base}/{one}")
        lie = {tables(deltas, *ids, base=base): (base, sorted(ids)) for base, ids in compared}
        for base in {base for base, _ in there}:
            group(deltas, f"{base}/base")
        cleaned(deltas, output)
        used = [*artifacts, *(use for use, is_recent, is_away in runs if is_recent or is_away)]
        for base, one in there:
            assert (f"{base}/{one}/complete.json" in deltas.sizes()) == any(base == b and one in ids for b, ids in used)
        for place, use in lie.items():
            assert (f"{place}/complete.json" in deltas.sizes()) == any((b, sorted(ids)) == use for b, ids in used)
        for base in {base for base, _ in there}:
            assert (f"{base}/base/complete.json" in deltas.sizes()) == any(b == base for b, _ in used)
        assert set(deltas.children()) <= {base for base, _ in used}
        assert cleaned(deltas, output).leftovers == ()
