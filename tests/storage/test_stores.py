"""What every store promises, asked of a local folder and of a bucket alike."""

from __future__ import annotations

import errno
import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from storage import leases
from storage.local_store import LocalStore
from storage.object_store import ObjectStore
from storage.stores import Store, open_store
from tests.support.store_gateway import SECRET, Gateway, empty_bucket

BUCKET = "outputs"
ROOT = Path(__file__).parents[2]
QUICK = "from storage import leases; leases.LEASE_BEAT_S, leases.LEASE_TTL_S, leases.LEASE_POLL_S = 0.1, 2.0, 0.02"


@pytest.fixture
def bucket(moto: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    monkeypatch.setattr(leases, "LEASE_BEAT_S", 0.1)
    monkeypatch.setattr(leases, "LEASE_TTL_S", 2.0)
    monkeypatch.setattr(leases, "LEASE_POLL_S", 0.02)
    with empty_bucket(moto, BUCKET, monkeypatch) as gateway:
        yield gateway


@pytest.fixture(params=["local", "objects"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return open_store(str(tmp_path / "team" / "out"))
    request.getfixturevalue("bucket")
    return open_store(f"s3://{BUCKET}/team/out/")


@pytest.fixture(scope="module")
def content() -> bytes:
    """More than two parts of an upload, without two equal blocks."""
    return np.random.default_rng(0).bytes(18_000_000)


def started(store: Store, code: str) -> subprocess.Popen[str]:
    """Another process with this store."""
    script = f"{QUICK}\nimport sys, time\nfrom storage.stores import open_store\nstore = open_store({store.place!r})\n{code}"
    return subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)


def test_places(store: Store, tmp_path: Path) -> None:
    assert store.place == (str(tmp_path / "team" / "out") if store.is_local else f"s3://{BUCKET}/team/out")
    assert isinstance(store, LocalStore if store.is_local else ObjectStore)
    assert store.under("runs").under("7").place == f"{store.place}/runs/7"


def test_what_is_put_is_what_is_there(store: Store) -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    store.put("a.bin", b"head", bytearray(b"er"), memoryview(b""), array.data, np.empty((0, 4)).data, durable=False)
    assert store.get("a.bin") == b"header" + array.tobytes()
    store.put("a.bin", b"anew")
    assert store.get("a.bin") == b"anew"
    store.put("deep/er/b.bin")
    assert store.get("deep/er/b.bin") == b""
    assert store.under("deep").get("er/b.bin") == b""
    assert store.sizes() == {"a.bin": 4, "deep/er/b.bin": 0}


def test_large_files_are_put_whole(store: Store, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.object_store.SINGLE_PUT_BYTES", 1_000_000)
    store.put("large.bin", content[:7], content[7:])
    assert store.get("large.bin") == content


@pytest.mark.parametrize(("start", "stop"), [(0, 3), (2, 8), (5, 10), (5, 99), (10, 12), (50, 60), (4, 4), (0, 0)])
def test_ranges(store: Store, start: int, stop: int) -> None:
    store.put("ten", b"0123456789")
    assert store.read("ten", start, stop) == b"0123456789"[start:stop]
    store.put("none")
    assert store.read("none", start, stop) == b""


def test_missing_files_are_named(store: Store) -> None:
    store.put("there/is", b"one")
    for attempt in (
        lambda: store.get("there/no.bin"),
        lambda: store.read("there/no.bin", 0, 5),
        lambda: store.read("there/no.bin", 5, 5),
        lambda: store.copy("there/no.bin", "there/to.bin"),
    ):
        with pytest.raises(FileNotFoundError, match=r"there/no\.bin"):
            attempt()
    assert store.tagged("there/no.bin") is None
    assert store.sizes("nowhere") == {}
    assert store.children("nowhere") == []
    store.delete(["there/no.bin", "nowhere/no.bin"])
    store.clear("nowhere")
    assert store.sizes() == {"there/is": 3}


def test_pieces_of_any_size_become_one_file(store: Store, content: bytes) -> None:
    cuts = [0, 1, 1, 3_000_001, 3_000_002, 15_500_000, len(content)]
    store.upload("d/file.bin", (content[start:stop] for start, stop in itertools.pairwise(cuts)))
    assert store.get("d/file.bin") == content
    store.upload("d/file.bin", [b"small"])
    assert store.get("d/file.bin") == b"small"
    store.upload("d/empty.bin", [])
    assert store.sizes("d") == {"d/empty.bin": 0, "d/file.bin": 5}


def test_a_buffer_may_be_used_again_for_the_next_piece(store: Store, content: bytes) -> None:
    def pieces() -> Iterator[memoryview]:
        buffer = bytearray(2_000_000)
        for start in range(0, len(content), len(buffer)):
            buffer[:] = content[start : start + len(buffer)]
            yield memoryview(buffer).toreadonly()

    store.upload("file.bin", pieces())
    assert store.get("file.bin") == content


@pytest.mark.parametrize("error", [ZeroDivisionError("lost"), OSError("lost"), KeyboardInterrupt("lost")])
def test_an_upload_whose_source_fails_leaves_nothing(
    store: Store, content: bytes, error: BaseException, request: pytest.FixtureRequest
) -> None:
    def pieces() -> Iterator[bytes]:
        yield content
        yield content
        yield content
        raise error

    store.put("old.bin", b"old")
    for key in ("old.bin", "new/file.bin"):
        with pytest.raises(type(error), match=r"^lost$"):
            store.upload(key, pieces())
    assert store.get("old.bin") == b"old"
    assert store.sizes() == {"old.bin": 3}
    if store.is_local:
        assert [path.name for path in Path(store.place).rglob("*") if path.is_file()] == ["old.bin"]
    else:
        gateway: Gateway = request.getfixturevalue("bucket")
        assert "CreateMultipartUpload" in gateway.asked
        assert gateway.uploads(BUCKET) == 0


def test_copies(store: Store, content: bytes) -> None:
    store.put("a/large.bin", content)
    store.put("b/large.bin", b"old")
    store.copy("a/large.bin", "b/large.bin")
    store.copy("a/large.bin", "c/d.bin")
    assert store.get("b/large.bin") == store.get("c/d.bin") == store.get("a/large.bin") == content


def test_a_file_is_shared_under_another_name(store: Store, content: bytes) -> None:
    store.put("a/large.bin", content)
    store.put("b/large.bin", b"old")
    for target in ("b/large.bin", "c/d/e.bin", "c/d/e.bin"):  # over another file, in a new folder, once more
        store.share("a/large.bin", target)
        assert store.get(target) == content
    assert store.sizes() == {"a/large.bin": len(content), "b/large.bin": len(content), "c/d/e.bin": len(content)}
    store.put("a/large.bin", b"new")
    store.delete(["b/large.bin"])
    assert store.get("c/d/e.bin") == content
    if isinstance(store, LocalStore):
        assert list(store.path.rglob(".*")) == []
        store.share("c/d/e.bin", "f")
        assert (store.path / "c/d/e.bin").samefile(store.path / "f")
    with pytest.raises(FileNotFoundError):
        store.share("nothing", "g")


def test_a_disk_without_links_gets_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **named: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    store = LocalStore(tmp_path)
    store.put("a", b"content")
    store.share("a", "b/c")
    assert store.get("b/c") == b"content"
    assert not (tmp_path / "a").samefile(tmp_path / "b/c")


def test_a_folder_is_moved_and_can_be_moved_again(store: Store) -> None:
    names = [f"{index}.bin" for index in range(20)] + ["deep/er/x.bin", "e\u0301=+ %41.bin"]
    for name in names:
        store.put(f"from/it/{name}", name.encode())
    store.put("from/italy/y.bin", b"y")
    store.move("from/it", "to/here")
    store.move("from/it", "to/here")
    assert store.sizes("from/it") == {}
    assert store.sizes("from") == {"from/italy/y.bin": 1}
    assert {key: store.get(key) for key in store.sizes("to")} == {f"to/here/{name}": name.encode() for name in names}


def test_listings(store: Store) -> None:
    for key in ("a/1.bin", "a/b/2.bin", "a/b/c/3.bin", "ab/4.bin", "a.bin", "z ü%41/5#.bin"):
        store.put(key, key.encode())
    everything = {
        key: len(key.encode()) for key in ("a/1.bin", "a/b/2.bin", "a/b/c/3.bin", "ab/4.bin", "a.bin", "z ü%41/5#.bin")
    }
    assert store.sizes() == everything
    assert store.sizes("a") == {key: size for key, size in everything.items() if key.startswith("a/")}
    assert store.under("a").sizes() == {"1.bin": 7, "b/2.bin": 9, "b/c/3.bin": 11}
    assert store.under("a").sizes("b") == {"b/2.bin": 9, "b/c/3.bin": 11}
    assert store.under("z ü%41").sizes() == {"5#.bin": len("z ü%41/5#.bin".encode())}
    assert store.children() == ["a", "a.bin", "ab", "z ü%41"]
    assert store.children("a") == ["1.bin", "b"]
    assert store.children("a/b/c") == ["3.bin"]
    assert store.under("a").folder().names == {"1.bin"}
    assert bytes(read_all(store.under("z ü%41"), "5#.bin")) == "z ü%41/5#.bin".encode()


def read_all(store: Store, name: str) -> bytearray:
    file = store.folder().file(name)
    data = bytearray(file.size)
    assert file.read_into(memoryview(data), 0) == file.size
    return data


def test_files_are_deleted_and_folders_cleared(store: Store) -> None:
    for key in ("a/1", "a/b/2", "ab/3", "c"):
        store.put(key, b"x")
    store.delete(["c", "a/1", "gone"])
    assert store.sizes() == {"a/b/2": 1, "ab/3": 1}
    store.clear("a")
    assert store.sizes() == {"ab/3": 1}
    assert store.children() == ["ab"]


def test_a_state_is_replaced_only_by_who_saw_it(store: Store) -> None:
    assert store.tagged("latest.json") is None
    assert store.swap("latest.json", b"one", None)
    assert not store.swap("latest.json", b"other", None)
    data, tag = store.tagged("latest.json") or (b"", "")
    assert data == b"one"
    assert store.swap("latest.json", b"two", tag)
    assert not store.swap("latest.json", b"three", tag)
    assert store.get("latest.json") == b"two"
    store.delete(["latest.json"])
    assert not store.swap("latest.json", b"three", tag)
    assert store.tagged("latest.json") is None


def test_a_store_pickles_and_holds_no_secret(store: Store) -> None:
    store.put("x", b"1")
    stored = pickle.dumps(store)
    assert len(stored) < 400
    assert SECRET.encode() not in stored
    again: Store = pickle.loads(stored)
    assert again == store
    assert again.get("x") == b"1"


def test_threads_share_a_store(store: Store) -> None:
    def work(index: int) -> bytes:
        store.put(f"{index % 5}/{index}", bytes([index]) * 1000)
        store.sizes(f"{index % 5}")
        return store.read(f"{index % 5}/{index}", 990, 2000)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(40))) == [bytes([index]) * 10 for index in range(40)]
    assert len(store.sizes()) == 40


def test_a_lock_is_no_file_of_the_store(store: Store) -> None:
    def never() -> None:
        raise AssertionError

    store.put("runs/x", b"1")
    for _ in range(2):
        with store.lock("runs/merge", never), store.lock("runs/other", never):
            assert store.sizes() == {"runs/x": 1}
            assert store.children("runs") == ["x"]
            if not store.is_local:
                assert store.under("runs").folder().names == {"x"}


def test_processes_hold_a_name_one_after_the_other(store: Store) -> None:
    store.put("count", b"0")
    work = (
        "for _ in range(5):\n"
        "    with store.lock('counter', lambda: None):\n"
        "        seen = int(store.get('count'))\n"
        "        time.sleep(0.01)\n"
        "        store.put('count', str(seen + 1).encode())\n"
    )
    processes = [started(store, work) for _ in range(3)]
    for process in processes:
        process.communicate()
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert store.get("count") == b"15"


def test_the_death_of_its_holder_frees_a_lock(store: Store) -> None:
    with started(store, "with store.lock('merge', sys.exit):\n    print('held', flush=True)\n    sys.stdin.read()\n") as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        waited: list[int] = []

        def waiting() -> None:
            waited.append(1)
            holder.send_signal(signal.SIGKILL)

        with store.lock("merge", waiting):
            assert waited
            assert holder.wait() == -signal.SIGKILL


def test_a_wait_for_a_lock_can_be_given_up(store: Store) -> None:
    """By what is called while it lasts; the holder keeps it."""
    calls: list[int] = []

    def waiting() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise InterruptedError("no longer wanted")

    with store.lock("merge", lambda: None):
        with pytest.raises(InterruptedError, match="no longer wanted"), store.lock("merge", waiting):
            calls.append(1)
        assert len(calls) == 3
        with pytest.raises(InterruptedError, match="again"), store.lock("merge", again):
            calls.append(1)
    with store.lock("merge", again):
        assert len(calls) == 3


def again() -> None:
    raise InterruptedError("again")


def test_a_lock_is_held_until_its_holder_ends(store: Store) -> None:
    order: list[str] = []
    is_waiting = threading.Event()

    def second() -> None:
        with store.lock("merge", is_waiting.set):
            order.append("second")

    thread = threading.Thread(target=second)
    with store.lock("merge", lambda: None):
        thread.start()
        assert is_waiting.wait(60)
        if not store.is_local:  # longer than a lease without a sign of life is respected
            while beat_of(store, "merge") < 30:
                threading.Event().wait(0.05)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def beat_of(store: Store, name: str) -> int:
    found = store.tagged(f"{name}.lease")
    assert found is not None
    beat: int = json.loads(found[0])["beat"]
    return beat


def test_a_lock_is_freed_by_an_error_of_its_holder(store: Store) -> None:
    with pytest.raises(ZeroDivisionError), store.lock("merge", lambda: None):
        raise ZeroDivisionError
    with store.lock("merge", lambda: pytest.fail("it is free")):
        pass
