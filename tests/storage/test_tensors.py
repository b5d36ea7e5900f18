"""Tensors as rows, however they are stored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from storage.errors import CheckpointError
from storage.files import LocalFile
from storage.layout import ENTRIES, as_rows
from storage.tensors import FileRows, TensorInfo, keeping_matrix, padded_rows


def stored(path: Path, values: np.ndarray, axis: int) -> TensorInfo:
    """fp32 values behind eight bytes of something else."""
    path.write_bytes(b"12345678" + values.astype("<f4").tobytes())
    return TensorInfo("t", "F32", values.shape, FileRows(LocalFile(path, path.stat().st_size), 8), axis)


def numbers(info: TensorInfo, start: int, stop: int) -> np.ndarray:
    return info.read(start, stop).view("<f4")


@pytest.mark.parametrize(
    ("shape", "axis", "rows"),
    [
        ((6, 4), 0, lambda v: v),
        ((4, 6), 1, lambda v: v.T),
        ((3, 5, 4), 1, lambda v: v.reshape(15, 4)),
        ((3, 4, 5), 2, lambda v: v.swapaxes(1, 2).reshape(15, 4)),
        ((3, 5, 4), 0, lambda v: v.reshape(3, 20)),
        ((7,), 0, lambda v: v[None]),
        ((7,), ENTRIES, lambda v: v[:, None]),
        ((), 0, lambda v: v.reshape(1, 1)),
    ],
)
def test_rows_are_output_channels(tmp_path: Path, shape: tuple[int, ...], axis: int, rows: object) -> None:
    values = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)
    expected = rows(values)  # type: ignore[operator]
    info = stored(tmp_path / "x", values, axis)
    assert (info.rows, info.width) == expected.shape == as_rows(shape, axis)
    for start in range(info.rows):
        for stop in range(start + 1, info.rows + 1):
            np.testing.assert_array_equal(numbers(info, start, stop), expected[start:stop])


def test_a_matrix_is_kept_while_it_is_cut_and_not_beyond(tmp_path: Path) -> None:
    """Read once for all its columns; what the file holds later is read later."""
    values = np.arange(24, dtype=np.float32).reshape(4, 6)
    info = stored(tmp_path / "x", values, 1)
    with keeping_matrix():
        np.testing.assert_array_equal(numbers(info, 0, 2), values.T[:2])
        (tmp_path / "x").unlink()
        np.testing.assert_array_equal(numbers(info, 2, 6), values.T[2:])
    again = stored(tmp_path / "x", values + 100, 1)
    assert again == info
    with keeping_matrix():
        np.testing.assert_array_equal(numbers(again, 0, 6), values.T + 100)


def test_rows_that_are_not_there_are_zeros(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    info = stored(tmp_path / "x", values, 0)
    found, dtype = padded_rows(info, 1, 5, info)
    assert dtype == "F32"
    np.testing.assert_array_equal(found.view("<f4"), np.concatenate([values[1:], np.zeros((2, 4), np.float32)]))


def test_a_file_that_ends_early_is_named(tmp_path: Path) -> None:
    info = stored(tmp_path / "x", np.ones((3, 4), np.float32), 0)
    (tmp_path / "x").write_bytes(b"12345678" + b"\0" * 20)
    with pytest.raises(CheckpointError, match=r"x: tensor t: expected 48 bytes from byte 8 on, got 20: the file ends there"):
        info.read(0, 3)
