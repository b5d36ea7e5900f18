from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from storage.artifact import WORK, Artifact, latest
from storage.errors import ArtifactError, OutputExistsError, StoreError
from storage.layout import LATEST, MANIFEST
from storage.publishing import _point_latest, check_output, find_by_inputs, make_latest, publish, staged_files
from storage.stores import Store, open_store
from tests.support.places import BUCKET, fill
from tests.support.small_artifacts import SmallArtifact, write_files
from tests.support.store_gateway import Gateway

STAGED = f"{WORK}/job/staged"


@pytest.fixture
def small(tmp_path: Path) -> SmallArtifact:
    return write_files(tmp_path / "small")


def published(output: Store, small: SmallArtifact, staged: str = STAGED) -> bool:
    fill(output, small.folder, f"{staged}/")
    return publish(output, staged, small.manifest)


def others(tmp_path: Path, count: int) -> list[SmallArtifact]:
    return [write_files(tmp_path / f"other-{seed}", seed=seed, router=False) for seed in range(1, count + 1)]


def test_a_published_version_is_whole_and_the_latest(output: Store, small: SmallArtifact) -> None:
    assert published(output, small)
    artifact = Artifact(output.place)
    assert artifact.place == f"{output.place}/{small.manifest.version}"
    assert artifact.manifest == small.manifest
    assert artifact.verify() == []
    assert latest(output) == {"version": small.manifest.version, "sequence": 1}
    assert staged_files(output, STAGED) == {}


def test_the_same_version_is_published_once(output: Store, small: SmallArtifact) -> None:
    assert published(output, small)
    again = small.manifest.model_copy(update={"inputs": "other"})
    fill(output, small.folder, f"{STAGED}/")
    assert not publish(output, STAGED, again)
    assert latest(output)["sequence"] == 1
    assert Artifact(output.place).manifest == small.manifest
    for inputs in (small.manifest.inputs, "other"):
        assert find_by_inputs(output, inputs) == small.manifest
    assert find_by_inputs(output, "third") is None


class DeathError(BaseException):
    """Of the process, at a point of the test's choice."""


class Dying:
    """A store whose process dies when so many changes were made; of a folder that is cleared then half is gone."""

    def __init__(self, store: Store, left: list[int]) -> None:
        self._store = store
        self._left = left
        self._lock = threading.Lock()

    def under(self, prefix: str) -> Dying:
        return Dying(self._store.under(prefix), self._left)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)
        if name not in ("put", "copy", "move", "delete", "clear", "swap"):
            return found

        def changing(*arguments: Any, **options: Any) -> Any:
            with self._lock:
                self._left[0] -= 1
                dies = self._left[0] < 0
            if dies:
                if name == "clear":
                    keys = sorted(self._store.sizes(*arguments))
                    self._store.delete(keys[: len(keys) // 2])
                raise DeathError
            return found(*arguments, **options)

        return changing


@pytest.mark.parametrize("before", ["nothing", "damaged"])
def test_a_publish_killed_at_any_point_is_completed_by_the_next_run(output: Store, small: SmallArtifact, before: str) -> None:
    version = small.manifest.version
    deaths = 0
    copies = len(small.manifest.files)  # of an object store; a death within one is like a death within another
    for changes in range(100):
        if not output.is_local and 5 < changes < copies - 1:
            continue
        output.clear("")
        if before == "damaged":
            fill(output, small.folder, f"{version}/")
            output.put(f"{version}/{MANIFEST}", small.manifest.to_bytes())
            output.delete([f"{version}/experts/math/config.json"])
        fill(output, small.folder, f"{STAGED}/")
        try:
            assert publish(Dying(output, [changes]), STAGED, small.manifest)
            break
        except DeathError:
            deaths += 1
        if output.children(version) and MANIFEST in output.children(version) and before == "nothing":
            assert Artifact(f"{output.place}@{version}").verify() == []
        found = find_by_inputs(output, small.manifest.inputs)
        if found is None:
            assert staged_files(output, STAGED).keys() >= small.manifest.files.keys(), "nothing has to be made again"
            publish(output, STAGED, small.manifest)
        else:
            make_latest(output, found.version)
        assert Artifact(output.place).verify() == []
        assert latest(output)["version"] == version
    assert deaths > (10 if not output.is_local else 4)


def test_a_damaged_version_is_replaced(output: Store, small: SmallArtifact) -> None:
    published(output, small)
    version = small.manifest.version
    output.delete([f"{version}/experts/math/config.json"])
    output.put(f"{version}/rubbish", b"half")
    assert find_by_inputs(output, small.manifest.inputs) is None
    assert published(output, small)
    assert Artifact(output.place).verify() == []
    assert latest(output) == {"version": version, "sequence": 1}


def test_a_flipped_byte_is_found_on_a_local_disk(tmp_path: Path, small: SmallArtifact) -> None:
    output = open_store(str(tmp_path / "output"))
    published(output, small)
    path = tmp_path / "output" / small.manifest.version / "pool-00001-of-00002.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)
    assert find_by_inputs(output, small.manifest.inputs) is None
    assert published(output, small)
    assert Artifact(output.place).verify() == []


def test_a_renamed_version_is_not_taken_for_done(output: Store, small: SmallArtifact) -> None:
    published(output, small)
    output.move(small.manifest.version, "kept")
    assert find_by_inputs(output, small.manifest.inputs) is None
    assert published(output, small)
    assert Artifact(output.place).manifest == small.manifest


def test_only_files_of_the_manifest_are_published(output: Store, small: SmallArtifact) -> None:
    output.put(f"{STAGED}/left over", b"of a killed run")
    output.put(f"{STAGED}/{MANIFEST}", b"of a killed publish")
    assert staged_files(output, STAGED) == {"left over": 15}
    assert published(output, small)
    assert Artifact(output.place).verify() == []


def test_a_staged_folder_that_lacks_files_is_not_published(output: Store, small: SmallArtifact) -> None:
    fill(output, small.folder, f"{STAGED}/")
    output.delete([f"{STAGED}/README.md"])
    output.put(f"{STAGED}/experts/math/config.json", b"{}")
    with pytest.raises(StoreError, match=rf"staged: 2 of {len(small.manifest.files)} files of version .* Run again"):
        publish(output, STAGED, small.manifest)
    assert small.manifest.version not in output.children()


def test_versions_are_found_without_reading_manifests_or_pools(gateway: Gateway, tmp_path: Path) -> None:
    output = open_store(f"s3://{BUCKET}/output")
    smalls = others(tmp_path, 4)
    for small in smalls:
        published(output, small)
    gateway.seen.clear()
    assert find_by_inputs(output, "unknown") is None
    assert [path for path, _ in gateway.seen if path.count("/") > 1] == []  # listings are of the bucket
    assert find_by_inputs(output, smalls[2].manifest.inputs) == smalls[2].manifest
    read = [path.split("output/")[1] for path, _ in gateway.seen if path.count("/") > 1]
    manifest = smalls[2].manifest
    alias = f"{WORK}/{manifest.inputs}.{manifest.version}.version"
    assert read == [LATEST, alias, f"{manifest.version}/{MANIFEST}"]


def test_versions_that_came_another_way_are_found_by_their_manifests(output: Store, small: SmallArtifact) -> None:
    fill(output, small.folder, f"{small.manifest.version}/")
    output.put(f"{small.manifest.version}/{MANIFEST}", small.manifest.to_bytes())
    output.put("notes.txt", b"mine")
    output.put("other/manifest.json", b"{")
    assert find_by_inputs(output, small.manifest.inputs) == small.manifest
    assert find_by_inputs(output, "other") is None


def test_an_output_that_is_not_there_has_no_versions(output: Store) -> None:
    check_output(output.place)
    assert find_by_inputs(output, "x") is None
    with pytest.raises(ArtifactError, match=r"latest.json is damaged"):
        latest(output)


def test_an_output_with_strange_content_is_refused(output: Store, small: SmallArtifact) -> None:
    output.put("thesis.tex", b"mine")
    with pytest.raises(OutputExistsError, match=r"is not a folder of artifacts: .* thesis.tex. Choose another output"):
        check_output(output.place)
    published(output, small)
    check_output(output.place)


def test_a_file_is_no_output(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputExistsError, match="is a file, not a folder"):
        check_output(str(tmp_path / "file"))


@pytest.mark.parametrize("content", [b"", b"{", b'{"version": "x"}', b'{"version": "x", "sequence": "y"}'])
def test_a_damaged_latest_is_mended(output: Store, small: SmallArtifact, content: bytes) -> None:
    published(output, small)
    output.put(LATEST, content)
    make_latest(output, small.manifest.version)
    assert latest(output) == {"version": small.manifest.version, "sequence": 1}


def in_parallel(bodies: list[Callable[[], object]]) -> None:
    failures: list[BaseException] = []

    def guarded(body: Callable[[], object]) -> None:
        try:
            body()
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=guarded, args=(body,)) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def check_all(output: Store, smalls: list[SmallArtifact]) -> None:
    """Every version is whole, one of them is the latest, and each took a sequence of its own."""
    for small in smalls:
        assert Artifact(f"{output.place}@{small.manifest.version}").verify() == []
    assert latest(output)["version"] in [small.manifest.version for small in smalls]
    assert latest(output)["sequence"] == len(smalls)


def test_runs_that_publish_at_once_leave_all_versions_and_one_latest(output: Store, tmp_path: Path) -> None:
    smalls = others(tmp_path, 4)
    in_parallel([partial(published, output, small, f"{WORK}/{n}/staged") for n, small in enumerate(smalls)])
    check_all(output, smalls)
    last = latest(output)["version"]
    make_latest(output, last)
    assert latest(output)["sequence"] == 4
    other = next(small.manifest.version for small in smalls if small.manifest.version != last)
    make_latest(output, other)
    assert latest(output) == {"version": other, "sequence": 5}


def test_runs_of_one_version_at_once_publish_it_once(output: Store, small: SmallArtifact) -> None:
    new: list[bool] = []

    def one(number: int) -> None:
        new.append(published(output, small, f"{WORK}/{number}/staged"))

    in_parallel([partial(one, number) for number in range(4)])
    assert sorted(new) == [False, False, False, True]
    assert Artifact(output.place).verify() == []
    assert latest(output)["sequence"] == 1


def test_without_a_lock_no_sequence_is_used_twice_either(gateway: Gateway) -> None:
    """A lease may be lost; what is written is conditional on what was read."""
    output = open_store(f"s3://{BUCKET}/output")
    in_parallel([partial(_point_latest, output, f"v{number}") for number in range(8)])
    assert latest(output)["sequence"] == 8


PUBLISHER = """
import sys
from pathlib import Path
from storage import leases
from storage.manifest import Manifest
from storage.publishing import publish
from storage.stores import open_store
leases.LEASE_POLL_S = 0.05
place, manifest, staged = sys.argv[1:]
sys.stdin.read()
publish(open_store(place), staged, Manifest.from_bytes(Path(manifest).read_bytes(), manifest))
"""


def test_processes_that_publish_at_once(output: Store, tmp_path: Path) -> None:
    smalls = others(tmp_path, 3)
    processes = []
    for number, small in enumerate(smalls):
        staged = f"{WORK}/{number}/staged"
        fill(output, small.folder, f"{staged}/")
        path = tmp_path / f"{number}.json"
        path.write_bytes(small.manifest.to_bytes())
        line = [sys.executable, "-c", PUBLISHER, output.place, str(path), staged]
        processes.append(subprocess.Popen(line, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()
        process.stdin = None
    for process in processes:
        _, told = process.communicate()
        assert process.returncode == 0, told
    check_all(output, smalls)


def test_the_latest_of_an_object_store_is_canonical(output: Store, small: SmallArtifact) -> None:
    published(output, small)
    data = output.get(LATEST)
    assert data == (json.dumps(json.loads(data), indent=2, sort_keys=True) + "\n").encode()
