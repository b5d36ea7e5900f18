"""Whatever bytes a file holds: a sound parse or one CheckpointError, and never more read than a header may be."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.numpy import save

from storage.errors import CheckpointError
from storage.headers import BITS, MAX_HEADER_BYTES, read_header
from storage.layout import DTYPES
from storage.tensors import FileRows, TensorInfo

NAMES = st.sampled_from(["a", "b", "model.embed_tokens.weight", "__metadata__", "", "..", "x/y", "größe"]) | st.text(max_size=8)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-2, 40)
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from([*BITS])
)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4), max_leaves=12
)
SIZES = st.lists(st.integers(0, 5) | st.sampled_from([2**31, 2**62, 2**63, 2**64, 10**40]), max_size=4)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*BITS, "I4", "F128"]) | SCALARS,
        "shape": SIZES | JSON,
        "data_offsets": st.lists(st.integers(0, 64), min_size=2, max_size=2) | SIZES | JSON,
    },
    optional={"note": SCALARS},
)
HEADERS = st.dictionaries(NAMES, ENTRIES | JSON, max_size=4) | JSON


@dataclass
class CountingFile:
    """A file in memory that records what is asked of it, and refuses to be asked for what it has not."""

    content: bytes
    asked: list[tuple[int, int]] = field(default_factory=list)
    place: str = "s3://bucket/model.safetensors"

    @property
    def size(self) -> int:
        return len(self.content)

    def read_into(self, view: memoryview, offset: int) -> int:
        assert 0 <= offset <= offset + len(view) <= self.size, "a read beyond the file"
        self.asked.append((offset, len(view)))
        view[:] = self.content[offset : offset + len(view)]
        return len(view)

    @property
    def total(self) -> int:
        return sum(length for _, length in self.asked)


def check_tensor(info: TensorInfo, content: bytes, end: int) -> tuple[int, int]:
    """That its bytes lie in the file and can be read; where they lie."""
    assert isinstance(info.data, FileRows)
    start = info.data.offset
    assert 8 < start <= end
    if info.dtype not in BITS:
        return start, end
    entries = 1
    for size in info.shape:
        entries *= size
    assert entries * BITS[info.dtype] % 8 == 0
    stop = start + entries * BITS[info.dtype] // 8
    assert stop <= end
    if info.dtype in DTYPES:
        assert info.read(0, info.rows).tobytes() == content[start:stop]
    return start, stop


def outcome(file: CountingFile) -> tuple[dict[str, TensorInfo] | None, str]:
    """The tensors, or the message of the only error there may be."""
    try:
        return read_header(file), ""
    except CheckpointError as error:
        return None, str(error)


def check(content: bytes) -> dict[str, TensorInfo] | None:
    """Read a header; None when it is refused."""
    file = CountingFile(content)
    length = int.from_bytes(content[:8], "little")
    found, message = outcome(file)
    if found is None:
        assert file.total <= 8 + min(length, MAX_HEADER_BYTES)
        assert message.startswith(file.place)
        assert len(message) < 60 * 600
        return None
    assert file.total == 8 + length
    assert all(type(size) is int and size >= 0 for info in found.values() for size in info.shape)
    spans = sorted(check_tensor(info, content, len(content)) for info in found.values())
    if all(info.dtype in BITS for info in found.values()):  # then they fill the file without a gap
        assert sum(stop - start for start, stop in spans) == len(content) - 8 - length
    return found


def framed(text: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text + data


def good_file() -> bytes:
    tensors: dict[str, np.ndarray[Any, Any]] = {
        "model.embed_tokens.weight": np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3),
        "model.norm.weight": np.linspace(0, 9, 5, dtype=np.float16),
        "mask": np.array([[True, False], [False, False]]),
        "empty": np.empty((0, 7), np.int16),
    }
    return save(tensors, {"format": "np"})


GOOD = good_file()


def test_the_good_file_is_good() -> None:
    found = check(GOOD)
    assert found is not None
    assert found.keys() == {"model.embed_tokens.weight", "model.norm.weight", "mask", "empty"}


@given(st.binary(max_size=200))
@example(b"\0" * 8)
@example(struct.pack("<Q", 2) + b"{}")
@example(struct.pack("<Q", 2**64 - 1) + b"{}")
def test_random_bytes(content: bytes) -> None:
    check(content)


@given(st.binary(max_size=80), st.binary(max_size=20))
@example(b"{}", b"")
@example(b"[" * 100_000, b"")
@example(b'{"a":' * 100_000, b"")
@example(b'{"a":NaN,"a":-Infinity}', b"")
@example(b'{"\\ud800":{},"":{}}', b"")
def test_random_text_in_place_of_a_header(text: bytes, data: bytes) -> None:
    check(framed(text, data))


@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 7)), min_size=1, max_size=6))
def test_flipped_bits(flips: list[tuple[int, int]]) -> None:
    content = bytearray(GOOD)
    for position, bit in flips:
        content[position] ^= 1 << bit
    check(bytes(content))


@pytest.mark.parametrize("position", range(8))
def test_flipped_bits_of_the_length(position: int) -> None:
    for bit in range(8):
        content = bytearray(GOOD)
        content[position] ^= 1 << bit
        assert check(bytes(content)) is None


@given(st.integers(0, len(GOOD) - 1))
def test_truncations_are_refused(length: int) -> None:
    assert check(GOOD[:length]) is None


@given(st.integers(0, len(GOOD)), st.binary(min_size=1, max_size=30))
def test_insertions(position: int, inserted: bytes) -> None:
    found = check(GOOD[:position] + inserted + GOOD[position:])
    header_end = 8 + int.from_bytes(GOOD[:8], "little")
    assert position < header_end or found is None


@given(st.integers(0, len(GOOD) - 1), st.integers(1, 30))
def test_deletions(position: int, length: int) -> None:
    check(GOOD[:position] + GOOD[position + length :])


@given(HEADERS, st.binary(max_size=64))
@example({"a": {"dtype": "F32", "shape": [2**62, 0], "data_offsets": [0, 0]}}, b"")
@example({"a": {"dtype": "I4", "shape": [2], "data_offsets": [0, 1]}}, b"1")
@example({"a": {"dtype": "BF16", "shape": [0, 0, 0], "data_offsets": [0, 0]}}, b"")
@example({"a": [[[[[[[1] * 100] * 100]]]]]}, b"")
def test_random_structures_in_place_of_a_header(header: Any, data: bytes) -> None:
    check(framed(json.dumps(header).encode(), data))


@given(st.lists(st.tuples(NAMES, st.sampled_from(["F32", "BF16", "U8"]), st.lists(st.integers(0, 3), max_size=3)), max_size=5))
def test_sound_headers_are_read_and_doubled_names_are_not(entries: list[tuple[str, str, list[int]]]) -> None:
    """Headers laid out as the format asks are refused only for their names."""
    parts, offset = [], 0
    for name, dtype, shape in entries:
        length = BITS[dtype] // 8
        for size in shape:
            length *= size
        entry = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + length]}
        parts.append(f"{json.dumps(name)}:{json.dumps(entry)}")
        offset += length
    found = check(framed(f"{{{','.join(parts)}}}".encode(), bytes(range(256))[:offset]))
    names = [name for name, _, _ in entries]
    can_be_folders = all(n not in ("", ".", "..", "__metadata__") and "/" not in n and "\0" not in n for n in names)
    is_sound = len(set(names)) == len(names) and can_be_folders
    assert (found is not None) == is_sound
    if found is not None:
        assert [(info.name, info.dtype, list(info.shape)) for info in found.values()] == entries
