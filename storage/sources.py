"""Sources of checkpoints: the Hub, object stores and local folders, behind one function."""

from __future__ import annotations

from pathlib import Path

from storage.files import Folder, open_local
from storage.places import OBJECT_STORES, scheme_of, split_revision


def open_folder(label: str, place: str) -> Folder:
    """The files of a source as a loaded recipe names it: an absolute path, a URL of an object store or a Hub id.

    CheckpointError when there is no such source or it may not be read, SourceError when it cannot be reached.
    """
    if place.startswith("/"):
        return open_local(label, Path(place))
    if scheme_of(place) in OBJECT_STORES:
        from storage.objects import open_objects

        return open_objects(label, place)
    from storage.hub import open_hub

    return open_hub(label, *split_revision(place))
