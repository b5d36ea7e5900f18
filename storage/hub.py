"""Checkpoints on the Hugging Face Hub: a revision pinned to its commit, files streamed by ranges.

Only here and in ``hub_errors`` is its client used. Tokens, cache and endpoint are the client's own (``HF_TOKEN`` or a login,
``HF_HOME``, ``HF_ENDPOINT``, ``HF_HUB_OFFLINE``). Of these only the endpoint travels with a file; a token is looked up anew by
each process for each request.

The Hub counts requests for files, and answers those for large ones with redirects to signed addresses on another host. A
process asks for a file's address once for many ranges, and without a range: signed for one, it would serve no other.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from http import HTTPStatus
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar
from urllib.parse import quote, urljoin, urlsplit

import httpx2
from huggingface_hub import constants, errors, get_session, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # it loads them lazily, from a table of names
    build_hf_headers,
    hf_raise_for_status,
    tqdm,
    validate_repo_id,
)

from storage.digests import sha256_file
from storage.errors import CheckpointError
from storage.files import Folder, LocalFile, LocalFolder
from storage.hub_errors import LOST, NOT_CONNECTED, RETRIES, answer, asked_wait, is_passing, is_refusal

WAIT_S = 1.0
"""Before the first retry; doubled for each further one, up to 8 s. What the server asks for counts instead."""
KEPT_S = 600.0
"""How long the address of a file is kept. The Hub signs them for an hour."""
HEAD_BYTES = 128 * 1024
"""The start of a file that is fetched at once and kept: a safetensors header is read in two pieces and mostly fits."""
HEADS = 64
"""Starts of files kept per process: 8 MiB."""
FETCHED_BYTES = 20_000_000
"""Files without a known sha256 up to this size are fetched to compute it; larger ones go by their Git blob."""
DOWNLOADS = 8
"""Whole files fetched at the same time."""

LIBRARY = "channel-merging"
"""As the Hub's statistics name it."""
MAX_WAIT_S = 8.0
MAX_REDIRECTS = 20
CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")

_LINKS: dict[HubFile, _Link] = {}
"""Where this process reads files. Signed addresses are secrets: they are neither pickled nor shown."""
_WHOLE: dict[HubFile, threading.Lock] = {}
"""Files whose server does not answer ranges, as this process found out, and who downloads each."""
_T = TypeVar("_T")
_NO_BAR: Any = partial(tqdm, disable=True)  # the run has a bar of its own


@dataclass(frozen=True)
class Entry:
    """A file as a commit lists it."""

    name: str
    size: int
    sha256: str | None
    """Hex, for files in LFS."""
    blob: str | None
    """The Git object's id."""


@dataclass(frozen=True)
class HubFile:
    """A file of a commit on the Hub."""

    repo: str
    commit: str
    name: str
    size: int
    endpoint: str

    @property
    def place(self) -> str:
        return f"{self.repo}@{self.commit}/{self.name}"

    @property
    def url(self) -> str:
        return hf_hub_url(self.repo, self.name, revision=self.commit, endpoint=self.endpoint)

    def cached(self) -> Path | None:
        """The copy in the client's cache, where there is a whole one."""
        found = try_to_load_from_cache(self.repo, self.name, revision=self.commit)
        path = Path(found) if isinstance(found, str) else None
        return path if path is not None and path.stat().st_size == self.size else None

    def read_into(self, view: memoryview, offset: int) -> int:
        view = view[: max(self.size - offset, 0)]
        if not view:
            return 0
        if path := self.cached():
            return LocalFile(path, self.size).read_into(view, offset)
        if offset + len(view) <= HEAD_BYTES:
            view[:] = _head(self)[offset : offset + len(view)]
        else:
            _read(self, view, offset)
        return len(view)

    def download(self) -> Path:
        """A whole copy in the client's cache, fetched where there is none."""

        def fetch() -> Path:
            options: dict[str, Any] = {"endpoint": self.endpoint, "library_name": LIBRARY, "tqdm_class": _NO_BAR}
            return Path(hf_hub_download(self.repo, self.name, revision=self.commit, **options))

        # the client repeats neither a 5xx nor a reset connection once the body was asked for
        path = answer(self.place, self, lambda: persistently(fetch))
        if (size := path.stat().st_size) != self.size:
            problem = f"expected {self.size} bytes, its copy {path} has {size}. Delete it and run again."
            raise CheckpointError(f"{self.place}: {problem}")
        return path


@dataclass(frozen=True)
class HubFolder:
    """The files at the top level of a commit on the Hub."""

    repo: str
    commit: str
    endpoint: str
    entries: tuple[Entry, ...]

    @property
    def place(self) -> str:
        return f"{self.repo}@{self.commit}"

    @property
    def id(self) -> str | None:
        return self.commit

    @property
    def is_local(self) -> bool:
        return False

    @property
    def names(self) -> frozenset[str]:
        return frozenset(entry.name for entry in self.entries)

    def entry(self, name: str) -> Entry:
        """A file by its name. CheckpointError when there is none."""
        for entry in self.entries:
            if entry.name == name:
                return entry
        raise CheckpointError(f"{self.place} has no file {name}. Is it the right repository and revision?")

    def file(self, name: str) -> HubFile:
        return HubFile(self.repo, self.commit, name, self.entry(name).size, self.endpoint)

    def local(self, names: Iterable[str]) -> dict[str, Path]:
        files = [self.file(name) for name in names]
        with ThreadPoolExecutor(DOWNLOADS) as pool:
            return {file.name: path for file, path in zip(files, pool.map(HubFile.download, files), strict=True)}

    def identities(self, names: Iterable[str]) -> dict[str, str]:
        entries = [self.entry(name) for name in names]
        known = {entry.name: entry.sha256 or f"git:{entry.blob}" for entry in entries}
        fetched = self.local(
            entry.name for entry in entries if entry.sha256 is None and (entry.size <= FETCHED_BYTES or entry.blob is None)
        )
        return known | {name: sha256_file(path) for name, path in fetched.items()}

    def stamps(self, names: Iterable[str]) -> dict[str, Any]:
        return {}

    def changed(self, stamps: Mapping[str, Any], identities: Mapping[str, str]) -> list[str]:
        return []


@dataclass(frozen=True)
class CachedFolder(LocalFolder):
    """A commit in the client's cache, for a run without network."""

    repo: str = ""

    @property
    def place(self) -> str:
        return f"{self.repo}@{self.id}"


def open_hub(label: str, repo: str, revision: str | None) -> Folder:
    """A repository's files at the commit that a revision (branch, tag, commit, ``refs/pr/1``) names now; None is ``main``.

    One request, two where the repository is gated or the endpoint lists no sizes; none when the client is offline.
    CheckpointError when there is no such repository or revision or it may not be read, SourceError when the Hub cannot be
    reached after retries.
    """
    subject = f"{label}: {repo}" if revision is None else f"{label}: {repo}@{revision}"
    asked = HubFolder(repo, revision or constants.DEFAULT_REVISION, endpoint_of(label), ())
    answer(subject, asked, lambda: validate_repo_id(repo))
    if constants.is_offline_mode():
        return answer(subject, asked, lambda: _cached_folder(asked))
    return answer(subject, asked, lambda: _listed_folder(asked, revision))


def endpoint_of(label: str) -> str:
    """The Hub's address. Read when it is needed: the client reads it once, at import."""
    endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
    if "@" in urlsplit(endpoint).netloc:
        raise CheckpointError(f"{label}: HF_ENDPOINT holds a user or a password. Take it out; a Hub is asked with HF_TOKEN.")
    return endpoint


def request_options(to_hub: bool = True, **headers: str) -> dict[str, Any]:
    """Of each request. The token, where there is one, goes to the endpoint alone: redirects elsewhere lose it."""
    own = build_hf_headers(library_name=LIBRARY, token=None if to_hub else False)
    return {"headers": {**own, "Accept-Encoding": "identity", **headers}, "timeout": constants.HF_HUB_DOWNLOAD_TIMEOUT}


def _listed_folder(asked: HubFolder, revision: str | None) -> HubFolder:
    from huggingface_hub import get_hf_file_metadata

    at_revision = "" if revision is None else f"/revision/{quote(revision, safe='')}"

    def request() -> dict[str, Any]:
        url = f"{asked.endpoint}/api/models/{asked.repo}{at_revision}"
        response = get_session().get(url, params={"blobs": True}, follow_redirects=True, **request_options())
        hf_raise_for_status(response)
        found = response.json()
        if not isinstance(found, dict) or not isinstance(found.get("sha"), str):
            raise ValueError("no commit in its answer")
        return found

    info = persistently(request)
    entries = tuple(_entry(sibling) for sibling in info.get("siblings") or [] if _is_top_level(sibling["rfilename"]))
    if any(entry is None for entry in entries):
        entries = _tree(asked, info["sha"])
    folder = HubFolder(asked.repo, info["sha"], asked.endpoint, tuple(entry for entry in entries if entry is not None))
    if info.get("gated") and entries:  # the listing is for everybody: whether its files may be read shows with the first
        get_hf_file_metadata(folder.file(folder.entries[0].name).url, endpoint=asked.endpoint, retry_on_errors=True)
    return folder


def _is_top_level(name: str) -> bool:
    """Whether it is a file beside config.json; a name that could lead elsewhere on this machine is not one."""
    return Path(name).name == name and "\\" not in name and name != ".."


def _entry(sibling: Mapping[str, Any]) -> Entry | None:
    """A file of a listing; None when it lacks the size."""
    lfs = sibling.get("lfs") or {}
    size = lfs.get("size", sibling.get("size"))
    return None if size is None else Entry(sibling["rfilename"], size, lfs.get("sha256"), sibling.get("blobId"))


def _tree(asked: HubFolder, commit: str) -> tuple[Entry, ...]:
    """The listing of mirrors that leave sizes out of the first one."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    listing = HfApi(endpoint=asked.endpoint, library_name=LIBRARY).list_repo_tree(asked.repo, revision=commit)
    return tuple(
        Entry(file.path, file.lfs.size if file.lfs else file.size, file.lfs.sha256 if file.lfs else None, file.blob_id)
        for file in listing
        if isinstance(file, RepoFile) and _is_top_level(file.path)
    )


def _cached_folder(asked: HubFolder) -> CachedFolder:
    from huggingface_hub import snapshot_download

    try:
        path = Path(snapshot_download(asked.repo, revision=asked.commit, local_files_only=True))
    except errors.IncompleteSnapshotError as error:  # a part of the repository was downloaded: it may be all that is needed
        path = Path(error.snapshot_path)
    return CachedFolder(path, path.name, asked.repo)


@lru_cache(maxsize=HEADS)
def _head(file: HubFile) -> bytes:
    data = bytearray(min(file.size, HEAD_BYTES))
    _read(file, memoryview(data), 0)
    return bytes(data)


def _read(file: HubFile, view: memoryview, offset: int) -> None:
    """Fill the view from the network, or from a whole copy where the server does not answer ranges."""
    if file not in _WHOLE and answer(file.place, file, lambda: _stream(file, view, offset)):
        return
    with _WHOLE.setdefault(file, threading.Lock()):
        path = file.download()
    LocalFile(path, file.size).read_into(view, offset)


@dataclass
class _Link:
    """Where a file lies, as the Hub said last."""

    address: str = field(default="", repr=False)
    until: float = 0.0
    """By the monotonic clock."""
    lock: threading.Lock = field(default_factory=threading.Lock)


def _address(file: HubFile, refused: str | None = None) -> str:
    """Where to read a file: its own URL when the Hub serves it. Kept for a time, and until it is ``refused``."""
    link = _LINKS.setdefault(file, _Link())
    is_mine = link.lock.acquire(timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)  # else threads without network wait in a row
    try:
        if link.address in ("", refused) or monotonic() > link.until:
            link.address, link.until = _resolved(file), monotonic() + KEPT_S
        return link.address
    finally:
        if is_mine:
            link.lock.release()


def _resolved(file: HubFile) -> str:
    """Where the Hub redirects readers of a file to; the file's own URL when it does not."""
    url, home = file.url, httpx2.URL(file.url)
    for _ in range(MAX_REDIRECTS):
        response = get_session().head(url, follow_redirects=False, **request_options())
        hf_raise_for_status(response)
        if not response.has_redirect_location:
            return file.url
        url = urljoin(url, response.headers["Location"])
        target = httpx2.URL(url)
        if target.netloc != home.netloc or target.scheme not in (home.scheme, "https"):  # renamed repositories stay on it
            return url
    raise httpx2.TooManyRedirects(f"more than {MAX_REDIRECTS} redirects")


def _at_address(file: HubFile, transfer: Callable[[str], _T]) -> _T:
    """What a transfer from a file's address returns, made again from a new one when it is refused there."""
    address = _address(file)
    try:
        return transfer(address)
    except (errors.HfHubHTTPError, *NOT_CONNECTED) as error:
        if not is_refusal(error):
            raise
    return transfer(_address(file, refused=address))


def _stream(file: HubFile, view: memoryview, offset: int) -> bool:
    """Fill the view by ranged requests, going on where a connection was cut. False when the server does not answer ranges."""
    done = 0

    def transfer(address: str) -> bool:
        nonlocal done
        start = offset + done
        options = request_options(address == file.url, Range=f"bytes={start}-{offset + len(view) - 1}")
        with get_session().stream("GET", address, follow_redirects=True, **options) as response:
            if response.status_code != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                hf_raise_for_status(response)
            if _first_byte(file, response) != start:
                return False
            for chunk in response.iter_raw():
                taken = chunk[: len(view) - done]
                view[done : done + len(taken)] = taken
                done += len(taken)
                if done == len(view) and response.status_code == HTTPStatus.OK:
                    break  # the file's start was wanted and the whole file comes
        if done < len(view):
            raise httpx2.RemoteProtocolError(f"the answer ended at byte {offset + done}")
        return True

    return persistently(lambda: _at_address(file, transfer), lambda: done)


def _first_byte(file: HubFile, response: httpx2.Response) -> int | None:
    """The byte of the file that an answer begins with, None when it is none. CheckpointError when the size is another."""
    headers = response.headers
    if headers.get("Content-Encoding", "identity") != "identity":
        return None
    first: int | None = 0
    size = headers.get("Content-Length", "*")
    if response.status_code != HTTPStatus.OK:
        found = CONTENT_RANGE.match(headers.get("Content-Range", ""))
        first = int(found[1]) if found else None
        size = found[2] if found else headers.get("Content-Range", "*").rpartition("/")[2]
    if size not in ("*", str(file.size)):
        raise CheckpointError(
            f"{file.place}: expected the {file.size} bytes its commit lists, {file.endpoint} has {size}. Is it a faulty mirror?"
        )
    return first


def persistently(request: Callable[[], _T], progress: Callable[[], int] = int) -> _T:
    """What a request returns, made again when its connection is lost or the server is busy.

    Attempts that made progress do not count.
    """
    failures = 0
    while True:
        before = progress()
        try:
            return request()
        except (errors.HfHubHTTPError, RuntimeError, *LOST) as error:
            failures = failures + 1 if progress() == before else 0
            if failures > RETRIES or not is_passing(error):
                raise
            wait = asked_wait(error) or min(WAIT_S * 2 ** max(failures - 1, 0), MAX_WAIT_S)
        time.sleep(wait)
