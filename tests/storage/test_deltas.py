from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from flows.run import Outcome
from pipeline.kernels.bits import to_float
from storage.arrays import COMPLETE, ArrayGroup, ArraySpec, ChunkDigests
from storage.deltas import difference, restored, row_digests
from storage.errors import IncompleteStoreError
from storage.local_store import LocalStore
from tests.support.reference import as_float64
from tests.support.running import merged
from tests.support.tiny_experts import NAMES, Family


@given(st.data(), st.sampled_from([np.uint8, np.uint16, np.uint32, np.uint64]))
def test_differences_are_lossless_for_every_bit_pattern(data: st.DataObject, dtype: type) -> None:
    expert, base = data.draw(arrays(dtype, (3, 4))), data.draw(arrays(dtype, (3, 4)))
    stored = difference(expert, base)
    assert stored.dtype.kind == "i"
    np.testing.assert_array_equal(restored(base, stored), expert)


def test_digests_tell_rows_apart() -> None:
    rows = np.array([[1, 2], [1, 2], [2, 1]], np.uint16)
    found = row_digests(rows, "BF16")
    assert found.shape == (3, 16)
    assert (found[0] == found[1]).all()
    assert (found[0] != found[2]).any()
    assert (found != row_digests(rows, "F16")).any(axis=1).all()


def expert_groups(family: Family, outcome: Outcome) -> dict[str, Path]:
    deltas = family.folder.parent / "deltas" / outcome.manifest.base["id"]
    return {name: deltas / outcome.manifest.experts[name].id for name in NAMES}


def test_the_store_is_readable_by_plain_zarr(family: Family) -> None:
    """Array names are tensor names, rows are output channels, and delta norms are those of the checkpoints."""
    groups = expert_groups(family, merged(family.recipe()))
    for name, path in groups.items():
        group = zarr.open_group(path, mode="r")
        for tensor, weight in family.experts[name].items():
            array = group[tensor]
            assert isinstance(array, zarr.Array)
            assert array.attrs["encoding"] == "bits"
            base = family.base[tensor]
            origin = np.zeros(weight.shape, np.uint16)
            origin[: len(base)] = base.view(dtype=torch.int16).numpy().view(np.uint16)
            bits = origin.reshape(array.shape) + np.asarray(array[:]).view(np.uint16)
            np.testing.assert_array_equal(to_float(bits, "BF16").numpy().reshape(weight.shape), weight.float().numpy())
        statistics = json.loads((path / COMPLETE).read_bytes())["statistics"]["model.layers.1.mlp.up_proj.weight"]
        delta = as_float64(family.experts[name]["model.layers.1.mlp.up_proj.weight"]) - as_float64(
            family.base["model.layers.1.mlp.up_proj.weight"]
        )
        assert statistics["delta_norm"] == pytest.approx(np.linalg.norm(delta), rel=1e-9)
        assert statistics["largest"] == pytest.approx(np.abs(delta).max(), rel=1e-6)
        assert statistics["unchanged_share"] == pytest.approx((delta == 0).mean(), abs=1e-12)


SPEC = ArraySpec((10, 3), "int16", 4, {})


def small_group(path: Path) -> ArrayGroup:
    return ArrayGroup(LocalStore(path))


def crc32c(data: bytes) -> int:
    """The checksum by its definition, bit by bit (RFC 3720, appendix B.4)."""
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


def filled(group: ArrayGroup, start: int, values: Any) -> ChunkDigests:
    return group.write({"a": (SPEC, start, np.asarray(values, np.int16))})


def test_zero_chunks_are_written_and_listed(tmp_path: Path) -> None:
    group = small_group(tmp_path / "g")
    chunks = filled(group, 0, np.zeros((8, 3)))
    chunks |= filled(group, 8, np.ones((2, 3)))
    assert sorted(chunks) == ["a/c.0.0", "a/c.1.0", "a/c.2.0"]
    for key, (size, digest) in chunks.items():
        content = (tmp_path / "g" / key).read_bytes()
        assert len(content) == size
        assert f"{crc32c(content[:-4]):08x}" == digest
    group.finish(chunks, ["a"], {}, {})
    assert group.missing(chunks) == set()
    np.testing.assert_array_equal(group.read("a", SPEC, 3, 9), [[0] * 3] * 5 + [[1] * 3])


def test_a_lost_chunk_is_an_error_not_zeros(tmp_path: Path) -> None:
    group = small_group(tmp_path / "g")
    chunks = filled(group, 0, np.ones((10, 3)))
    group.finish(chunks, ["a"], {}, {})
    (tmp_path / "g" / "a" / "c.1.0").unlink()
    assert group.missing(chunks) == {"a/c.1.0"}
    with pytest.raises(IncompleteStoreError, match=r"chunk a/c.1.0 is missing. Run again: it is made anew") as caught:
        group.read("a", SPEC, 0, 10)
    assert pickle.loads(pickle.dumps(caught.value)).damaged == (str(tmp_path / "g"), "a/c.1.0")
    np.testing.assert_array_equal(group.read("a", SPEC, 0, 4), np.ones((4, 3)))


@pytest.mark.parametrize("position", [0, 10, -5, -1])
def test_a_flipped_bit_in_a_chunk_is_an_error(tmp_path: Path, position: int) -> None:
    group = small_group(tmp_path / "g")
    filled(group, 0, np.arange(30).reshape(10, 3))
    path = tmp_path / "g" / "a" / "c.0.0"
    raw = bytearray(path.read_bytes())
    raw[position] ^= 4
    path.write_bytes(raw)
    with pytest.raises(IncompleteStoreError, match=r"chunk a/c.0.0 cannot be decoded \(its checksum differs\). Run again"):
        group.read("a", SPEC, 0, 4)


@pytest.mark.parametrize("left", [0, 3, 20])
def test_a_chunk_cut_short_is_an_error(tmp_path: Path, left: int) -> None:
    group = small_group(tmp_path / "g")
    filled(group, 0, np.arange(30).reshape(10, 3))
    path = tmp_path / "g" / "a" / "c.0.0"
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(IncompleteStoreError, match=r"chunk a/c.0.0 cannot be decoded"):
        group.read("a", SPEC, 0, 4)


def test_partial_chunks_are_refused(tmp_path: Path) -> None:
    group = small_group(tmp_path / "g")
    with pytest.raises(ValueError, match="not whole chunks of 4 rows"):
        filled(group, 0, np.ones((3, 3)))
    with pytest.raises(ValueError, match="not whole chunks of 4 rows"):
        filled(group, 2, np.ones((4, 3)))


def test_an_unfinished_group_has_no_record(tmp_path: Path) -> None:
    group = small_group(tmp_path / "g")
    chunks = filled(group, 0, np.ones((10, 3)))
    assert group.record() is None
    group.finish(chunks, ["a"], {}, {"more": 1})
    found = group.record()
    assert found is not None
    assert found["more"] == 1


def test_an_unfinished_or_damaged_group_is_ingested_anew(family: Family) -> None:
    first = merged(family.recipe())
    groups = expert_groups(family, first)
    (groups["math"] / COMPLETE).unlink()
    chunk = next((groups["code"] / "model.norm.weight").glob("c.*"))
    chunk = next(path for path in [chunk, *chunk.rglob("*")] if path.is_file())
    chunk.unlink()
    second = merged(family.recipe(**{"merge.groups": 3}))
    assert second.manifest.moved["ingest read"] > 0
    assert (groups["math"] / COMPLETE).is_file()
    assert chunk.is_file()
