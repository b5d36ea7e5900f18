"""Pull: a whole artifact, or one expert of it, from wherever it lies into a local folder that appears whole or not at all.

What came is kept in a folder beside the target until all is there, so that the same pull goes on where another was killed.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from storage.artifact import Artifact
from storage.atomic import sync, write_atomically
from storage.errors import ArtifactError, OutputExistsError, StoreBusyError
from storage.fetching import FILES, Progress, Transfer, no_progress
from storage.layout import MANIFEST
from storage.local_store import LocalStore
from storage.manifest import Manifest
from storage.selection import of_expert, whole_artifact

_LONGEST = 80
"""Characters of a name that the unfinished folder's name repeats."""


def pull(location: str, dest: Path, expert: str | None = None, progress: Progress = no_progress) -> Manifest:
    """Bring an artifact, or one expert of it, into the folder ``dest`` and return the manifest of what is there now.

    ``location`` is what ``storage.artifact.resolve`` takes. Ranges come over several connections; every file, or every span of
    rows of the expert, is compared with its sha256. ``dest`` must not exist, be empty, or hold just this already. With
    ``expert`` only its rows and files are fetched: the artifact of this one, whose exports are those of the whole one.

    ArtifactError when the artifact is damaged or has no such expert, OutputExistsError when ``dest`` holds anything else,
    StoreBusyError when another pull is filling it, StoreError when the store cannot be reached or the disk is full.
    """
    artifact = Artifact(location)
    if expert is not None:
        artifact.check_expert(expert)
        expert = None if artifact.manifest.parent else expert  # it is the only one
    dest = dest.resolve()
    partial, inside = _unfinished(dest, artifact.manifest.version, expert)
    taken = _is_taken(dest, partial)  # asked first: what another pull completes meanwhile is found next
    there = _already(artifact, dest, expert, partial)
    if there is None:
        if taken:
            raise OutputExistsError(f"{dest} exists and is not an empty folder. Choose another place for the artifact.")
        with _alone(partial):
            there = _already(artifact, dest, expert, partial)
            if there is None:
                there = _completed(artifact, expert, partial, progress)
                _place(partial / FILES, dest, inside)
            shutil.rmtree(partial, ignore_errors=True)
    elif partial.is_dir():  # killed just before its end
        with suppress(StoreBusyError), _alone(partial):
            shutil.rmtree(partial, ignore_errors=True)
    return there


def _unfinished(dest: Path, version: str, expert: str | None) -> tuple[Path, bool]:
    """The folder for what came, by a name that finds it again, and whether it lies inside the target."""
    name = f".{dest.name[:_LONGEST]}.{version}{f'-{expert[:_LONGEST]}' if expert else ''}.pull"
    beside = dest.parent / name
    inside = dest.is_dir() and not beside.is_dir()  # an empty folder may be somebody's working directory, or a mount point
    return (dest / name if inside else beside), inside


def _already(artifact: Artifact, dest: Path, expert: str | None, partial: Path) -> Manifest | None:
    """The manifest of what is wanted, if the target holds it, whole. OutputExistsError when it is there, but damaged."""
    if not (dest / MANIFEST).is_file():
        return None
    try:
        there = Artifact(LocalStore(dest))
    except ArtifactError:
        return None
    version, found = artifact.manifest.version, there.manifest
    if not (found.version == version if expert is None else (found.parent, [*found.experts]) == (version, [expert])):
        return None
    problems = [problem for problem in there.verify() if not problem.startswith(f"{partial.name}/")]
    if problems:
        raise OutputExistsError.listing(f"{dest} holds version {found.version}, damaged. Remove it and pull again", problems)
    return found


def _is_taken(dest: Path, partial: Path) -> bool:
    """Whether the target is or holds anything but what an earlier pull of the same has begun to put there."""
    if not dest.exists():
        return False
    held = {path.name for path in dest.iterdir()} - {partial.name} if dest.is_dir() else {dest.name}
    finished = _finished(partial)
    ours = {name.split("/")[0] for name in finished.files} if finished and partial.parent == dest else set()
    return bool(held - ours)


def _finished(partial: Path) -> Manifest | None:
    """The manifest of an unfinished folder in which all is there, verified: it was killed while it was put in place."""
    path = partial / FILES / MANIFEST
    return Manifest.from_bytes(path.read_bytes(), str(path)) if path.is_file() else None


def _completed(artifact: Artifact, expert: str | None, partial: Path, progress: Progress) -> Manifest:
    """Fetch what is missing; the manifest comes last, when all else is right and synced."""
    if finished := _finished(partial):
        return finished
    source = whole_artifact(artifact) if expert is None else of_expert(artifact, expert)
    transfer = Transfer(artifact.store, source.plan, partial, progress)
    transfer.run()
    manifest = source.complete(transfer.files)
    for path in (transfer.files, *transfer.files.rglob("*")):
        sync(path)
    write_atomically(transfer.files / MANIFEST, manifest.to_bytes())
    return manifest


def _place(files: Path, dest: Path, inside: bool) -> None:
    if inside:
        for path in sorted(files.iterdir(), key=lambda path: path.name == MANIFEST):
            path.rename(dest / path.name)
        sync(dest)
        return
    try:
        files.rename(dest)
    except OSError as error:
        raise OutputExistsError(
            f"{dest} came to be while it was pulled ({error.strerror}). Move it away and run again."
        ) from None
    sync(dest.parent)


@contextmanager
def _alone(partial: Path) -> Iterator[None]:
    """Hold the unfinished folder alone."""
    lock = FileLock(partial / "lock")
    while not lock.is_locked:
        partial.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except FileNotFoundError:  # its last holder has just removed the folder
            continue
        except Timeout:
            raise StoreBusyError(f"another pull is filling {partial}. Wait for it to end.") from None
    try:
        yield
    finally:
        lock.release()
