"""Headers of safetensors files: which tensors a file holds and where their bytes lie.

The format is that of https://github.com/huggingface/safetensors: eight bytes with the header's length (little endian), a
JSON object of names to ``dtype``, ``shape`` and ``data_offsets``, then the tensors' bytes without holes or overlaps. Only the
length and the header are read, wherever the file lies; all that is wrong with a file is said at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from storage.errors import CheckpointError
from storage.files import File
from storage.layout import DTYPES
from storage.tensors import FileRows, TensorInfo

PREFIX_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
"""The safetensors package's own limit."""

BITS = {name: 8 * dtype.size for name, dtype in DTYPES.items()} | {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "U32": 32, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
"""Bits of one entry of every type the format knows, whether its rows can be read or not."""

KEYS = ("dtype", "shape", "data_offsets")
METADATA = "__metadata__"

_LARGEST = 2**63 - 1
"""No array and no file is larger; what a header says beyond it is damage."""
_LONGEST_NAME = 255
_LISTED = 50
_SHOWN = 120
_OTHER_FORMATS = (
    (rb"version https://git-lfs", "a Git LFS pointer, not the weights themselves. Run `git lfs pull` where it was cloned"),
    (
        rb"\s*<[!?a-zA-Z][^\0]{6}",
        "a web page or an XML message. Download the file again, logged in if need be",
    ),
    (rb"\s*\{\s*\"[^\0]{6}", "a JSON text. Download the file again, logged in if need be"),
    (rb"PK\x03\x04", "a zip file, as torch.save writes it. Save the model as safetensors"),
    (rb"\x80\x02\x8a\nl\xfc\x9cF", "a pickle, which is never opened. Save the model as safetensors"),
    (rb"GGUF", "a GGUF file. Give the safetensors checkpoint it was made from"),
    (rb"\x1f\x8b\x08", "a gzip file. Unpack it"),
)
"""How files begin that are often found in place of weights."""


@dataclass(frozen=True)
class _Span:
    """A tensor whose bytes are [start, stop) of the file's data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class _Object(dict[str, Any]):
    """A JSON object that knows which of its keys were there more than once; json keeps the last of them."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.twice: list[str] = []
        if len(self) < len(pairs):
            seen: set[str] = set()
            self.twice = [key for key, _ in pairs if key in seen or seen.add(key)]  # type: ignore[func-returns-value]


def read_header(file: File) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, in the order of its header; types that are not known are returned as they are.

    CheckpointError, naming the file and its tensors, when it is no safetensors file, is torn or has a header that is not sound:
    every tensor that is returned lies inside the file and shares no byte with another.
    """
    length = _header_length(file)
    header = _parsed(file, length)
    problems = [*_metadata_problems(header), *(f"{_tensor(name)}: listed twice" for name in header.twice)]
    spans: list[_Span] = []
    for name, entry in header.items():
        if name != METADATA:
            found, wrong = _span(name, entry)
            problems += [f"{_tensor(name)}: {problem}" for problem in wrong]
            spans += [found] if found else []
    is_whole = not header.twice and len(spans) == len(header.keys() - {METADATA})
    problems += _layout_problems(spans, file.size - PREFIX_BYTES - length, is_whole)
    if problems:
        raise CheckpointError.listing(f"{file.place} is damaged and must be saved or downloaded again", _shortened(problems))
    first = PREFIX_BYTES + length
    return {span.name: TensorInfo(span.name, span.dtype, span.shape, FileRows(file, first + span.start)) for span in spans}


def _read(file: File, offset: int, length: int) -> bytes:
    """Bytes that the file's size says are there."""
    data = bytearray(length)
    got = file.read_into(memoryview(data), offset)
    if got < length:
        raise CheckpointError(
            f"{file.place}: expected {length} bytes from byte {offset} on, got {got}: it changed while it was read. Run again."
        )
    return bytes(data)


def _header_length(file: File) -> int:
    """Bytes of the header, known to lie inside the file."""
    if file.size == 0:
        raise CheckpointError(f"{file.place}: not a whole safetensors file: it is empty. Download or save the file again.")
    prefix = _read(file, 0, min(file.size, PREFIX_BYTES))
    if len(prefix) < PREFIX_BYTES:
        raise CheckpointError(
            f"{file.place}: not a whole safetensors file: expected at least {PREFIX_BYTES} bytes, got {file.size}. "
            "Download or save the file again."
        )
    length = int.from_bytes(prefix, "little")
    largest = min(MAX_HEADER_BYTES, file.size - PREFIX_BYTES)
    if 2 <= length <= largest:
        return length
    start = prefix + (_read(file, PREFIX_BYTES, min(largest, 56)) if length > largest else b"")
    kind = next((kind for beginning, kind in _OTHER_FORMATS if re.match(beginning, start)), None)
    if kind:
        raise CheckpointError(f"{file.place}: not a safetensors file: it is {kind}.")
    raise CheckpointError(
        f"{file.place}: not a whole safetensors file: expected a header of 2 to {largest} bytes, got {length}. "
        "Download or save the file again."
    )


def _parsed(file: File, length: int) -> _Object:
    """The header as it is written."""
    raw = _read(file, PREFIX_BYTES, length)
    try:
        if not raw.startswith(b"{"):
            raise ValueError(f"expected a JSON object, got {_brief(raw[:20])}")
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_Object)
    except UnicodeDecodeError as error:
        problem = f"byte {error.start} of it is not UTF-8"
    except RecursionError:
        problem = "it is nested too deep"
    except ValueError as error:  # also integers of thousands of digits
        problem = str(error)
    else:
        assert isinstance(header, _Object)
        return header
    raise CheckpointError(f"{file.place}: its safetensors header cannot be read ({problem}). Download or save the file again.")


def _metadata_problems(header: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the map of strings beside the tensors; null counts as none, as in the safetensors package."""
    metadata = header.get(METADATA)
    if metadata is None:
        return
    if not isinstance(metadata, _Object):
        yield f"{METADATA}: expected an object of strings, got {_brief(metadata)}"
    elif set(KEYS) <= metadata.keys():
        yield f"a tensor is named {METADATA}, which the format keeps for strings. Rename it"
    else:
        wrong = [key for key, value in metadata.items() if not isinstance(value, str)]
        yield from (f"{METADATA}: {_shown(key)}: expected a string, got {_brief(metadata[key])}" for key in wrong)
        yield from (f"{METADATA}: {_shown(key)}: listed twice" for key in metadata.twice)


def _span(name: str, entry: Any) -> tuple[_Span | None, list[str]]:
    """Where a tensor lies, if its entry says so, and what is wrong with the entry."""
    if not isinstance(entry, _Object):
        return None, [f"expected an object with dtype, shape and data_offsets, got {_brief(entry)}"]
    problems = [_name_problem(name)] if _name_problem(name) else []
    problems += [f"{_shown(key)} is listed twice in its header entry" for key in entry.twice]
    if lacking := [key for key in KEYS if key not in entry]:
        return None, [*problems, f"its header entry lacks {' and '.join(lacking)}"]
    dtype, shape, offsets = (entry[key] for key in KEYS)
    if not isinstance(dtype, str):
        problems.append(f"expected a data type's name, got {_brief(dtype)}")
    is_shape = _are_sizes(shape) and _entries(shape) is not None
    if not is_shape:
        problems.append(f"impossible shape {_brief(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1] or offsets[1] > _LARGEST:
        return None, [*problems, f"impossible byte range {_brief(offsets)}"]
    if is_shape and isinstance(dtype, str):
        problems += _size_problems(dtype, shape, offsets[1] - offsets[0])
    return _Span(name, str(dtype), tuple(shape) if is_shape else (), offsets[0], offsets[1]), problems


def _name_problem(name: str) -> str:
    """Names become folders of the stores, so none may lead out of them."""
    try:
        length = len(name.encode())
    except UnicodeEncodeError:
        return "its name is not valid Unicode. Rename it"
    if name in ("", ".", "..") or "/" in name or "\0" in name or length > _LONGEST_NAME:
        return f"its name cannot be a folder's: expected 1 to {_LONGEST_NAME} bytes without /. Rename it"
    return ""


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _entries(shape: Iterable[int]) -> int | None:
    """Entries of a tensor; None where its axes are longer than any array's, be it empty or not."""
    entries, is_empty = 1, False
    for size in shape:
        is_empty = is_empty or size == 0
        entries *= size or 1
        if entries > _LARGEST // 8:
            return None
    return 0 if is_empty else entries


def _size_problems(dtype: str, shape: list[int], given: int) -> Iterator[str]:
    """Whether the byte range has the size of the tensor. A type that is not known is the plan's to refuse."""
    entries = _entries(shape)
    if dtype in BITS and entries is not None:
        needed, rest = divmod(entries * BITS[dtype], 8)
        if rest:
            yield f"{dtype} {_brief(shape)} is no whole number of bytes"
        elif needed != given:
            yield f"{dtype} {_brief(shape)} needs {needed} bytes, the header gives {given}"


def _layout_problems(spans: Iterable[_Span], available: int, is_whole: bool) -> Iterator[str]:
    """Overlaps, bytes of no tensor, and bytes that are missing. Holes are looked for only where all ranges are known."""
    reached, holder = 0, ""
    beyond: list[str] = []
    for span in sorted(spans, key=lambda span: (span.start, span.stop)):
        if span.start < reached:
            yield f"{_tensor(span.name)}: its bytes {span.start} to {span.stop} overlap those of {_tensor(holder)}"
        elif span.start > reached and is_whole:
            yield f"{_tensor(span.name)}: expected its bytes to start at {reached}, got {span.start}: a hole"
        if span.stop > available:
            beyond.append(span.name)
        if span.stop >= reached:
            reached, holder = span.stop, span.name
    if beyond:
        others = f" and {len(beyond) - 1} more" if len(beyond) > 1 else ""
        yield (
            f"its tensors need {reached} bytes of data, the file has {available} (is it torn? {reached - available} bytes are "
            f"missing, those of {_tensor(beyond[0])}{others})"
        )
    elif reached < available and is_whole:
        rest = available - reached
        yield f"its tensors need {reached} bytes of data, the file has {available}: the last {rest} bytes are of no tensor"


def _tensor(name: str) -> str:
    return f"tensor {_shown(name)}"


def _shown(name: str) -> str:
    """A name as a message can hold it, whatever a damaged header calls it."""
    text = name if name.isprintable() else ascii(name)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _brief(value: Any) -> str:
    """The beginning of a value. Lists are cut before they are written out: there may be millions of entries."""
    if isinstance(value, list) and len(value) > 8:
        return _brief(value[:8])[:-1] + ", …]"
    if isinstance(value, dict):
        return "an object"
    try:
        text = "null" if value is None else ascii(value) if isinstance(value, (str, bytes)) else str(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python writes
        text = "a value that cannot be shown"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _shortened(problems: list[str]) -> list[str]:
    rest = len(problems) - _LISTED
    return [*problems[:_LISTED], f"and {rest} more"] if rest > 0 else problems
