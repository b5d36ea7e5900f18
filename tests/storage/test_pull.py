from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from serving.lookup import export
from serving.router import artifact_router
from storage import fetching
from storage.artifact import RANGE_BYTES, Artifact
from storage.errors import ArtifactError, OutputExistsError, StoreBusyError, StoreError
from storage.fetching import Part, cut
from storage.layout import DTYPES, MANIFEST
from storage.local_store import LocalStore
from storage.manifest import FileRecord, version_of
from storage.pull import pull
from storage.stores import Store, open_store
from tests.support.places import BUCKET, KINDS, filled
from tests.support.running import command
from tests.support.small_artifacts import EXPERTS, SmallArtifact, write_version
from tests.support.store_gateway import Gateway, Step

POOL = "pool-00001-of-00002.safetensors"


@pytest.fixture
def small(tmp_path: Path) -> SmallArtifact:
    """An artifact with its manifest in a local folder."""
    return write_version(tmp_path / "output", residue=True)


@pytest.fixture(params=KINDS)
def source(request: pytest.FixtureRequest, small: SmallArtifact, tmp_path: Path) -> Store:
    """The same, here or there."""
    if request.param == "s3":
        request.getfixturevalue("gateway")
        return filled(f"s3://{BUCKET}/team/{small.manifest.version}", small.folder)
    return filled(str(tmp_path / "source" / small.manifest.version), small.folder)


@pytest.fixture
def remote(gateway: Gateway, small: SmallArtifact) -> Store:
    return filled(f"s3://{BUCKET}/team/{small.manifest.version}", small.folder)


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("range_bytes", [1 << 24, 1000])
def test_a_pulled_artifact_is_the_same_byte_for_byte(
    source: Store, small: SmallArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, range_bytes: int
) -> None:
    monkeypatch.setattr(fetching, "RANGE_BYTES", range_bytes)
    told: list[tuple[int, int]] = []
    manifest = pull(source.place, tmp_path / "here" / "dest", progress=lambda here, total: told.append((here, total)))
    assert manifest == small.manifest
    assert content(tmp_path / "here" / "dest") == content(small.folder)
    assert names(tmp_path / "here") == ["dest"]
    total = sum(record.bytes for record in small.manifest.files.values())
    assert told[0] == (0, total)
    assert told[-1] == (total, total)
    assert [here for here, _ in told] == sorted(here for here, _ in told)


@pytest.mark.parametrize("expert", EXPERTS)
def test_one_expert_is_an_artifact_that_exports_the_same(
    source: Store, small: SmallArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expert: str
) -> None:
    monkeypatch.setattr(fetching, "RANGE_BYTES", 700)
    monkeypatch.setattr(fetching, "BRIDGED_BYTES", 50)
    manifest = pull(source.place, tmp_path / "dest", expert)
    alone = Artifact(tmp_path / "dest")
    assert alone.manifest == manifest
    assert alone.verify() == []
    assert (manifest.parent, [*manifest.experts], manifest.router) == (small.manifest.version, [expert], None)
    assert manifest.version == version_of(manifest.files) != small.manifest.version
    export(alone, expert, tmp_path / "one")
    export(Artifact(small.folder), expert, tmp_path / "all")
    assert content(tmp_path / "one") == content(tmp_path / "all")
    entries = sum(array.size for array in small.experts[expert].values())
    kept = 3 * len(small.experts[expert]["layers.0.up.weight"])
    assert (manifest.parameters.pool, manifest.parameters.residue, manifest.parameters.experts) == (entries, kept, entries)
    with pytest.raises(ArtifactError, match=r"it holds one expert alone. Pull the whole artifact"):
        artifact_router(alone)


def test_an_expert_pulled_on_from_a_pulled_one_is_the_same(small: SmallArtifact, tmp_path: Path) -> None:
    first = pull(str(small.folder), tmp_path / "first", "math")
    assert pull(str(tmp_path / "first"), tmp_path / "second", "math") == first
    assert content(tmp_path / "second") == content(tmp_path / "first")
    with pytest.raises(ArtifactError, match="has no expert 'code'; it has math"):
        pull(str(tmp_path / "first"), tmp_path / "third", "code")
    assert names(tmp_path) == ["first", "output", "second"]


def moved(gateway: Gateway, key: str) -> int:
    """Bytes that were asked for of a file."""
    bounds = [asked.removeprefix("bytes=").split("-") for asked in gateway.ranges(key) if asked]
    return sum(int(last) - int(first) + 1 for first, last in bounds)


def test_an_expert_moves_its_share_in_few_requests(gateway: Gateway, tmp_path: Path) -> None:
    small = write_version(tmp_path / "output", rows=1500, width=256)
    place = filled(f"s3://{BUCKET}/large", small.folder).place
    gateway.seen.clear()
    pull(place, tmp_path / "dest", "chinese")
    pools = [name for name in small.manifest.files if name.startswith("pool-")]
    share = sum(
        span.rows * 256 * DTYPES[record.dtype].size
        for record in small.manifest.tensors.values()
        for span in record.spans
        if "chinese" in span.experts
    )
    stored = sum(small.manifest.files[name].bytes for name in pools)
    assert share < 0.6 * stored
    assert share <= sum(moved(gateway, name) for name in pools) < 1.02 * share
    assert sum(len(gateway.ranges(name)) for name in pools) <= 8
    assert not any(gateway.ranges(name) for name in small.manifest.files if "experts/math" in name or "router" in name)


def test_the_ranges_of_parts() -> None:
    """Neighbours and those with small gaps together, large ones cut, none beyond what one request asks for."""
    step, gap = RANGE_BYTES, fetching.BRIDGED_BYTES
    parts = [Part(50, 10, "t", 7), Part(0, 40, "t", 100), Part(60 + gap, 5, "t", 0), Part(66 + 2 * gap, 2 * step + 1, "u", 0)]
    found = cut("f", parts)
    assert [(r.start, r.stop) for r in found] == [
        (0, 65 + gap),
        (66 + 2 * gap, 66 + 2 * gap + step),
        (66 + 2 * gap + step, 66 + 2 * gap + 2 * step),
        (66 + 2 * gap + 2 * step, 67 + 2 * gap + 2 * step),
    ]
    assert [p.offset for r in found for p in r.parts] == [100, 7, 0, 0, step, 2 * step]
    assert cut("f", [Part(3, 0, "t", 0)]) == []


PULL = (
    "import sys\nfrom storage import fetching\nfetching.RANGE_BYTES = fetching.BRIDGED_BYTES = 500\nfetching.PARALLEL = 2\n"
    "sys.argv = ['channel-merge', 'pull', *sys.argv[1:]]\nfrom flows.cli import main\nmain()"
)


@pytest.mark.parametrize("expert", [None, "math"])
def test_a_killed_pull_goes_on_where_it_was(
    remote: Store, gateway: Gateway, small: SmallArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expert: str | None
) -> None:
    dest = tmp_path / "here" / "dest"
    line = [sys.executable, "-c", PULL, remote.place, str(dest), *(["--expert", expert] if expert else [])]
    # a status that is retried holds the pull up, for longer than the test needs
    gateway.script = ["pass"] * 25 + [503] * 10_000
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        partial = wait_for_journal(dest, 5, process)
        process.send_signal(signal.SIGKILL)
    assert not dest.exists()
    gateway.script = []
    came = (partial / "journal").read_text().split("\n")[1:-1]
    assert len(came) >= 5
    done = [r for i, r in enumerate(planned(remote, expert, monkeypatch)) if str(i) in came]
    wanted = {(f"/{BUCKET}/team/{small.manifest.version}/{r.key}", f"bytes={r.start}-{r.stop - 1}") for r in done}
    assert wanted <= set(gateway.seen)
    gateway.seen.clear()
    again = subprocess.run(line, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert not wanted & set(gateway.seen)
    assert names(dest.parent) == ["dest"]
    assert Artifact(dest).verify() == []
    if expert is None:
        assert content(dest) == content(small.folder)
    else:
        export(Artifact(dest), expert, tmp_path / "one")
        export(Artifact(small.folder), expert, tmp_path / "all")
        assert content(tmp_path / "one") == content(tmp_path / "all")


def planned(source: Store, expert: str | None, monkeypatch: pytest.MonkeyPatch) -> list[fetching.Range]:
    from storage.selection import of_expert, whole_artifact

    monkeypatch.setattr(fetching, "RANGE_BYTES", 500)
    monkeypatch.setattr(fetching, "BRIDGED_BYTES", 500)
    artifact = Artifact(source)
    return list((of_expert(artifact, expert) if expert else whole_artifact(artifact)).plan.ranges)


def wait_for_journal(dest: Path, lines: int, process: subprocess.Popen[bytes]) -> Path:
    """The unfinished folder, once so many ranges came."""
    while process.poll() is None:
        for path in dest.parent.glob(f".{dest.name}.*.pull"):
            if (path / "journal").is_file() and (path / "journal").read_text().count("\n") > lines:
                return path
    raise AssertionError(process.communicate()[1].decode())


def interrupted(source: Store, dest: Path, monkeypatch: pytest.MonkeyPatch, expert: str | None = None, after: int = 9) -> Path:
    """A pull that ended in the middle of its ranges; the unfinished folder."""
    monkeypatch.setattr(fetching, "RANGE_BYTES", 500)
    monkeypatch.setattr(fetching, "PARALLEL", 1)
    added = fetching.Journal.add

    def end(journal: fetching.Journal, number: int) -> None:
        added(journal, number)
        if number == after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fetching.Journal, "add", end)
        with pytest.raises(KeyboardInterrupt):
            pull(source.place, dest, expert)
    (partial,) = [*dest.parent.glob(f".{dest.name}.*.pull"), *dest.glob("*.pull")]
    return partial


def test_what_was_changed_between_two_tries_is_fetched_again(
    source: Store, small: SmallArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a power cut, which may lose data that the journal says is there."""
    partial = interrupted(source, tmp_path / "dest", monkeypatch)
    (target, *_) = sorted(small.manifest.files)
    (partial / "files" / target).write_bytes(b"\0" * small.manifest.files[target].bytes)
    pull(source.place, tmp_path / "dest")
    assert content(tmp_path / "dest") == content(small.folder)


@pytest.mark.parametrize("damage", ["journal gone", "journal torn", "journal of nothing", "a file gone", "a file short"])
def test_a_damaged_unfinished_folder_is_no_obstacle(
    source: Store, small: SmallArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    partial = interrupted(source, tmp_path / "dest", monkeypatch)
    journal, readme = partial / "journal", partial / "files" / "README.md"
    match damage:
        case "journal gone":
            journal.unlink()
        case "journal torn":
            journal.write_bytes(journal.read_bytes()[:-1])
        case "journal of nothing":
            journal.write_bytes(b"\xff\0")
        case "a file gone":
            readme.unlink()
        case "a file short":
            readme.write_bytes(b"")
    pull(source.place, tmp_path / "dest")
    assert content(tmp_path / "dest") == content(small.folder)
    assert names(tmp_path).count("dest") == 1
    assert not partial.exists()


def flip(store: Store, key: str) -> None:
    raw = bytearray(store.get(key))
    raw[-3] ^= 1
    store.put(key, bytes(raw))


@pytest.mark.parametrize("expert", [None, "math"])
@pytest.mark.parametrize("key", ["experts/math/tokenizer.json", POOL])
def test_a_corrupted_file_is_refused_and_what_is_right_is_kept(
    source: Store, small: SmallArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, expert: str | None
) -> None:
    monkeypatch.setattr(fetching, "RANGE_BYTES", 1000)
    right = source.get(key)
    if key == POOL:  # one of the expert's own bytes, whatever the order of tensors
        info = Artifact(small.folder).pool["embed.weight"]
        span = next(s for s in small.manifest.tensors["embed.weight"].spans if s.experts == ("math",))
        changed = bytearray(right)
        changed[info.data.offset + span.start * info.width * 2] ^= 1  # type: ignore[attr-defined]
        source.put(key, bytes(changed))
    else:
        flip(source, key)
    label = "tensor embed.weight, rows from .* on" if key == POOL and expert else key
    with pytest.raises(ArtifactError, match=rf"is damaged: verify it, and publish it again: {label}: expected sha256"):
        pull(source.place, tmp_path / "dest", expert)
    assert not (tmp_path / "dest").exists()
    source.put(key, right)
    read: list[str] = []
    real = type(source).read

    def counted(store: Any, key: str, start: int, stop: int) -> bytes:
        if store.place == source.place and stop - start > 1:
            read.append(key)
        return real(store, key, start, stop)

    monkeypatch.setattr(type(source), "read", counted)
    pull(source.place, tmp_path / "dest", expert)
    assert Artifact(tmp_path / "dest").verify() == []
    fresh = [found for found in read if not found.endswith("safetensors") or found == key]
    assert set(fresh) == {key}, "only what was wrong is fetched again"


@pytest.mark.parametrize("expert", [None, "math"])
@pytest.mark.parametrize("key", ["experts/math/rows.safetensors", "pool.safetensors.index.json"])
def test_corrupted_indices_are_refused(source: Store, tmp_path: Path, key: str, expert: str | None) -> None:
    flip(source, key)
    with pytest.raises(ArtifactError, match=r"damaged"):
        pull(source.place, tmp_path / "dest", expert)
    assert not (tmp_path / "dest").exists()


@pytest.mark.parametrize("expert", [None, "math"])
def test_a_short_or_missing_file_is_refused(source: Store, tmp_path: Path, expert: str | None) -> None:
    right = source.get("experts/math/tokenizer.json")
    source.put("experts/math/tokenizer.json", right[:-5])
    with pytest.raises(ArtifactError, match=r"tokenizer.json: expected .* bytes from byte 0 on, got .*: it is cut short"):
        pull(source.place, tmp_path / "dest", expert)
    source.delete(["experts/math/tokenizer.json"])
    with pytest.raises(ArtifactError, match=r"tokenizer.json is missing. Publish the artifact again"):
        pull(source.place, tmp_path / "dest", expert)
    source.put("experts/math/tokenizer.json", right)
    pull(source.place, tmp_path / "dest", expert)
    assert Artifact(tmp_path / "dest").verify() == []


@pytest.mark.parametrize("step", ["cut", "hang up", 500])
def test_faults_on_the_way_are_gone_over(
    remote: Store, gateway: Gateway, small: SmallArtifact, tmp_path: Path, step: Step
) -> None:
    gateway.script = ["pass", "pass", "pass", step, "pass", step, step]
    pull(remote.place, tmp_path / "dest")
    assert content(tmp_path / "dest") == content(small.folder)


def test_a_store_that_goes_away_keeps_what_came(
    remote: Store, gateway: Gateway, small: SmallArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "RANGE_BYTES", 500)
    gateway.script = ["pass"] * 20 + [503] * 1000
    with pytest.raises(StoreError, match=r"s3://artifacts/team/.*cannot be reached"):
        pull(remote.place, tmp_path / "dest")
    gateway.script = []
    told: list[tuple[int, int]] = []
    pull(remote.place, tmp_path / "dest", progress=lambda here, total: told.append((here, total)))
    assert 0 < told[0][0] < told[0][1]
    assert content(tmp_path / "dest") == content(small.folder)


def test_what_is_there_is_not_pulled_again(remote: Store, gateway: Gateway, tmp_path: Path) -> None:
    first = pull(remote.place, tmp_path / "dest")
    one = pull(remote.place, tmp_path / "one", "code")
    gateway.seen.clear()
    assert pull(remote.place, tmp_path / "dest") == first
    assert pull(remote.place, tmp_path / "one", "code") == one
    assert {path.rpartition("/")[2] for path, _ in gateway.seen} == {MANIFEST}


def test_nothing_of_a_strangers_is_overwritten(small: SmallArtifact, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    (tmp_path / "file").write_text("")
    pull(str(small.folder), tmp_path / "one", "math")
    for dest in ("full", "file", "one"):
        before = content(tmp_path / dest)
        with pytest.raises(OutputExistsError, match=r"exists and is not an empty folder. Choose another place"):
            pull(str(small.folder), tmp_path / dest)
        assert content(tmp_path / dest) == before
    with pytest.raises(OutputExistsError, match="exists and is not an empty folder"):
        pull(str(small.folder), tmp_path / "one", "code")
    assert names(tmp_path) == ["file", "full", "one", "output"]


def test_a_damaged_copy_is_not_taken_for_done(small: SmallArtifact, tmp_path: Path) -> None:
    pull(str(small.folder), tmp_path / "dest")
    (tmp_path / "dest" / "README.md").write_text("x")
    with pytest.raises(OutputExistsError, match=r"holds version .*, damaged. Remove it and pull again: README.md: expected"):
        pull(str(small.folder), tmp_path / "dest")


@pytest.mark.parametrize("expert", [None, "code"])
def test_an_empty_folder_is_filled(source: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expert: str | None) -> None:
    """It may be somebody's working directory; so it stays the same folder, even over two tries."""
    dest = tmp_path / "dest"
    dest.mkdir()
    identity = dest.stat().st_ino
    interrupted(source, dest, monkeypatch, expert, after=2)
    pull(source.place, dest, expert)
    assert dest.stat().st_ino == identity
    assert Artifact(dest).verify() == []
    assert [name for name in names(dest) if name.startswith(".")] == []


@pytest.mark.parametrize("expert", [None, "code"])
@pytest.mark.parametrize("is_there", [True, False])
def test_a_pull_killed_while_it_is_put_in_place_is_completed(
    small: SmallArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expert: str | None, is_there: bool
) -> None:
    dest = tmp_path / "here" / "dest"
    renamed = Path.rename
    for deaths in range(20):
        if is_there:
            dest.mkdir(parents=True, exist_ok=True)
        left = [deaths]

        def dying(path: Path, target: Path, left: list[int] = left) -> Path:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return renamed(path, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", dying)
            try:
                pull(str(small.folder), dest, expert)
            except KeyboardInterrupt:
                continue
        break
    assert deaths >= 1
    assert Artifact(dest).verify() == []
    assert names(dest.parent) == ["dest"]


def test_a_second_pull_to_the_same_place_is_refused(
    small: SmallArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = interrupted(LocalStore(small.folder), tmp_path / "dest", monkeypatch)
    with FileLock(partial / "lock"), pytest.raises(StoreBusyError, match=r"another pull is filling .* Wait for it to end"):
        pull(str(small.folder), tmp_path / "dest")
    pull(str(small.folder), tmp_path / "dest")
    assert Artifact(tmp_path / "dest").verify() == []


def test_pulls_at_once_leave_one_whole_artifact(small: SmallArtifact, tmp_path: Path) -> None:
    outcomes: list[str] = []

    def one() -> None:
        try:
            pull(str(small.folder), tmp_path / "dest")
            outcomes.append("done")
        except StoreBusyError:
            outcomes.append("busy")

    threads = [threading.Thread(target=one) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 6
    assert "done" in outcomes
    assert Artifact(tmp_path / "dest").verify() == []
    assert names(tmp_path) == ["dest", "output"]


def test_a_hostile_manifest_writes_nothing(small: SmallArtifact, tmp_path: Path) -> None:
    (small.folder.parent / "outside").write_text("x")
    files = {**small.manifest.files, "../outside": FileRecord(bytes=1, sha256="0" * 64)}
    (small.folder / MANIFEST).write_bytes(small.manifest.model_copy(update={"files": files}).to_bytes())
    with pytest.raises(ArtifactError, match=r"file '../outside': expected a relative path inside the artifact"):
        pull(str(small.folder), tmp_path / "dest")
    assert names(tmp_path) == ["output"]


def test_a_full_disk_is_told_before_it_is_filled(small: SmallArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 10

    monkeypatch.setattr("shutil.disk_usage", lambda *_: Usage)
    total = sum(record.bytes for record in small.manifest.files.values())
    with pytest.raises(StoreError, match=rf"{total} bytes are to come, there is room for 10. Free space there and run again"):
        pull(str(small.folder), tmp_path / "dest")


def test_a_write_that_fails_says_what_is_kept(small: SmallArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StoreError, match=r"No space left on device. Free space there, .* what came is kept"):
        pull(str(small.folder), tmp_path / "dest")


def test_the_command(remote: Store, small: SmallArtifact, tmp_path: Path) -> None:
    """pull, then the other verbs on what was pulled and on the URL itself."""
    done = command("pull", remote.place, tmp_path / "dest")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        f"version {small.manifest.version} is at {tmp_path / 'dest'}: {len(small.manifest.files)} files, "
    )
    told = command("pull", remote.place, tmp_path / "one", "--expert", "math", "--json")
    found = json.loads(told.stdout)
    assert (found["parent"], found["experts"], found["path"]) == (small.manifest.version, ["math"], str(tmp_path / "one"))
    assert command("verify", remote.place).stdout.startswith("ok: ")
    assert command("verify", tmp_path / "one").stdout.startswith("ok: ")
    assert f"pulled from version {small.manifest.version}" in command("inspect", tmp_path / "one").stdout
    for place, target in ((remote.place, "there"), (str(tmp_path / "one"), "here")):
        assert command("export", place, "math", tmp_path / target).returncode == 0
    assert content(tmp_path / "there") == content(tmp_path / "here")
    assert json.loads(command("route", remote.place, "hello", "--json").stdout)["expert"] in EXPERTS
    refused = command("pull", remote.place, tmp_path / "x", "--expert", "poetry", "--json")
    assert refused.returncode == 2
    assert "has no expert 'poetry'; it has chinese, code, math" in json.loads(refused.stdout)["error"]
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("place", ["here", "there"])
def test_pull_imports_no_heavy_packages(small: SmallArtifact, remote: Store, tmp_path: Path, place: str) -> None:
    heavy = {"torch", "dask", "distributed", "sklearn", "transformers", "prefect", "dask_ml", "numba", "zarr"}
    program = (
        "import sys\nsys.argv = ['channel-merge', *sys.argv[1:]]\nfrom flows.cli import app\n"
        f"app(standalone_mode=False)\nprint('HEAVY', sorted(set(sys.modules) & set({sorted(heavy)!r})))"
    )
    source = str(small.folder) if place == "here" else remote.place
    line = [sys.executable, "-c", program, "pull", source, str(tmp_path / "dest"), "--expert", "math"]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def test_a_prefix_is_pulled_from_like_an_output(gateway: Gateway, small: SmallArtifact, tmp_path: Path) -> None:
    version = small.manifest.version
    output = open_store(f"s3://{BUCKET}/output")
    for key, data in content(small.folder).items():
        output.put(f"{version}/{key}", data)
    output.put("latest.json", json.dumps({"version": version, "sequence": 3}).encode())
    assert pull(output.place, tmp_path / "a").version == pull(f"{output.place}@{version}", tmp_path / "b").version == version
