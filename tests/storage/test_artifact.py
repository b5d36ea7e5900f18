from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from serving.lookup import export
from serving.router import artifact_router, load_router
from storage.artifact import WORK, Artifact, latest, resolve
from storage.atomic import canonical_json
from storage.digests import digest_of
from storage.errors import ArtifactError, StoreError
from storage.layout import LATEST, MANIFEST
from storage.manifest import FileRecord, Manifest, version_of
from storage.stores import Store, open_store
from tests.support.places import BUCKET, fill
from tests.support.small_artifacts import EXPERTS, SmallArtifact, recorded, write_files, write_version
from tests.support.store_gateway import Gateway

POOL = "pool-00001-of-00002.safetensors"


@pytest.fixture
def small(tmp_path: Path) -> SmallArtifact:
    return write_files(tmp_path / "small", residue=True)


def put_version(output: Store, small: SmallArtifact) -> Store:
    """A version in an output, whose latest it is."""
    version = small.manifest.version
    fill(output, small.folder, f"{version}/")
    output.put(f"{version}/{MANIFEST}", small.manifest.to_bytes())
    output.put(LATEST, canonical_json({"version": version, "sequence": 1}))
    return output.under(version)


@pytest.fixture
def version(output: Store, small: SmallArtifact) -> Store:
    """The small artifact in the output."""
    return put_version(output, small)


def test_a_fresh_artifact_verifies(version: Store) -> None:
    assert Artifact(version.place).verify() == []


def test_every_changed_byte_is_found(tmp_path: Path) -> None:
    """In every file, the first, a middle and the last byte; the manifest refuses to open."""
    small = write_version(tmp_path / "output", residue=True)
    files = sorted(path for path in small.folder.rglob("*") if path.is_file())
    assert len(files) > 12
    for path in files:
        original = path.read_bytes()
        for position in {0, len(original) // 2, len(original) - 1}:
            changed = bytearray(original)
            changed[position] ^= 1
            path.write_bytes(changed)
            if path.name == MANIFEST:
                with pytest.raises(ArtifactError, match=r"damaged|was changed|expected artifact format|names what"):
                    Artifact(small.folder)
            else:
                name = path.relative_to(small.folder).as_posix()
                (problem,) = Artifact(small.folder).verify()
                assert problem.startswith(f"{name}: expected sha256")
        path.write_bytes(original)
    assert Artifact(small.folder).verify() == []


def test_every_byte_of_the_manifest_counts(small: SmallArtifact) -> None:
    original = small.manifest.to_bytes()
    for position in range(0, len(original), 97):
        changed = bytearray(original)
        changed[position] ^= 2
        with pytest.raises(ArtifactError):
            Manifest.from_bytes(bytes(changed), "m")


def test_missing_changed_short_and_foreign_files_are_found(version: Store) -> None:
    version.delete(["experts/math/config.json"])
    version.put("stray.txt", b"x")
    version.put("experts/math/more/stray.txt", b"x")
    pool = version.get(POOL)
    version.put(POOL, pool[:-1])
    version.put("router/router.json", version.get("router/router.json").replace(b"chinese", b"Chinese"))
    problems = Artifact(version.place).verify()
    assert [problem.split(" ")[0].rstrip(":") for problem in problems] == [
        "experts/math/config.json", POOL, "router/router.json", "experts/math/more/stray.txt", "stray.txt",
    ]  # fmt: skip
    assert "experts/math/config.json is missing" in problems
    assert f"{POOL}: expected {len(pool)} bytes, got {len(pool) - 1}" in problems
    assert [problem for problem in problems if problem.startswith("router/router.json: expected sha256")]
    assert "stray.txt is not part of the artifact" in problems


def test_what_vanishes_while_it_is_verified_is_missing(version: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = Artifact(version.place)
    listed = artifact.store.sizes()
    version.delete(["README.md"])
    monkeypatch.setattr(type(version), "sizes", lambda *_: listed)
    assert artifact.verify() == ["README.md is missing"]


def test_a_folder_without_manifest_is_refused(version: Store, output: Store) -> None:
    version.delete([MANIFEST])
    for place in (version.place, output.place):
        with pytest.raises(ArtifactError, match=r"is not an artifact: it has no manifest.json"):
            Artifact(place)


def test_work_is_never_an_artifact(output: Store, small: SmallArtifact) -> None:
    hidden = put_version(output.under(WORK), small)
    with pytest.raises(ArtifactError, match="is not an artifact"):
        Artifact(hidden.place)


def test_an_artifact_is_named_in_three_ways(version: Store, output: Store, small: SmallArtifact) -> None:
    named = f"{output.place}@{small.manifest.version}"
    for location in (output.place, named, version.place):
        assert resolve(location) == version
        assert Artifact(location).place == version.place
    with pytest.raises(ArtifactError, match="it has no manifest"):
        resolve(f"{output.place}@0123")


def test_places_that_are_no_artifacts(tmp_path: Path, gateway: Gateway) -> None:
    with pytest.raises(ArtifactError, match="no such directory"):
        resolve(str(tmp_path / "nowhere"))
    with pytest.raises(ArtifactError, match=f"^s3://{BUCKET}/nowhere is not an artifact"):
        resolve(f"s3://{BUCKET}/nowhere")
    with pytest.raises(StoreError, match="holds a user") as caught:
        resolve("s3://key:never-shown@bucket/x")
    assert "never-shown" not in str(caught.value)


def test_a_whole_bucket_can_be_an_output(gateway: Gateway, small: SmallArtifact) -> None:
    place = put_version(open_store(f"s3://{BUCKET}"), small).place
    assert resolve(f"s3://{BUCKET}").place == place
    assert resolve(f"s3://{BUCKET}@{small.manifest.version}").place == place


def test_a_prefix_with_an_at_sign_is_a_prefix(gateway: Gateway, small: SmallArtifact) -> None:
    put_version(open_store(f"s3://{BUCKET}/by@me"), small)
    for location in (f"s3://{BUCKET}/by@me", f"s3://{BUCKET}/by@me@{small.manifest.version}"):
        assert resolve(location).place == f"s3://{BUCKET}/by@me/{small.manifest.version}"


def test_an_unreachable_store_is_no_finding(gateway: Gateway, small: SmallArtifact) -> None:
    artifact = Artifact(put_version(open_store(f"s3://{BUCKET}/output"), small).place)
    gateway.script = [500] * 1000
    with pytest.raises(StoreError, match=r"s3://artifacts/output/.*cannot be reached"):
        artifact.verify()
    with pytest.raises(StoreError, match=r"s3://artifacts/output.*cannot be reached"):
        Artifact(f"s3://{BUCKET}/output")


def test_a_remote_artifact_has_no_path(version: Store) -> None:
    artifact = Artifact(version.place)
    if version.is_local:
        assert str(artifact.path) == version.place
    else:
        with pytest.raises(ArtifactError, match=r"^s3://.* is not a folder of this machine. Pull it first: channel-merge pull"):
            _ = artifact.path


def test_a_damaged_latest_is_explained(version: Store, output: Store) -> None:
    output.put(LATEST, b'{"version": "../../etc"}')
    with pytest.raises(ArtifactError, match=r"latest.json is damaged .* Name a version"):
        Artifact(output.place)
    with pytest.raises(ArtifactError, match=r"latest.json is damaged"):
        latest(output)


def test_experts_are_rebuilt_from_wherever_the_artifact_lies(version: Store, small: SmallArtifact, tmp_path: Path) -> None:
    """Against the tensors the artifact was made from by hand."""
    artifact = Artifact(version.place)
    for name in EXPERTS:
        files = export(artifact, name, tmp_path / name)
        assert [path.name for path in files] == ["config.json", "model.safetensors", "tokenizer.json"]
        assert json.loads((tmp_path / name / "config.json").read_bytes()) == {"name": name}
        found = load_file(tmp_path / name / "model.safetensors")
        renamed = small.manifest.experts[name].renamed
        assert found.keys() == {renamed.get(tensor, tensor) for tensor in small.experts[name]}
        for tensor, array in small.experts[name].items():
            own = found[renamed.get(tensor, tensor)]
            assert (own.dtype, own.shape) == (array.dtype, array.shape)
            assert own.tobytes() == array.tobytes()


def test_queries_are_routed_from_wherever_the_artifact_lies(version: Store, small: SmallArtifact) -> None:
    router = artifact_router(Artifact(version.place))
    beside = load_router(small.folder / "router")
    np.testing.assert_array_equal(router.scorer.logits(["a question"]), beside.scorer.logits(["a question"]))
    assert sum(router.route("a question").values()) == pytest.approx(1)


def test_rows_are_gathered_in_any_order(version: Store) -> None:
    artifact = Artifact(version.place)
    name = "layers.0.up.weight"
    rows = artifact.manifest.tensors[name].rows
    whole = artifact.rows(name, np.arange(rows, dtype=np.int32))
    mixed = np.array([rows - 1, 0, 3, 3, 1], np.int32)
    np.testing.assert_array_equal(artifact.rows(name, mixed), whole[mixed])
    with pytest.raises(ArtifactError, match=f"a row index lies outside its {rows} rows"):
        artifact.rows(name, np.array([rows], np.int32))


def test_a_manifest_that_names_another_version_is_found(version: Store, small: SmallArtifact) -> None:
    version.put(MANIFEST, small.manifest.model_copy(update={"version": "0" * 16}).to_bytes())
    assert any("its files make version" in problem for problem in Artifact(version.place).verify())


def test_an_expert_without_all_its_tensors_is_not_exported(tmp_path: Path) -> None:
    """The manifest vouches for its rows; the tensors of the pool say otherwise."""
    small = write_version(tmp_path / "output")
    path = small.folder / "experts" / "math" / "rows.safetensors"
    rows = load_file(path)
    rows.pop("norm.weight")
    save_file(rows, path)
    files = recorded(small.folder)
    manifest = small.manifest.model_copy(update={"files": files, "version": version_of(files)})
    (small.folder / MANIFEST).write_bytes(manifest.to_bytes())
    with pytest.raises(ArtifactError, match=r"rows.safetensors is missing or damaged .*expected rows of 4 tensors, got 3"):
        export(Artifact(small.folder), "math", tmp_path / "x")


def test_foreign_links_are_found(tmp_path: Path) -> None:
    small = write_version(tmp_path / "output")
    (small.folder / "link").symlink_to("/tmp", target_is_directory=True)
    assert Artifact(small.folder).verify() == ["link is not part of the artifact"]


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff" * 100])
@pytest.mark.parametrize(
    "name",
    ["pool.safetensors.index.json", "experts/math/rows.safetensors", POOL, "experts/math/residue.safetensors"],
)
def test_reading_a_damaged_artifact_is_explained(version: Store, tmp_path: Path, name: str, content: bytes) -> None:
    version.put(name, content)
    with pytest.raises(ArtifactError, match=r"is missing or damaged .* Pull or build the artifact again"):
        export(Artifact(version.place), "math", tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "name", ["pool.safetensors.index.json", "experts/math/rows.safetensors", POOL, "experts/math/config.json"]
)
def test_reading_an_incomplete_artifact_is_explained(version: Store, tmp_path: Path, name: str) -> None:
    version.delete([name])
    with pytest.raises(ArtifactError, match=r"is missing or damaged .* Pull or build the artifact again"):
        export(Artifact(version.place), "math", tmp_path / "x")


def test_a_damaged_router_is_explained(version: Store) -> None:
    version.put("router/router.json", b"{")
    with pytest.raises(ArtifactError, match=r"its router is damaged .* Pull or build the artifact again"):
        artifact_router(Artifact(version.place))


def test_an_artifact_without_router_says_so(output: Store, tmp_path: Path) -> None:
    version = put_version(output, write_files(tmp_path / "plain", router=False))
    with pytest.raises(ArtifactError, match=r"has no router. Build it with router.kind: linear"):
        artifact_router(Artifact(version.place))


@pytest.mark.parametrize(
    "name",
    [
        "../x", "/etc/x", "a/../../x", ".", "..", "a//b", "a/", "", "a/./b", "a\\b", "a\0b", MANIFEST, "README.md/x", "n" * 256,
    ],
)  # fmt: skip
def test_names_that_lead_out_of_the_folder_are_refused(small: SmallArtifact, name: str) -> None:
    files = {**small.manifest.files, name: FileRecord(bytes=0, sha256="0" * 64)}
    data = small.manifest.model_copy(update={"files": files}).to_bytes()
    with pytest.raises(ArtifactError, match=r"^m names what no artifact holds. Use an artifact you trust: file '.*': "):
        Manifest.from_bytes(data, "m")


@pytest.mark.parametrize("name", ["../math", "a/b", "..", ""])
def test_experts_whose_names_are_no_folders_are_refused(small: SmallArtifact, name: str) -> None:
    experts = {name: small.manifest.experts["math"]}
    with pytest.raises(ArtifactError, match=r"expert '.*': expected a folder's name"):
        Manifest.from_bytes(small.manifest.model_copy(update={"experts": experts}).to_bytes(), "m")


def test_artifacts_of_format_3_are_read(tmp_path: Path) -> None:
    """As an earlier release wrote them: the same fields without ``parent``."""
    small = write_version(tmp_path / "output")
    fields = small.manifest.model_dump(mode="json", exclude={"parent"}) | {"format": 3}
    data = canonical_json({**fields, "digest": digest_of(fields)})
    (small.folder / MANIFEST).write_bytes(data)
    artifact = Artifact(small.folder)
    assert (artifact.manifest.format, artifact.manifest.parent) == (3, None)
    assert artifact.manifest.to_bytes() == data
    assert artifact.verify() == []


@pytest.mark.parametrize("number", [2, 5, None])
def test_other_formats_are_refused(small: SmallArtifact, number: int | None) -> None:
    fields = small.manifest.model_dump(mode="json") | {"format": number}
    with pytest.raises(ArtifactError, match=f"m: expected artifact format 3 or 4, got {number}. Use a matching release"):
        Manifest.from_bytes(canonical_json({**fields, "digest": digest_of(fields)}), "m")
