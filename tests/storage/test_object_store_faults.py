"""A store in a bucket, and the local one, when what holds them fails."""

from __future__ import annotations

import json
import pickle
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from storage import buckets, leases, object_store
from storage.errors import StoreError
from storage.object_store import ObjectStore
from storage.stores import open_store
from tests.support.store_gateway import SECRET, Gateway, empty_bucket

BUCKET = "outputs"
PLACE = f"s3://{BUCKET}/team/out"
ROOT = Path(__file__).parents[2]
LARGE = np.random.default_rng(0).bytes(18_000_000)
SMALL = LARGE[:300_001]

Action = Callable[[ObjectStore], object]


@pytest.fixture
def bucket(moto: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    monkeypatch.setattr(leases, "LEASE_BEAT_S", 0.02)
    monkeypatch.setattr(leases, "LEASE_POLL_S", 0.02)
    with empty_bucket(moto, BUCKET, monkeypatch) as gateway:
        yield gateway


@pytest.fixture
def store(bucket: Gateway) -> ObjectStore:
    """With one file of 300,001 bytes, and a folder of three."""
    for key in ("x.bin", "folder/1", "folder/2", "folder/a/3"):
        bucket.put(f"{BUCKET}/team/out/{key}", SMALL)
    return ObjectStore.at(PLACE)


def pieces() -> Iterator[bytes]:
    for start in range(0, len(LARGE), 5_000_000):
        yield LARGE[start : start + 5_000_000]


def upload(store: ObjectStore) -> bool:
    store.upload("x.bin", pieces(), size=len(LARGE))
    return store.get("x.bin") == LARGE


def put(store: ObjectStore) -> bool:
    store.put("x.bin", b"new ", b"content")
    return store.get("x.bin") == b"new content"


def copy(store: ObjectStore) -> bool:
    store.copy("x.bin", "y.bin")
    return store.get("y.bin") == SMALL


def move(store: ObjectStore) -> bool:
    store.move("folder", "moved")
    sizes = dict.fromkeys(("moved/1", "moved/2", "moved/a/3", "x.bin"), len(SMALL))
    return store.sizes() == sizes and store.get("moved/a/3") == SMALL


def delete(store: ObjectStore) -> bool:
    store.delete(["x.bin", "folder/2"])
    return store.sizes() == dict.fromkeys(("folder/1", "folder/a/3"), len(SMALL))


def clear(store: ObjectStore) -> bool:
    store.clear("folder")
    return store.sizes() == {"x.bin": len(SMALL)}


def create(store: ObjectStore) -> bool:
    return store.swap("latest.json", b"one", None) and store.get("latest.json") == b"one"


def swap(store: ObjectStore) -> bool:
    found = store.tagged("x.bin")
    return found is not None and store.swap("x.bin", b"two", found[1]) and store.get("x.bin") == b"two"


def lock(store: ObjectStore) -> bool:
    with store.lock("merge", lambda: pytest.fail("nobody holds it")):
        return True


ACTIONS: dict[str, tuple[str, Action]] = {
    "get": ("GET", lambda store: store.get("x.bin") == SMALL),
    "read": ("GET", lambda store: store.read("x.bin", 1000, 200_000) == SMALL[1000:200_000]),
    "read nothing": ("HEAD", lambda store: store.read("x.bin", 5, 5) == b""),
    "tagged": ("GET", lambda store: (store.tagged("x.bin") or (b"",))[0] == SMALL),
    "sizes": ("GET", lambda store: store.sizes("folder") == dict.fromkeys(("folder/1", "folder/2", "folder/a/3"), len(SMALL))),
    "children": ("GET", lambda store: store.children("folder") == ["1", "2", "a"]),
    "folder": ("GET", lambda store: store.folder().names == {"x.bin"}),
    "put": ("PUT", put),
    "begin an upload": ("CreateMultipartUpload", upload),
    "upload a part": ("UploadPart", upload),
    "complete an upload": ("CompleteMultipartUpload", upload),
    "copy": ("CopyObject", copy),
    "move by copies": ("CopyObject", move),
    "move by deletes": ("DeleteObjects", move),
    "delete": ("DeleteObjects", delete),
    "clear": ("DeleteObjects", clear),
    "create": ("PUT", create),
    "swap": ("PUT", swap),
    "lock": ("PUT", lock),
}
each_action = pytest.mark.parametrize(("operation", "action"), ACTIONS.values(), ids=ACTIONS.keys())


@pytest.mark.parametrize(
    "burst",
    [["503 SlowDown", "500 InternalError"], [429], ["hang up", "hang up"], ["lost"], ["lost", 503], ["cut"]],
    ids=["5xx", "429", "hang up", "lost", "lost and 503", "cut"],
)
@each_action
def test_a_burst_is_sat_out(
    bucket: Gateway, store: ObjectStore, operation: str, action: Action, burst: list[int | str]
) -> None:
    bucket.scripts[operation] = [*burst]
    assert action(store)
    assert bucket.scripts[operation] == []
    if operation != "CreateMultipartUpload":  # one whose answer was lost is known to nobody
        assert bucket.uploads(BUCKET) == 0


@pytest.mark.parametrize("step", [503, "hang up"])
@each_action
def test_a_store_that_stays_down_is_one_error(
    bucket: Gateway, store: ObjectStore, operation: str, action: Action, step: int | str
) -> None:
    bucket.scripts[operation] = [step] * 1000
    with pytest.raises(
        StoreError, match=rf"^{PLACE}[^ ]*: the store cannot be reached, after retries \(.*\)\. Run again"
    ) as caught:
        action(store)
    assert SECRET not in str(caught.value)
    assert "Signature" not in str(caught.value)
    assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args
    bucket.scripts.clear()
    assert bucket.uploads(BUCKET) == 0
    assert action(store)


@pytest.mark.parametrize("status", [401, 403])
@each_action
def test_refusals_name_the_environment(
    bucket: Gateway, store: ObjectStore, operation: str, action: Action, status: int
) -> None:
    bucket.scripts[operation] = [status] * 30
    with pytest.raises(
        StoreError, match=rf"^{PLACE}[^ ]*: access is refused \(HTTP {status}.*\. Set AWS_ACCESS_KEY_ID"
    ) as caught:
        action(store)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("step", ["cut", "short"])
@pytest.mark.parametrize("name", ["get", "read", "tagged"])
def test_half_a_body_goes_on_from_its_end(bucket: Gateway, store: ObjectStore, name: str, step: str) -> None:
    action = ACTIONS[name][1]
    for count in (1, 2, 4):
        bucket.scripts["GET"] = [step] * count
        assert action(store)


@pytest.mark.parametrize("step", ["cut", "short"])
@pytest.mark.parametrize("name", ["get", "read", "tagged"])
def test_bodies_that_stay_short_are_no_answer(
    bucket: Gateway, store: ObjectStore, name: str, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buckets, "RESUMES", 2)
    bucket.scripts["GET"] = [step] * 1000
    with pytest.raises(StoreError, match=rf"^{PLACE}/x\.bin: (the store cannot be reached|\d+ of \d+ bytes came)"):
        ACTIONS[name][1](store)


def test_a_file_that_is_replaced_while_it_is_read_is_read_anew(
    bucket: Gateway, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, other = store._asked, LARGE[-len(SMALL) :]
    replacements = iter([other])

    def replaced(self: ObjectStore, key: str, **options: object) -> object:
        found = asked(key, **options)
        if (content := next(replacements, None)) is not None:
            bucket.put(f"{BUCKET}/team/out/x.bin", content)
        return found

    monkeypatch.setattr(ObjectStore, "_asked", replaced)
    bucket.scripts["GET"] = ["short"]
    assert store.get("x.bin") == other


@pytest.mark.parametrize("operation", ["CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload"])
def test_an_upload_that_fails_leaves_what_was_there(bucket: Gateway, store: ObjectStore, operation: str) -> None:
    bucket.scripts[operation] = [403] * 30
    with pytest.raises(StoreError, match=r"x\.bin: access is refused"):
        upload(store)
    assert bucket.uploads(BUCKET) == 0
    assert store.get("x.bin") == SMALL
    assert "AbortMultipartUpload" in bucket.asked or operation == "CreateMultipartUpload"


def test_an_upload_that_was_completed_before_its_answer_was_lost_is_whole(bucket: Gateway, store: ObjectStore) -> None:
    bucket.scripts["CompleteMultipartUpload"] = ["lost", "404 NoSuchUpload"]
    assert upload(store)
    store.put("x.bin", SMALL)
    bucket.scripts["CompleteMultipartUpload"] = ["404 NoSuchUpload"]
    with pytest.raises(StoreError, match=r"x\.bin: the store cannot be reached, after retries \(HTTP 404, NoSuchUpload\)"):
        upload(store)
    assert store.get("x.bin") == SMALL
    assert bucket.uploads(BUCKET) == 0


def test_the_error_of_the_source_is_told_even_where_the_upload_cannot_be_aborted(bucket: Gateway, store: ObjectStore) -> None:
    def broken() -> Iterator[bytes]:
        yield LARGE
        raise ZeroDivisionError("lost")

    bucket.scripts["AbortMultipartUpload"] = [503] * 30
    with pytest.raises(ZeroDivisionError, match="lost"):
        store.upload("x.bin", broken(), size=len(LARGE))
    assert store.get("x.bin") == SMALL


def test_parts_grow_with_the_size_that_is_told(bucket: Gateway, store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "LEAST_PART_BYTES", 5 << 20)
    monkeypatch.setattr(object_store, "MOST_PARTS", 3)
    upload(store)
    assert bucket.asked.count("UploadPart") == 2
    monkeypatch.setattr(object_store, "PART_BYTES", 5 << 20)
    with pytest.raises(StoreError, match=r"x\.bin: it has more bytes than 3 parts of 5242880\. Give its size"):
        store.upload("x.bin", pieces())
    assert bucket.uploads(BUCKET) == 0
    assert store.get("x.bin") == LARGE


@pytest.mark.parametrize("step", ["400 InvalidRequest", "400 EntityTooLarge"])
def test_what_is_too_large_to_be_copied_by_the_store_is_sent_again(
    bucket: Gateway, store: ObjectStore, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "PART_BYTES", 5 << 20)
    store.upload("large.bin", pieces())
    bucket.scripts["CopyObject"] = [step]
    store.copy("large.bin", "folder/copy.bin")
    assert store.get("folder/copy.bin") == LARGE
    assert bucket.asked.count("UploadPart") > 3


def test_a_move_goes_on_where_it_was_left(bucket: Gateway, store: ObjectStore) -> None:
    bucket.scripts["CopyObject"] = ["pass", *[403] * 30]
    with pytest.raises(StoreError, match="access is refused"):
        store.move("folder", "moved")
    assert len(store.sizes("folder")) == 3
    bucket.scripts["CopyObject"] = []
    bucket.scripts["DeleteObjects"] = [403]
    with pytest.raises(StoreError, match="access is refused"):
        store.move("folder", "moved")
    store.delete(["folder/2"])  # some were deleted before the death
    bucket.scripts.clear()
    assert move(store)


def test_a_copy_that_the_store_only_says_it_made_is_an_error(bucket: Gateway, store: ObjectStore) -> None:
    bucket.scripts["CopyObject"] = ["200 Whatever"]
    with pytest.raises(StoreError, match=rf"^{PLACE}/moved/[12a/3]+: the store made no whole copy of folder/"):
        store.move("folder", "moved")
    assert len(store.sizes("folder")) == 3
    bucket.put(f"{BUCKET}/team/out/y.bin", b"old")
    bucket.scripts["CopyObject"] = ["200 Whatever"]
    with pytest.raises(StoreError, match=rf"^{PLACE}/y\.bin: the store made no whole copy of x\.bin\. Run again"):
        store.copy("x.bin", "y.bin")


def test_a_swap_that_another_won_is_lost(bucket: Gateway, store: ObjectStore) -> None:
    _, tag = store.tagged("x.bin") or (b"", "")
    bucket.put(f"{BUCKET}/team/out/x.bin", b"another's")
    bucket.scripts["PUT"] = [503, "hang up"]
    assert not store.swap("x.bin", b"ours", tag)
    assert not store.swap("x.bin", b"ours", None)
    assert store.get("x.bin") == b"another's"


def test_a_conflict_of_puts_under_way_is_asked_again(bucket: Gateway, store: ObjectStore) -> None:
    bucket.scripts["PUT"] = ["409 ConditionalRequestConflict"]
    assert store.swap("new.json", b"ours", None)
    _, tag = store.tagged("x.bin") or (b"", "")
    bucket.scripts["PUT"] = ["409 ConditionalRequestConflict"]
    assert store.swap("x.bin", b"ours", tag)


def test_markers_of_folders_are_no_files(bucket: Gateway, store: ObjectStore) -> None:
    for key in ("", "folder/", "folder/a/"):
        bucket.put(f"{BUCKET}/team/out/{key}", b"")
    assert set(store.sizes()) == {"x.bin", "folder/1", "folder/2", "folder/a/3"}
    assert set(store.sizes("folder")) == {"folder/1", "folder/2", "folder/a/3"}
    assert store.children() == ["folder", "x.bin"]
    assert store.children("folder") == ["1", "2", "a"]


def test_more_than_a_page_of_files(bucket: Gateway, store: ObjectStore) -> None:
    for index in range(1001):
        bucket.put(f"{BUCKET}/team/out/many/{index}", b"x")
    bucket.asked.clear()
    assert store.sizes("many") == {f"many/{index}": 1 for index in range(1001)}
    assert bucket.asked == ["GET", "GET"]
    store.clear("many")
    assert store.sizes("many") == {}
    assert bucket.asked.count("DeleteObjects") == 2


def test_uploads_under_way_are_not_seen(store: ObjectStore) -> None:
    before = store.sizes()

    def watched() -> Iterator[bytes]:
        for piece in pieces():
            yield piece
            assert store.sizes() == before
            assert store.children() == ["folder", "x.bin"]

    store.upload("new.bin", watched(), size=len(LARGE))
    assert store.sizes() == {**before, "new.bin": len(LARGE)}


def test_no_such_bucket(bucket: Gateway) -> None:
    nowhere = ObjectStore.at("s3://nowhere/out")
    for attempt in (
        lambda: nowhere.put("x", b"1"),
        lambda: nowhere.get("x"),
        lambda: nowhere.upload("x", pieces()),
        lambda: nowhere.copy("x", "y"),
        lambda: nowhere.swap("x", b"1", None),
        nowhere.sizes,
        nowhere.children,
        nowhere.folder,
    ):
        with pytest.raises(StoreError, match=r"^s3://nowhere/out[^ ]*: there is no such bucket or container\. Create it"):
            attempt()


def test_a_store_that_is_not_there(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # and does not listen
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{held.getsockname()[1]}")
        for attempt in (store.sizes, lambda: store.get("x"), lambda: store.put("x", b""), lambda: upload(store)):
            with pytest.raises(StoreError, match=rf"^{PLACE}[^ ]*: the store cannot be reached, .*error sending"):
                attempt()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (f"s3://anyone:{SECRET}@bucket/out", "bucket is empty, or that holds a user, is refused"),
        (f"s3://{SECRET}@bucket/out", "holds a user, is refused"),
        (f"abfss://container:{SECRET}@account.dfs.core.windows.net/out", "holds a user, is refused"),
        (f"s3://bucket/out?X-Amz-Signature={SECRET}", "with a query or a fragment is refused"),
        (f"az://container/out#{SECRET}", "with a query or a fragment is refused"),
        ("s3:///out", "bucket is empty"),
        ("s3://bucket/a//b", r"^s3://bucket/a//b: a prefix of names with single slashes"),
        ("gs://bucket/a/%2E%2E/b", "a prefix of names with single slashes"),
    ],
)
def test_urls_that_hold_more_than_a_place_are_refused(url: str, message: str) -> None:
    with pytest.raises(StoreError, match=message) as caught:
        open_store(url)
    assert SECRET not in str(caught.value)


def test_azures_and_googles_places() -> None:
    place = "abfss://container@account.dfs.core.windows.net/team/out"
    assert open_store(f"{place}//").place == place
    assert open_store("GS://bucket").under("a").place == "gs://bucket/a"


def test_settings_that_make_no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "nowhere.json")
    buckets.forget_connections()
    with pytest.raises(StoreError, match=r"store's settings .*Set GOOGLE_APPLICATION_CREDENTIALS to a key file"):
        open_store("gs://bucket/out").sizes()


def test_a_lease_outlives_a_store_that_is_away_for_a_while(bucket: Gateway, store: ObjectStore) -> None:
    with store.lock("merge", lambda: pytest.fail("nobody holds it")):
        bucket.scripts["PUT"] = [503] * 12
        while bucket.scripts["PUT"]:
            threading.Event().wait(0.01)
        before = beat_of(store)
        while beat_of(store) < before + 2:
            threading.Event().wait(0.01)
    assert store.tagged("merge.lease") is None


def test_a_lease_that_was_lost_is_left_to_its_new_holder(bucket: Gateway, store: ObjectStore) -> None:
    with store.lock("merge", lambda: pytest.fail("nobody holds it")):
        bucket.put(f"{BUCKET}/team/out/merge.lease", b'{"owner": "another", "beat": 1, "released": false}')
    assert store.get("merge.lease") == b'{"owner": "another", "beat": 1, "released": false}'


def test_a_lease_that_cannot_be_deleted_is_free_at_once(bucket: Gateway, store: ObjectStore) -> None:
    bucket.scripts["DeleteObjects"] = [503] * 3
    with store.lock("merge", lambda: pytest.fail("nobody holds it")):
        pass
    assert store.tagged("merge.lease") is not None
    with store.lock("merge", lambda: pytest.fail("nobody holds it")):
        assert store.tagged("merge.lease") is not None


def test_a_damaged_lease_is_waited_out(bucket: Gateway, store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "LEASE_TTL_S", 0.2)
    for content in (b"", b"[1]", b"\xff"):
        bucket.put(f"{BUCKET}/team/out/merge.lease", content)
        waited: list[int] = []
        with store.lock("merge", lambda waited=waited: waited.append(1)):  # type: ignore[misc]
            assert waited


def beat_of(store: ObjectStore) -> int:
    found = store.tagged("merge.lease")
    assert found is not None
    beat: int = json.loads(found[0])["beat"]
    return beat
