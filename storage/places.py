"""Where a source lies, by how it is written: ``org/name@revision`` on the Hub, a local folder, an object store's URL.

Nothing is opened; that a name is a folder is all that is asked of the disk. What a URL may hide (a user, a query) is in no
message.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal
from urllib.parse import unquote

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?")
OBJECT_STORES = ("s3", "s3a", "gs", "az", "abfs", "abfss")
"""Schemes of the URLs that checkpoints are read from."""
SOURCES = "a Hub id, a folder or a URL"
"""What a source is written as."""
QUERIES = "a data set on the Hub or a file"
"""What a source of queries is written as."""

Kind = Literal["local", "hub", "objects"]

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*")
_OF_CONTAINERS = ("abfs", "abfss")
"""Schemes whose URLs have a container before the host: ``abfss://container@host/prefix``."""
_HUB_PAGE = re.compile(
    r"(?:(?:https?://)?(?:[^/@]*@)?(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://)?(?!(?:datasets|spaces)/)"
    r"(?P<name>[a-z0-9][\w.-]*/[a-z0-9][\w.-]*)"
    r"(?:(?:@|/(?:tree|blob|resolve)/)(?P<revision>refs/pr/\d+|[\w.-]+)(?:/[^?#]*)?)?/*(?:[?#].*)?",
    re.IGNORECASE,
)
"""How people write a model on the Hub besides its id: its page's address, ``hf://``, a slash at the end."""

_DATASET = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DATASET_PAGE = re.compile(
    r"(?:https?://(?:[^/@]*@)?(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://)datasets/(?P<name>[a-z0-9][\w.-]*/[a-z0-9][\w.-]*)"
    r"(?:[/?#@].*)?",
    re.IGNORECASE,
)
_OF_QUERIES = (".jsonl", ".json", ".ndjson", ".parquet", ".txt", ".gz")
"""Ends of names that are files', so that ``data/math.jsonl`` is no data set, though there is no such file."""
_NOT_QUERIES = (".csv", ".tsv", ".arrow", ".feather", ".zip", ".bz2", ".xz", ".zst", ".xlsx", ".pkl")


def split_revision(place: str) -> tuple[str, str | None]:
    """A Hub id and its revision, if it names one: ``org/name@revision``."""
    name, separator, revision = place.partition("@")
    return name, revision if separator else None


def scheme_of(place: str) -> str:
    """The scheme of a URL, in lower case; '' when it is none."""
    scheme, separator, _ = place.partition("://")
    return scheme.lower() if separator else ""


def shown_scheme(place: str) -> str:
    """What a message may say of a URL that is refused: its scheme."""
    scheme = scheme_of(place)
    return f"the scheme {scheme!r}" if _SCHEME.fullmatch(scheme) else "no scheme that is known"


def _is(test: Callable[[], bool]) -> bool:
    """What the disk says; False where it cannot be asked."""
    try:
        return test()
    except (OSError, ValueError):  # no permission, too long, a NUL
        return False


def _is_path(place: str) -> bool:
    return place.startswith(("/", "./", "../", "~")) or place in (".", "..")


def kind_of(place: str, folder: Path) -> Kind | None:
    """What a source written in a recipe that lies in ``folder`` is; None when it can be nothing that is known.

    What is written as a path (``./x``, ``../x``, ``/x``, ``~/x``, ``file:///x``) or names a folder or a file that exists is
    local; what else has the form of a Hub id is one.
    """
    scheme = scheme_of(place)
    if scheme:
        return "local" if scheme == "file" else "objects" if scheme in OBJECT_STORES else None
    if _is_path(place) or _is((folder / place).exists):
        return "local"
    name, revision = split_revision(place)
    return "hub" if HUB_ID.fullmatch(name) and (revision is None or revision.strip()) else "local"


def local_path(place: str, folder: Path) -> Path:
    """The absolute path of a local source or target in which ``local_problem`` found nothing wrong."""
    if scheme_of(place) == "file":
        return Path("/" + unquote(place.partition("://")[2].partition("/")[2])).resolve()
    return (folder / Path(place).expanduser()).resolve()


def named_path(place: str, folder: Path) -> Path:
    """The absolute path of a local file as it is named: a link keeps its own name, whose end may say what the file holds."""
    if scheme_of(place) == "file":
        return local_path(place, folder)
    return Path(os.path.abspath(folder / Path(place).expanduser()))  # noqa: PTH100 - resolve() would follow links


def target_at(place: str, folder: Path) -> str:
    """Where a delta store or an output lies that a recipe in ``folder`` names: an absolute path, or a URL without a slash."""
    if scheme_of(place) in OBJECT_STORES:
        scheme, _, rest = place.partition("://")
        return f"{scheme.lower()}://{rest.rstrip('/')}"
    return str(local_path(place, folder))


def local_problem(place: str, folder: Path) -> str | None:
    """What is wrong with how a local place is written."""
    if scheme_of(place) == "file" and place.partition("://")[2].partition("/")[0].lower() not in ("", "localhost"):
        return "a file URL of another host; expected file:///folder, of this machine"
    try:
        local_path(place, folder)
    except (OSError, ValueError, RuntimeError) as error:  # a NUL, a loop of links, the home of nobody
        return f"no path of this machine ({error}); correct it"
    return None


def object_problem(place: str) -> str | None:
    """What is wrong with how an object store's URL is written."""
    rest = place.partition("://")[2]
    host = rest.partition("/")[0]
    if "?" in rest or "#" in rest or ":" in host or ("@" in host and scheme_of(place) not in _OF_CONTAINERS):
        return "a URL is a bucket and a prefix; credentials and options come from the environment"
    if not host:
        return f"no bucket; expected {scheme_of(place)}://bucket/prefix"
    return None


def _hub_suggestion(place: str) -> str | None:
    """The Hub id that is meant by what looks like one and is none."""
    found = _HUB_PAGE.fullmatch(place)
    return None if found is None else "@".join(filter(None, found.group("name", "revision")))


def query_kind(place: str, folder: Path) -> Literal["local", "hub"]:
    """What a source of queries is that ``query_problem`` finds nothing wrong with: ``org/name``, unless it names a file."""
    name, _ = split_revision(place)
    if (
        scheme_of(place)
        or _is_path(place)
        or _is((folder / place).exists)
        or Path(name).suffix.lower() in (*_OF_QUERIES, *_NOT_QUERIES)
    ):
        return "local"
    return "hub" if _DATASET.fullmatch(name) else "local"


def query_problem(place: str, folder: Path) -> str | None:
    """What is wrong with how a source of queries is written in a recipe that lies in ``folder``, with the remedy."""
    if not place.strip():
        return f"empty; give {QUERIES}"
    scheme = scheme_of(place)
    if scheme not in ("", "file"):
        page = _DATASET_PAGE.fullmatch(place)
        meant = f"write the data set as {page['name']}" if page else f"give {QUERIES}"
        return f"queries are data sets on the Hub or files of this machine, got {shown_scheme(place)}; {meant}"
    if query_kind(place, folder) == "hub":
        _, revision = split_revision(place)
        return (
            "empty revision; name a branch, tag or commit, or leave it out" if revision is not None and not revision else None
        )
    if problem := local_problem(place, folder):
        return problem
    path = local_path(place, folder)
    if _is(path.is_dir):
        return f"{path} is a folder; give a file, or several as a list"
    if path.suffix.lower() in _NOT_QUERIES:
        return f"{path.name}: expected JSON Lines, Parquet (.parquet) or text (.txt); write it as one of these"
    return None


def source_problem(place: str, folder: Path) -> str | None:
    """What is wrong with how a source is written in a recipe that lies in ``folder``, with the remedy."""
    if not place.strip():
        return f"empty source; expected {SOURCES}"
    kind = kind_of(place, folder)
    if kind == "objects":
        return object_problem(place)
    if kind is None:
        meant = _hub_suggestion(place) if scheme_of(place) in ("http", "https", "hf") else None
        got = f"sources are a Hub id, a folder, or a URL of s3, gs or az; got {shown_scheme(place)}"
        return f"{got}; write a model on the Hub as {meant}" if meant else got
    if kind == "hub" or (problem := local_problem(place, folder)):
        return None if kind == "hub" else problem
    path = local_path(place, folder)
    if _is(path.is_file):
        return f"{path} is a file; give its folder"
    if scheme_of(place) or _is_path(place) or _is(path.exists):
        return None
    name, revision = split_revision(place)
    if revision is not None and not revision.strip() and HUB_ID.fullmatch(name):
        return f"empty revision; write {name}@ with a branch, tag or commit, or {name} alone"
    meant = _hub_suggestion(place)
    return f"there is no folder {place}; write a model on the Hub as {meant}" if meant else None
