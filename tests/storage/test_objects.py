from __future__ import annotations

import hashlib
import json
import pickle
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from storage import buckets, objects
from storage.errors import CheckpointError, SourceError
from storage.files import open_local
from storage.headers import read_header
from storage.objects import HEAD_BYTES, ObjectFile, ObjectFolder, open_objects
from tests.support.store_gateway import SECRET, Gateway, empty_bucket

BUCKET = "checkpoints"


@pytest.fixture
def store(moto: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    with empty_bucket(moto, BUCKET, monkeypatch) as gateway:
        yield gateway
    objects._head.cache_clear()


@pytest.fixture
def content() -> bytes:
    """Larger than what is read ahead, and no two parts of it are equal."""
    return np.random.default_rng(0).bytes(5 * HEAD_BYTES)


def only_file(store: Gateway, content: bytes, name: str = "model.safetensors") -> ObjectFile:
    """A file in the store, of a prefix opened after it was put there."""
    store.put(f"{BUCKET}/math/{name}", content)
    return open_objects("expert math", f"s3://{BUCKET}/math").file(name)


def read(file: ObjectFile, offset: int, length: int) -> bytes:
    data = bytearray(length)
    return bytes(data[: file.read_into(memoryview(data), offset)])


def test_the_files_directly_under_a_prefix_are_listed_at_once(store: Gateway) -> None:
    for key in ("config.json", "model.safetensors", "checkpoint-100/model.safetensors", "", "a b+ü%41.txt"):
        store.put(f"{BUCKET}/team/math/{quote(key)}", key.encode() * 3)
    store.put(f"{BUCKET}/team/mathematics/other.json", b"{}")
    folder = open_objects("expert math", f"S3://{BUCKET}/team/math/")
    assert folder.names == {"config.json", "model.safetensors", "a b+ü%41.txt"}
    assert folder.place == f"s3://{BUCKET}/team/math"
    assert (folder.id, folder.is_local) == (None, False)
    assert folder.file("config.json").size == 33
    assert folder.file("config.json").place == f"s3://{BUCKET}/team/math/config.json"
    assert len(store.seen) == 1
    for name in folder.names:
        assert read(folder.file(name), 0, 999) == name.encode() * 3


def test_a_whole_bucket_and_more_than_a_page_of_files(store: Gateway) -> None:
    for index in range(1001):
        store.put(f"{BUCKET}/{index}.json", b"{}")
    assert open_objects("base", f"s3a://{BUCKET}").names == {f"{index}.json" for index in range(1001)}
    assert len(store.seen) == 2


def test_ranges_are_the_bytes_of_the_file(store: Gateway, content: bytes) -> None:
    file = only_file(store, content)
    for offset, length in [
        (0, 8),
        (HEAD_BYTES - 5, 5),
        (HEAD_BYTES - 5, 6),
        (1, len(content)),
        (len(content) - 9, 50),
        (HEAD_BYTES, 1),
    ]:
        assert read(file, offset, length) == content[offset : offset + length]
    before = len(store.seen)
    assert read(file, len(content), 10) == read(file, len(content) + 5, 10) == read(file, 0, 0) == b""
    assert len(store.seen) == before


def test_a_header_costs_one_round_trip(store: Gateway, tmp_path: Path) -> None:
    weight = torch.linspace(-3, 3, 70_000).reshape(700, 100)
    save_file({"norm": torch.ones(4), "weight": weight}, tmp_path / "model.safetensors")
    file = only_file(store, (tmp_path / "model.safetensors").read_bytes())
    tensors = pickle.loads(pickle.dumps(read_header(file)))
    assert store.ranges("model.safetensors") == [f"bytes=0-{HEAD_BYTES - 1}"]
    np.testing.assert_array_equal(tensors["weight"].read(500, 600).view(np.float32), weight[500:600].numpy())
    assert len(store.ranges("model.safetensors")) == 2


def test_what_pickles_holds_no_credential_and_reads_on(store: Gateway, content: bytes) -> None:
    store.put(f"{BUCKET}/math/x.bin", content)
    folder = open_objects("expert math", f"s3://{BUCKET}/math")
    read(folder.file("x.bin"), 0, 9)
    stored = pickle.dumps(folder)
    assert SECRET.encode() not in stored
    assert len(stored) < 1000
    again: ObjectFolder = pickle.loads(stored)
    assert again == folder
    assert read(again.file("x.bin"), HEAD_BYTES, 50) == content[HEAD_BYTES : HEAD_BYTES + 50]


@pytest.mark.parametrize("change", ["put", "delete"])
def test_a_file_that_changed_since_it_was_listed_is_not_read(store: Gateway, content: bytes, change: str) -> None:
    file = only_file(store, content)
    if change == "put":
        store.put(f"{BUCKET}/math/model.safetensors", content[::-1])
    else:
        store.delete(f"{BUCKET}/math/model.safetensors")
    for offset in (0, HEAD_BYTES):
        with pytest.raises(
            CheckpointError, match=r"^s3://checkpoints/math/model\.safetensors: .*changed since it was planned. Run again"
        ):
            read(file, offset, 100)


def test_a_store_that_knows_no_conditions_is_compared_with(store: Gateway, content: bytes) -> None:
    file = only_file(store, content)
    store.put(f"{BUCKET}/math/model.safetensors", content[::-1])
    store.script = ["no If-Match"]
    with pytest.raises(CheckpointError, match=r"model\.safetensors: it changed since it was planned"):
        read(file, HEAD_BYTES, 100)


def test_a_cut_body_goes_on_from_its_last_byte(store: Gateway, content: bytes) -> None:
    file = only_file(store, content)
    store.script = ["cut"]
    assert read(file, 1000, 400_000) == content[1000:401_000]
    assert store.ranges("model.safetensors") == ["bytes=1000-400999", "bytes=201000-400999"]


def test_a_body_cut_more_often_than_obstore_retries_goes_on(store: Gateway, content: bytes) -> None:
    file = only_file(store, content)
    store.script = ["cut"] * 6
    assert read(file, 1000, 400_000) == content[1000:401_000]
    assert len(store.ranges("model.safetensors")) == 7


def test_a_store_that_cuts_every_body_is_an_error_in_the_end(store: Gateway, content: bytes) -> None:
    file = only_file(store, content)
    store.script = ["cut"] * 1000
    with pytest.raises(
        SourceError, match=r"model\.safetensors: the store cannot be reached, after retries \(request or response body"
    ):
        read(file, 0, len(content))
    tries = 1 + buckets.RETRIES["max_retries"]
    assert tries < len(store.ranges("model.safetensors")) <= (1 + buckets.RESUMES) * tries


@pytest.mark.parametrize("step", [503, 500, 429, "hang up"])
def test_a_burst_of_failures_is_sat_out(store: Gateway, content: bytes, step: int | str) -> None:
    store.put(f"{BUCKET}/math/model.safetensors", content)
    store.script = [step] * 2
    file = open_objects("expert math", f"s3://{BUCKET}/math").file("model.safetensors")
    store.script = [step] * 2
    assert read(file, HEAD_BYTES, 1000) == content[HEAD_BYTES : HEAD_BYTES + 1000]


def test_a_store_that_stays_away_is_an_error_in_the_end(store: Gateway, content: bytes) -> None:
    file = only_file(store, content)
    store.script = [503] * 3
    with pytest.raises(SourceError, match=r"cannot be reached, after retries \(HTTP 503, Scripted\)") as caught:
        read(file, 0, 8)
    assert SECRET not in str(caught.value)
    assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args
    assert read(file, 0, 8) == content[:8]


def test_a_store_that_is_not_there(monkeypatch: pytest.MonkeyPatch, store: Gateway) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # and does not listen
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{held.getsockname()[1]}")
        with pytest.raises(
            SourceError, match=r"expert math: s3://checkpoints/math: the store cannot be reached, .*error sending"
        ):
            open_objects("expert math", f"s3://{BUCKET}/math")


@pytest.mark.parametrize("status", [401, 403])
def test_refused_access_names_the_environment(store: Gateway, content: bytes, status: int) -> None:
    file = only_file(store, content)
    for attempt in (lambda: read(file, 0, 8), lambda: open_objects("expert math", f"s3://{BUCKET}/math")):
        store.script = [status]
        with pytest.raises(
            CheckpointError, match=rf"access is refused \(HTTP {status}, Scripted\)\. Set AWS_ACCESS_KEY_ID"
        ) as caught:
            attempt()
        assert SECRET not in str(caught.value)


def test_another_region_is_said(store: Gateway) -> None:
    store.script = [301]
    with pytest.raises(CheckpointError, match=r"base: s3://checkpoints: the bucket lies in another region. Set AWS_REGION"):
        open_objects("base", f"s3://{BUCKET}")


def test_missing_credentials_name_the_environment(store: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_METADATA_ENDPOINT", f"http://127.0.0.1:{held.getsockname()[1]}")  # where EC2 would give some
        with pytest.raises(
            CheckpointError, match=r"base: s3://checkpoints/math: no credentials .*AWS_SKIP_SIGNATURE=true for a public"
        ):
            open_objects("base", f"s3://{BUCKET}/math")


def test_a_public_bucket_needs_none(store: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put(f"{BUCKET}/math/config.json", b"{}")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    assert open_objects("base", f"s3://{BUCKET}/math").names == {"config.json"}


@pytest.mark.parametrize(
    ("url", "variables", "message"),
    [
        ("az://container/math", {}, "Set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY"),
        (
            "abfs://container/math",
            {"AZURE_STORAGE_ACCOUNT_NAME": "x", "AZURE_STORAGE_ACCOUNT_KEY": SECRET},
            "incomplete or wrong",
        ),
        (
            "gs://bucket/math",
            {"GOOGLE_APPLICATION_CREDENTIALS": "nowhere.json"},
            "Set GOOGLE_APPLICATION_CREDENTIALS to a key file",
        ),
        ("s3://bucket/math", {"AWS_ACCESS_KEY_ID": "without the other"}, "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
    ],
)
def test_settings_that_make_no_store(
    monkeypatch: pytest.MonkeyPatch, url: str, variables: dict[str, str], message: str
) -> None:
    for name in ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    buckets.forget_connections()
    with pytest.raises(CheckpointError, match=rf"base: {url}: the store's settings .*{message}") as caught:
        open_objects("base", url)
    assert SECRET not in str(caught.value)


def test_no_such_bucket(store: Gateway) -> None:
    with pytest.raises(
        CheckpointError, match=r"expert math: s3://nowhere/math: there is no such bucket or container. Correct the source"
    ):
        open_objects("expert math", "s3://nowhere/math")


def test_an_empty_prefix_names_the_folders_it_has(store: Gateway) -> None:
    store.put(f"{BUCKET}/math/checkpoint-100/config.json", b"{}")
    with pytest.raises(
        CheckpointError, match=r"s3://checkpoints/math: no files there; it has the folders checkpoint-100. Give the prefix"
    ):
        open_objects("expert math", f"s3://{BUCKET}/math")
    with pytest.raises(CheckpointError, match=r"expert math: s3://checkpoints/code: no files there. Give the prefix"):
        open_objects("expert math", f"s3://{BUCKET}/code")


def test_a_file_that_is_not_there_is_named(store: Gateway) -> None:
    store.put(f"{BUCKET}/math/config.json", b"{}")
    with pytest.raises(
        CheckpointError, match=r"s3://checkpoints/math: there is no file model-2.safetensors. Complete the upload"
    ):
        open_objects("expert math", f"s3://{BUCKET}/math").file("model-2.safetensors")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (
            f"s3://anyone:{SECRET}@bucket/math",
            "bucket is empty, or that holds a user, is refused. .*credentials come from the env",
        ),
        (f"s3://{SECRET}@bucket/math", "holds a user, is refused"),
        (f"s3://anyone:{SECRET}/with/slash@bucket/math", "holds a user, is refused"),
        (f"abfss://container:{SECRET}@account.dfs.core.windows.net/math", "holds a user, is refused"),
        (f"s3://bucket/math?X-Amz-Signature={SECRET}", "with a query or a fragment is refused"),
        (f"az://container/math?sig={SECRET}", "with a query or a fragment is refused"),
        (f"s3://bucket/math#{SECRET}", "with a query or a fragment is refused"),
        ("s3:///math", "bucket is empty"),
        ("ftp://bucket/math", "expected a URL of s3, s3a, gs, az, abfs, abfss"),
        ("bucket/math", "expected a URL of s3"),
    ],
)
def test_urls_that_hold_more_than_a_place_are_refused(url: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        open_objects("expert math", url)
    assert str(caught.value).startswith("expert math: ")
    assert SECRET not in str(caught.value)


def test_azures_container_at_host_is_a_place() -> None:
    place = buckets.place_of("abfss://container@account.dfs.core.windows.net/team/math//", objects.SOURCE)
    assert place == "abfss://container@account.dfs.core.windows.net/team/math"


def test_names_that_are_no_paths_are_refused(store: Gateway) -> None:
    store.put(f"{BUCKET}/math//config.json", b"{}")
    with pytest.raises(CheckpointError, match=r"s3://checkpoints/math: objects under it have names that are no paths"):
        open_objects("expert math", f"s3://{BUCKET}/math")


def test_small_files_are_copied_once_while_they_stay_the_same(store: Gateway, content: bytes) -> None:
    store.put(f"{BUCKET}/math/config.json", b'{"a": 1}')
    store.put(f"{BUCKET}/math/tokenizer.json", content)
    names = ["config.json", "tokenizer.json"]
    copies = open_objects("expert math", f"s3://{BUCKET}/math").local(names)
    assert {name: path.read_bytes() for name, path in copies.items()} == {"config.json": b'{"a": 1}', "tokenizer.json": content}
    assert {path.name for path in copies.values()} == {*names}
    objects._head.cache_clear()
    store.seen.clear()
    assert open_objects("expert math", f"s3://{BUCKET}/math").local(names) == copies
    assert len(store.seen) == 1  # the listing
    store.put(f"{BUCKET}/math/config.json", b'{"a": 2}')
    assert open_objects("expert math", f"s3://{BUCKET}/math").local(names)["config.json"].read_bytes() == b'{"a": 2}'
    assert copies["config.json"].read_bytes() == b'{"a": 1}'


def test_a_copy_that_was_cut_is_no_copy(store: Gateway, content: bytes) -> None:
    store.put(f"{BUCKET}/math/tokenizer.json", content)
    folder = open_objects("expert math", f"s3://{BUCKET}/math")
    store.script = ["cut"] * 1000
    with pytest.raises(SourceError, match=r"tokenizer\.json: the store cannot be reached"):
        folder.local(["tokenizer.json"])
    store.script = []
    path = folder.local(["tokenizer.json"])["tokenizer.json"]
    assert path.read_bytes() == content
    path.write_bytes(content[:50])
    assert folder.local(["tokenizer.json"])["tokenizer.json"].read_bytes() == content


def test_a_cache_that_cannot_be_written_is_said(store: Gateway, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    store.put(f"{BUCKET}/math/config.json", b"{}")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(SourceError, match=r"config.json: no copy can be kept in .*\(Not a directory\). Set XDG_CACHE_HOME"):
        open_objects("expert math", f"s3://{BUCKET}/math").local(["config.json"])


def test_small_files_are_identified_as_local_ones(
    store: Gateway, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes
) -> None:
    monkeypatch.setattr(objects, "SMALL_BYTES", 1000)
    (tmp_path / "config.json").write_bytes(b'{"a": 1}')
    store.put(f"{BUCKET}/math/config.json", b'{"a": 1}')
    store.put(f"{BUCKET}/math/model.safetensors", content)
    found = open_objects("expert math", f"s3://{BUCKET}/math").identities(["model.safetensors", "config.json"])
    assert found["config.json"] == open_local("base", tmp_path).identities(["config.json"])["config.json"]
    assert found["config.json"] == hashlib.sha256(b'{"a": 1}').hexdigest()
    assert found["model.safetensors"] == f"etag:{hashlib.md5(content).hexdigest()}:{len(content)}"
    assert store.ranges("model.safetensors") == []


def test_only_s3_identifies_content_across_places() -> None:
    for scheme, suffix in (("s3a", ""), ("gs", ":gs://bucket/math/w"), ("az", ":az://bucket/math/w")):
        folder = ObjectFolder(f"{scheme}://bucket/math", (ObjectFile(f"{scheme}://bucket/math", "w", 10**9, '"e"'),))
        assert folder.identities(["w"]) == {"w": f"etag:e:1000000000{suffix}"}


def test_changes_are_found_by_a_new_listing(store: Gateway) -> None:
    names = ["a.json", "b.json", "c.json"]
    for name in names:
        store.put(f"{BUCKET}/math/{name}", name.encode())
    folder = open_objects("expert math", f"s3://{BUCKET}/math")
    stamps = json.loads(json.dumps(folder.stamps(names)))
    identities = folder.identities(names)
    assert folder.changed(stamps, identities) == []
    store.put(f"{BUCKET}/math/a.json", b"a.jsoN")
    store.put(f"{BUCKET}/math/b.json", b"b.json")  # the same content again
    store.delete(f"{BUCKET}/math/c.json")
    store.seen.clear()
    assert folder.changed(stamps, identities) == ["a.json", "c.json"]
    assert len(store.seen) == 1


def test_a_process_has_one_store_per_place(store: Gateway) -> None:
    store.put(f"{BUCKET}/math/config.json", b"{}")
    for _ in range(3):
        read(open_objects("expert math", f"s3://{BUCKET}/math").file("config.json"), 0, 2)
    assert buckets._connection.cache_info().misses == 1
