"""What moving bytes costs at least: every input read once, every output written once and synced, by cat and cp."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

DROP_CACHES = Path("/proc/sys/vm/drop_caches")
BATCH_BYTES = 1 << 30
"""Bytes that are copied at once: they are read into memory before, so that the writing is timed and not the reading too."""
READ_BYTES = 1 << 24
SECTOR_BYTES = 512
"""Of /proc/diskstats, whatever the device's own."""


def files_below(*places: Path) -> list[Path]:
    """All regular files in these folders, in order of path."""
    return sorted(path for place in places for path in place.rglob("*") if path.is_file())


def bytes_of(files: Iterable[Path]) -> int:
    """The sum of their sizes."""
    return sum(path.stat().st_size for path in files)


def can_drop() -> bool:
    """Whether this process may empty the system's page cache."""
    return os.access(DROP_CACHES, os.W_OK)


def drop_page_cache(*places: Path) -> None:
    """Write back what is not on disk yet, then forget what the system holds of these folders' files: of all, where it may."""
    os.sync()
    if can_drop():
        DROP_CACHES.write_text("1")
        return
    for path in files_below(*places):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_into_cache(files: Iterable[Path]) -> None:
    """Read files so that they lie in memory."""
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.read(READ_BYTES):
                pass


def _through_xargs(command: Sequence[str], files: Iterable[Path], cwd: Path | None = None) -> None:
    names = b"\0".join(os.fsencode(path) for path in files)
    subprocess.run(["xargs", "-0", *command], input=names, cwd=cwd, stdout=subprocess.DEVNULL, check=True)


def seconds_to_read(files: Sequence[Path]) -> float:
    """Seconds to read all of these once, one after the other, by cat: cp would need a process for each."""
    started = time.monotonic()
    if files:
        _through_xargs(["cat"], files)
    return time.monotonic() - started


def batches(sizes: Sequence[int], limit: int) -> list[tuple[int, int]]:
    """Ranges [start, stop) of consecutive items of at most ``limit`` together, or of one item that is larger. Pure."""
    cuts, start, total = [], 0, 0
    for position, size in enumerate(sizes):
        if position > start and total + size > limit:
            cuts.append((start, position))
            start, total = position, 0
        total += size
    return [*cuts, (start, len(sizes))] if sizes else []


def seconds_to_write(root: Path, files: Sequence[Path], target: Path) -> float:
    """Seconds to write these files of ``root`` once more, below ``target``, by cp, and to sync them; the copies are removed.

    They are read into memory before, a batch at a time, which is not timed; every batch is synced, so that nothing is
    written back meanwhile.
    """
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    seconds = 0.0
    for start, stop in batches([path.stat().st_size for path in files], BATCH_BYTES):
        batch = files[start:stop]
        read_into_cache(batch)
        started = time.monotonic()
        _through_xargs(["cp", "--parents", "-t", str(target)], [path.relative_to(root) for path in batch], root)
        subprocess.run(["sync", "-f", str(target)], check=True)
        seconds += time.monotonic() - started
    shutil.rmtree(target)
    return seconds


def device_traffic(place: Path) -> tuple[int, int] | None:
    """(bytes read, bytes written) so far, by all processes, of the disk that a folder lies on; None where it is not told."""
    device = place.stat().st_dev
    for line in Path("/proc/diskstats").read_text().splitlines():
        fields = line.split()
        if (int(fields[0]), int(fields[1])) == (os.major(device), os.minor(device)):
            return int(fields[5]) * SECTOR_BYTES, int(fields[9]) * SECTOR_BYTES
    return None
