"""Versions of an output: which are there, how one becomes readable, and which is the latest.

An output holds ``<version>/``, ``latest.json`` and ``.work/``, where jobs keep what is unfinished. A version is readable once
its manifest is there, and that comes last: on a local disk with the rename of the whole staged folder, on an object store
after all its files were copied. So a death at any point leaves either the staged folder whole or the version.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from storage.artifact import WORK, Artifact, latest, parsed_latest
from storage.atomic import canonical_json
from storage.errors import ArtifactError, OutputExistsError, StoreError
from storage.layout import LATEST, MANIFEST
from storage.manifest import Manifest
from storage.places import OBJECT_STORES, scheme_of
from storage.stores import Store, open_store

LOCK = f"{WORK}/publish"
PARALLEL = 8
"""Requests to an object store at once."""
_STAND_IN = b"stands in"
_ALIAS = ".version"
"""The end of the names ``.work/<inputs>.<version>.version``, by which versions are found without their manifests."""


def check_output(place: str) -> None:
    """OutputExistsError when the place holds something other than artifacts: nothing of a stranger's is overwritten.

    Of an object store one listing is asked; StoreError when it cannot be reached.
    """
    path = None if scheme_of(place) in OBJECT_STORES else Path(place)
    if path is not None and path.exists() and not path.is_dir():
        raise OutputExistsError(f"output {place} is a file, not a folder of artifacts. Choose another output.")
    entries = open_store(place).children()
    if entries and not ({LATEST, WORK} & set(entries)):
        raise OutputExistsError(
            f"output {place} exists and is not a folder of artifacts: it has neither {LATEST} nor {WORK} but holds "
            f"{', '.join(entries[:5])}{' …' if len(entries) > 5 else ''}. Choose another output or empty it."
        )


def find_by_inputs(output: Store, inputs: str) -> Manifest | None:
    """A whole published version made from the same inputs, if there is one.

    On a local disk every byte of it is verified. On an object store names and sizes are compared by a listing, nothing but
    its manifest is read; ``Artifact.verify`` reads it all. Manifests are read only of versions that ``.work`` says nothing of.
    A version that stands in for what the inputs came to, as one with a new router does, counts while it is the latest.
    """
    known = _aliases(output)
    named = sorted({version for made_from, version in known if made_from == inputs})
    newest = _latest_version(output) if named else None
    named = [version for version in named if version == newest or not _stands_in(output, inputs, version)]
    unknown = sorted(set(output.children()) - {version for _, version in known} - {WORK, LATEST})
    with ThreadPoolExecutor(PARALLEL) as pool:
        opened = pool.map(lambda version: _opened(output, version), unknown)
    named += [found.manifest.version for found in opened if found is not None and found.manifest.inputs == inputs]
    named.sort(key=lambda version: version != newest)
    return next((manifest for version in named if (manifest := _whole(output, version))), None)


def _aliases(output: Store) -> list[tuple[str, str]]:
    """(inputs, version) of what was published here, or was about to be."""
    names = [name.removesuffix(_ALIAS) for name in output.children(WORK) if name.endswith(_ALIAS)]
    pairs = [name.partition(".") for name in names]
    return [(inputs, version) for inputs, _, version in pairs if version]


def _alias(inputs: str, version: str) -> str:
    return f"{WORK}/{inputs}.{version}{_ALIAS}"


def _stands_in(output: Store, inputs: str, version: str) -> bool:
    """Whether a version is not what the inputs came to, but was published in its place."""
    try:
        return output.get(_alias(inputs, version)) == _STAND_IN
    except FileNotFoundError:
        return False


def _latest_version(output: Store) -> str | None:
    try:
        return str(latest(output)["version"])
    except ArtifactError:
        return None


def is_published(output: Store, version: str) -> bool:
    """Whether a version is there and nothing is wrong with it, as far as ``find_by_inputs`` looks."""
    return _whole(output, version) is not None


def _has_alias(output: Store, inputs: str, version: str) -> bool:
    return (inputs, version) in _aliases(output)


def inputs_of(output: Store, version: str) -> set[str]:
    """All inputs that are known to come to a version."""
    return {made_from for made_from, named in _aliases(output) if named == version}


def _opened(output: Store, version: str) -> Artifact | None:
    """A version that lies where its manifest says; None for another format, a damaged one, or no artifact at all."""
    try:
        artifact = Artifact(output.under(version))
    except ArtifactError:
        return None
    return artifact if artifact.manifest.version == version else None


def _whole(output: Store, version: str) -> Manifest | None:
    """The manifest of a version nothing is wrong with, as far as ``find_by_inputs`` looks."""
    artifact = _opened(output, version)
    if artifact is None:
        return None
    problems = artifact.verify() if output.is_local else artifact.misfits()
    return None if problems else artifact.manifest


def staged_files(output: Store, staged: str) -> dict[str, int]:
    """Name -> bytes of what a staged folder holds, without the manifest that a killed publish may have left in it."""
    return {
        name: size
        for key, size in output.sizes(staged).items()
        if (name := key.removeprefix(f"{staged}/")) != MANIFEST
    }  # fmt: skip


def publish(
    output: Store,
    staged: str,
    manifest: Manifest,
    waiting: Callable[[], None] = lambda: None,
    replaces: Iterable[str] = (),
) -> bool:
    """Make a staged folder the version the manifest names, then the latest. False when that version was there, whole.

    ``staged`` is a key below the output (``.work/<job>/staged``) with all files of the manifest, which is not among them. A
    version that is there without a manifest (a killed publish) or is not whole is replaced. That these inputs come to this
    version is remembered, so that their next run finds it; and that runs of the inputs in ``replaces`` are content with it, as
    long as it is the latest. After a death at any point the staged folder or the version is
    whole, so the same call, or ``find_by_inputs``, completes it. ``waiting`` is called when another run is publishing here.

    StoreError when the staged folder lacks files of the manifest, or the store cannot be written.
    """
    with output.lock(LOCK, waiting):
        new = _whole(output, manifest.version) is None
        if new:
            _check_staged(output, staged, manifest)
        # before the version is there: a death in between must not hide it
        output.put(_alias(manifest.inputs, manifest.version), manifest.version.encode())
        for inputs in replaces:
            if not (_has_alias(output, inputs, manifest.version) and not _stands_in(output, inputs, manifest.version)):
                output.put(_alias(inputs, manifest.version), _STAND_IN)
        if new:
            output.delete([f"{manifest.version}/{MANIFEST}"])  # what is not whole stops being readable first
            (_rename if output.is_local else _copy)(output, staged, manifest)
        _point_latest(output, manifest.version)
    return new


def _check_staged(output: Store, staged: str, manifest: Manifest) -> None:
    found = staged_files(output, staged)
    if wrong := [name for name, record in manifest.files.items() if found.get(name) != record.bytes]:
        shown = ", ".join(wrong[:5]) + (" …" if len(wrong) > 5 else "")
        raise StoreError(
            f"{output.place}/{staged}: {len(wrong)} of {len(manifest.files)} files of version {manifest.version} are missing "
            f"or of another size ({shown}). Run again."
        )


def _rename(output: Store, staged: str, manifest: Manifest) -> None:
    """The version appears whole, manifest and all, with one rename."""
    strange = staged_files(output, staged).keys() - manifest.files.keys()
    output.delete(f"{staged}/{name}" for name in strange)
    output.clear(manifest.version)
    output.put(f"{staged}/{MANIFEST}", manifest.to_bytes())
    output.move(staged, manifest.version)


def _copy(output: Store, staged: str, manifest: Manifest) -> None:
    """File by file, the manifest when all are there; the staged folder stays whole until then.

    Written over what is there: one who lost the lock unknowingly may be writing the same bytes.
    """
    target = output.under(manifest.version)
    with ThreadPoolExecutor(PARALLEL) as pool:
        copied = pool.map(lambda name: output.copy(f"{staged}/{name}", f"{manifest.version}/{name}"), manifest.files)
        target.delete(target.sizes().keys() - manifest.files.keys() - {MANIFEST})
        for _ in copied:  # raises what a copy raised
            pass
    target.put(MANIFEST, manifest.to_bytes())
    if problems := Artifact(target).misfits():
        raise StoreError.listing(f"{target.place} was changed while it was published. Run again", problems)
    output.clear(staged)


def make_latest(output: Store, version: str, waiting: Callable[[], None] = lambda: None) -> None:
    """Let ``latest.json`` name a published version; unchanged when it does so already."""
    try:
        if latest(output)["version"] == version:
            return
    except ArtifactError:  # none yet, or a damaged one, which this mends
        pass
    with output.lock(LOCK, waiting):
        _point_latest(output, version)


def _point_latest(output: Store, version: str) -> None:
    """Of several at once each takes a sequence of its own, and the last of them is the latest."""
    while True:
        state = output.tagged(LATEST)
        try:
            known = parsed_latest(state[0] if state else b"", output.place)
        except ArtifactError:
            known = {"version": None, "sequence": 0}
        if known["version"] == version:
            return
        record = canonical_json({"version": version, "sequence": known["sequence"] + 1})
        if output.swap(LATEST, record, state[1] if state else None):
            return
