"""Checkpoints in an object store (S3, Google Cloud Storage, Azure): one listing, ranges of files, small files kept locally.

Credentials come from the environment of the process that reads, and lie in obstore's store object alone: no place, message or
pickle holds them. What a store says in its errors may hold signed URLs, so only its status and error codes are passed on.
obstore's threads do not survive a fork: workers are started anew (spawned), not forked.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import BaseError, InvalidPathError, PermissionDeniedError, PreconditionError, UnauthenticatedError
from obstore.store import from_url
from platformdirs import user_cache_path

from storage.atomic import write_atomically
from storage.digests import DigestCache, digest_of
from storage.errors import ChannelMergingError, CheckpointError, SourceError
from storage.places import OBJECT_STORES

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

HEAD_BYTES = 128 * 1024
"""What is fetched at once when something near the start of a file is read: a header then costs one round trip."""
SMALL_BYTES = 20_000_000
"""Files up to this size (configurations, tokenizers) are identified by their sha256, as those of a local folder are."""
RESUMES = 3
"""How often a read goes on from where it was cut, after obstore has given up on its own retries."""
RETRIES: RetryConfig = {
    "max_retries": 8,
    "backoff": {"init_backoff": timedelta(milliseconds=200), "max_backoff": timedelta(seconds=15), "base": 2},
    "retry_timeout": timedelta(minutes=2),
}

_PIECE_BYTES = 16 * 1024  # what was buffered for an unfinished piece is lost where a body is cut; larger ones are no faster
_PARALLEL = 8
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_CONTAINER_AT_HOST = re.compile(r"([a-z0-9][a-z0-9-]*@)?[A-Za-z0-9][A-Za-z0-9._-]*")
_REMEDIES = {
    "s3": (
        "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN, AWS_REGION, AWS_ENDPOINT_URL where they are "
        "needed; profiles in ~/.aws are not read), or AWS_SKIP_SIGNATURE=true for a public bucket"
    ),
    "gs": "Set GOOGLE_APPLICATION_CREDENTIALS to a key file, or GOOGLE_SKIP_SIGNATURE=true for a public bucket",
    "az": (
        "Set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN, or AZURE_SKIP_SIGNATURE=true "
        "for a public container"
    ),
}
_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w{1,60})</Code>")
_TRANSPORT = re.compile(r"HTTP error: ([A-Za-z ]{1,60})")
_NO_CREDENTIALS = ("token request", "latest/api/token", "security-credentials")
_EXPIRED = ("ExpiredToken", "InvalidToken", "TokenRefreshRequired")
_OTHER_REGION = ("incorrectly configured region", "AuthorizationHeaderMalformed", "PermanentRedirect")


@dataclass(frozen=True)
class ObjectFile:
    """An object, read by ranges of the content it had when it was listed."""

    folder: str
    """The folder's URL."""
    name: str
    size: int
    etag: str
    """In quotes, as HTTP compares it."""

    @property
    def place(self) -> str:
        return f"{self.folder}/{self.name}"

    def read_into(self, view: memoryview, offset: int) -> int:
        """Fill the view from this offset on. CheckpointError when the object is not what it was, SourceError after retries."""
        wanted = max(0, min(len(view), self.size - offset))
        if wanted and offset + wanted <= HEAD_BYTES:
            view[:wanted] = _head(self)[offset : offset + wanted]
        elif wanted:
            _fetch(self, view[:wanted], offset)
        return wanted


@dataclass(frozen=True)
class ObjectFolder:
    """The objects directly under a prefix, as they were when they were listed."""

    place: str
    files: tuple[ObjectFile, ...]
    id: str | None = None

    @property
    def is_local(self) -> bool:
        return False

    @property
    def names(self) -> frozenset[str]:
        return frozenset(file.name for file in self.files)

    def file(self, name: str) -> ObjectFile:
        """One of its files. CheckpointError when it has none of this name."""
        for file in self.files:
            if file.name == name:
                return file
        raise CheckpointError(f"{self.place}: there is no file {name}. Complete the upload.")

    def local(self, names: Iterable[str]) -> dict[str, Path]:
        """Copies in the user's cache, by ETag, so that a file is fetched once while it stays the same."""
        wanted = [self.file(name) for name in names]
        with ThreadPoolExecutor(_PARALLEL) as pool:
            return {file.name: path for file, path in zip(wanted, pool.map(_copy, wanted), strict=True)}

    def identities(self, names: Iterable[str]) -> dict[str, str]:
        """sha256 of small files, ``etag:<ETag>:<bytes>`` of large ones.

        S3's ETags are digests of content; those of other stores tell versions of one file apart, so its URL is added.
        """
        wanted = [self.file(name) for name in names]
        copies = self.local(file.name for file in wanted if file.size <= SMALL_BYTES)
        digests = DigestCache().sha256(list(copies.values()))
        found = {name: digests[path] for name, path in copies.items()}
        for file in wanted:
            if file.name not in found:
                where = [] if _family(self.place) == "s3" else [file.place]
                found[file.name] = ":".join(["etag", file.etag.strip('"'), str(file.size), *where])
        return {file.name: found[file.name] for file in wanted}

    def stamps(self, names: Iterable[str]) -> dict[str, Any]:
        """ETag and size of each file."""
        return {name: _stamp(self.file(name)) for name in names}

    def changed(self, stamps: Mapping[str, Any], identities: Mapping[str, str]) -> list[str]:
        """The names that a new listing lacks or gives another ETag or size."""
        now = {file.name: _stamp(file) for file in _listing(self.place)[0]}
        return [name for name, seen in stamps.items() if now.get(name) != list(seen)]


def open_objects(label: str, url: str) -> ObjectFolder:
    """The files directly under a URL: ``s3://bucket/prefix``, ``gs://…``, ``az://container/prefix``, ``abfss://container@host/…``.

    CheckpointError when the URL holds more than a place, when there is no such bucket or prefix, or when access is refused;
    SourceError when the store cannot be reached.
    """
    try:
        place = _place(url)
        files, folders = _listing(place)
        if not files:
            under = f"; it has the folders {', '.join(folders[:5])}" if folders else ""
            raise CheckpointError(f"{place}: no files there{under}. Give the prefix that a checkpoint's files lie under.")
    except ChannelMergingError as error:
        raise type(error)(f"{label}: {error}") from None
    return ObjectFolder(place, files)


def _place(url: str) -> str:
    """The URL without a trailing slash. What is refused is not repeated: it may be a secret."""
    scheme, separator, rest = url.partition("://")
    scheme = scheme.lower()
    if not separator or scheme not in OBJECT_STORES:
        raise CheckpointError(f"expected a URL of {', '.join(OBJECT_STORES)}, got another. Correct the source in the recipe.")
    remedy = "Give scheme, bucket and prefix alone; credentials come from the environment"
    if "?" in rest or "#" in rest:
        raise CheckpointError(f"a {scheme}:// URL with a query or a fragment is refused. {remedy}.")
    host, _, path = rest.partition("/")
    if not (_CONTAINER_AT_HOST if scheme in ("abfs", "abfss") else _HOST).fullmatch(host) or urlsplit(url).password:
        raise CheckpointError(f"a {scheme}:// URL whose bucket is empty, or that holds a user, is refused. {remedy}.")
    return f"{scheme}://{host}/{path}".rstrip("/")


def _family(place: str) -> str:
    scheme = place.partition("://")[0]
    return "s3" if scheme in ("s3", "s3a") else "gs" if scheme == "gs" else "az"


@lru_cache(maxsize=64)
def _store(place: str, endpoint: str) -> ObjectStore:
    """A process's one connection pool per place; the endpoint is part of the key as it is read from the environment here."""
    options: ClientConfig = {"timeout": timedelta(minutes=10), "read_timeout": timedelta(seconds=60)}
    if _family(place) == "s3" and endpoint.startswith("http://"):
        options["allow_http"] = True  # asked for by name, as other clients of S3 take it
    try:
        return from_url(place, client_options=options, retry_config=RETRIES)
    except (BaseError, ValueError):
        raise CheckpointError(
            f"{place}: the store's settings in the environment are incomplete or wrong. {_REMEDIES[_family(place)]}."
        ) from None


def _connected(place: str) -> ObjectStore:
    return _store(place, os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT") or "")


def _listing(place: str) -> tuple[tuple[ObjectFile, ...], list[str]]:
    """Files and folders directly under a prefix, by name."""
    try:
        found = obstore.list_with_delimiter(_connected(place))
    except InvalidPathError:
        raise CheckpointError(
            f"{place}: objects under it have names that are no paths (//, . or ..). Copy the checkpoint to a prefix of its own."
        ) from None
    except (BaseError, OSError) as error:
        if isinstance(error, FileNotFoundError) or _matched(_STATUS, error) == "404":
            raise CheckpointError(f"{place}: there is no such bucket or container. Correct the source in the recipe.") from None
        raise _failure(place, error) from None
    files = []
    for entry in found["objects"]:
        if entry["path"]:  # the object of the prefix's own name is a marker that consoles leave
            if not entry["e_tag"]:
                raise CheckpointError(
                    f"{place}: the store gives no ETags, so changes would go unseen. Copy it to a local folder."
                )
            files.append(ObjectFile(place, entry["path"], entry["size"], _quoted(entry["e_tag"])))
    return tuple(sorted(files, key=lambda file: file.name)), sorted(found["common_prefixes"])


def _quoted(etag: str) -> str:
    """As a header has it; Azure lists ETags without their quotes."""
    return etag if etag.endswith('"') else f'"{etag}"'


def _stamp(file: ObjectFile) -> list[Any]:
    return [file.etag, file.size]


@lru_cache(maxsize=64)
def _head(file: ObjectFile) -> bytes:
    """The first bytes of a file: 8 MiB for all that are kept."""
    data = bytearray(min(file.size, HEAD_BYTES))
    _fetch(file, memoryview(data), 0)
    return bytes(data)


def _fetch(file: ObjectFile, view: memoryview, offset: int) -> None:
    """Fill the view, going on from the byte where a body was cut."""
    done = 0
    failure: ChannelMergingError | None = None
    for _ in range(1 + RESUMES):
        before = done
        try:
            for piece in _body(file, offset + done, offset + len(view)):
                fits = piece[: len(view) - done]
                view[done : done + len(fits)] = fits
                done += len(fits)
        except (BaseError, OSError) as error:
            failure = _failure(file.place, error)
        if done == len(view):
            return
        if isinstance(failure, CheckpointError) or done == before:
            break
    raise failure or SourceError(
        f"{file.place}: {done} of {len(view)} bytes from byte {offset} on came, then no more. Run again."
    )


def _body(file: ObjectFile, start: int, stop: int) -> Iterable[bytes]:
    """Bytes [start, stop) in pieces, of the content that was listed or not at all."""
    store = _connected(file.folder)
    result = obstore.get(store, file.name, options={"range": (start, stop), "if_match": file.etag})
    etag = result.meta["e_tag"]
    if etag and _quoted(etag) != file.etag:  # a store that knows no If-Match
        raise CheckpointError(_changed(file.place))
    return result.stream(min_chunk_size=_PIECE_BYTES)


def _copy(file: ObjectFile) -> Path:
    """A whole local copy, in a folder named by URL and ETag."""
    path = user_cache_path("channel-merging") / "objects" / digest_of([file.place, file.etag, file.size]) / file.name
    try:
        if not path.is_file() or path.stat().st_size != file.size:
            path.parent.mkdir(parents=True, exist_ok=True)
            data = bytearray(file.size)
            file.read_into(memoryview(data), 0)
            write_atomically(path, bytes(data))
    except OSError as error:
        raise SourceError(
            f"{file.place}: no copy can be kept in {path.parent} ({error.strerror}). Set XDG_CACHE_HOME to a folder with room."
        ) from None
    return path


def _changed(place: str) -> str:
    return f"{place}: it changed since it was planned. Run again."


def _matched(pattern: re.Pattern[str], error: Exception) -> str:
    found = pattern.search(str(error))
    return found[1] if found else ""


def _failure(place: str, error: Exception) -> ChannelMergingError:
    """The error a user can act on, from what obstore says."""
    text = str(error)
    status, code = _matched(_STATUS, error), _matched(_CODE, error)
    said = ", ".join(part for part in (status and f"HTTP {status}", code) if part)
    remedy = _REMEDIES[_family(place)]
    if isinstance(error, FileNotFoundError):
        return CheckpointError(f"{place}: it is gone; it changed since it was planned. Run again.")
    if isinstance(error, PreconditionError):
        return CheckpointError(_changed(place))
    if any(hint in text for hint in _OTHER_REGION):
        return CheckpointError(f"{place}: the bucket lies in another region. Set AWS_REGION to it.")
    if any(hint in text for hint in _NO_CREDENTIALS) and not status.startswith("5"):
        return CheckpointError(f"{place}: no credentials for it were found. {remedy}.")
    if isinstance(error, (PermissionDeniedError, UnauthenticatedError)) or status in ("401", "403") or code in _EXPIRED:
        return CheckpointError(f"{place}: access is refused ({said}). {remedy}.")
    reason = said or _matched(_TRANSPORT, error).strip() or "no answer that can be read"
    return SourceError(f"{place}: the store cannot be reached, after retries ({reason}). Run again when it answers.")
