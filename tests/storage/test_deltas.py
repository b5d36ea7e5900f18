from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from flows.run import Outcome
from pipeline.kernels.bits import to_float
from storage.arrays import COMPLETE, ArrayGroup, ArraySpec
from storage.deltas import difference, restored, row_digests
from storage.errors import IncompleteStoreError
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


def small_group(path: Path) -> ArrayGroup:
    group = ArrayGroup(path)
    group.create({"a": ArraySpec((10, 3), "int16", 4, {})}, {})
    return group


def test_zero_chunks_are_written_and_listed(tmp_path: Path) -> None:
    group = small_group(tmp_path / "g")
    chunks = group.write("a", 0, np.zeros((8, 3), np.int16))
    chunks |= group.write("a", 8, np.ones((2, 3), np.int16))
    assert sorted(chunks) == ["a/c.0.0", "a/c.1.0", "a/c.2.0"]
    group.finish(chunks, {})
    assert group.missing_chunks() == []
    np.testing.assert_array_equal(group.read("a", 3, 9), [[0] * 3] * 5 + [[1] * 3])


def test_a_lost_chunk_is_an_error_not_zeros(tmp_path: Path) -> None:
    group = small_group(tmp_path / "g")
    group.finish(group.write("a", 0, np.ones((10, 3), np.int16)), {})
    (tmp_path / "g" / "a" / "c.1.0").unlink()
    assert group.missing_chunks() == ["a/c.1.0"]
    with pytest.raises(IncompleteStoreError, match=r"chunk a/c.1.0 is missing .* Delete the folder"):
        group.read("a", 0, 10)
    np.testing.assert_array_equal(group.read("a", 0, 4), np.ones((4, 3)))


@pytest.mark.parametrize("position", [0, 10, -1])
def test_a_flipped_bit_in_a_chunk_is_an_error(tmp_path: Path, position: int) -> None:
    group = small_group(tmp_path / "g")
    group.finish(group.write("a", 0, np.arange(30, dtype=np.int16).reshape(10, 3)), {})
    path = tmp_path / "g" / "a" / "c.0.0"
    raw = bytearray(path.read_bytes())
    raw[position] ^= 4
    path.write_bytes(raw)
    with pytest.raises(IncompleteStoreError, match=r"chunk a/c.0.0 cannot be decoded \(its checksum differs\). Delete"):
        group.read("a", 0, 4)


def test_partial_chunks_are_refused(tmp_path: Path) -> None:
    group = small_group(tmp_path / "g")
    with pytest.raises(ValueError, match="not whole chunks of 4 rows"):
        group.write("a", 0, np.ones((3, 3), np.int16))
    with pytest.raises(ValueError, match="not whole chunks of 4 rows"):
        group.write("a", 2, np.ones((4, 3), np.int16))


def test_an_unfinished_group_is_not_complete(tmp_path: Path) -> None:
    group = small_group(tmp_path / "g")
    assert not group.complete
    with pytest.raises(IncompleteStoreError, match="is not complete"):
        group.read("a", 0, 1)


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
