"""Where a source lies, by how it is written: ``org/name@revision`` on the Hub, a local folder, an object store's URL. Pure."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?")
OBJECT_STORES = ("s3", "s3a", "gs", "az", "abfs", "abfss")
"""Schemes of the URLs that checkpoints are read from."""

Kind = Literal["local", "hub", "objects"]


def split_revision(place: str) -> tuple[str, str | None]:
    """A Hub id and its revision, if it names one: ``org/name@revision``."""
    name, separator, revision = place.partition("@")
    return name, revision if separator else None


def scheme_of(place: str) -> str:
    """The scheme of a URL, in lower case; '' when it is none."""
    scheme, separator, _ = place.partition("://")
    return scheme.lower() if separator else ""


def kind_of(place: str, folder: Path) -> Kind | None:
    """What a source written in a recipe that lies in ``folder`` is; None when it can be nothing that is known.

    What is written as a path (``./x``, ``../x``, ``/x``, ``~/x``, ``file:///x``) or names a folder that exists is local;
    what else has the form of a Hub id is one.
    """
    scheme = scheme_of(place)
    if scheme:
        return "local" if scheme == "file" else "objects" if scheme in OBJECT_STORES else None
    if place.startswith(("/", "./", "../", "~")) or place in (".", "..") or (folder / place).is_dir():
        return "local"
    name, revision = split_revision(place)
    return "hub" if HUB_ID.fullmatch(name) and revision != "" else "local"


def local_path(place: str, folder: Path) -> Path:
    """The absolute path of a local source."""
    return (folder / Path(place.removeprefix("file://")).expanduser()).resolve()
