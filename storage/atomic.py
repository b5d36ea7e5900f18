"""Small files that are either the old or the new one, whatever happens while they are written."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any


def canonical_json(value: Any) -> bytes:
    """The one way a JSON record is written: sorted keys, two spaces, one final newline, UTF-8."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8") + b"\n"


def sync(path: Path) -> None:
    """Make a file's content, or the names inside a folder, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file beside its final name, sync it, and replace. A failed write leaves no trace."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)
