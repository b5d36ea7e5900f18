"""A Hub on loopback: its API, files, redirects to a second server, and faults on demand, over folders of this machine."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import struct
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

API = re.compile(
    r"/api/(?:models/|(?=datasets/))(?P<repo>(?:datasets/)?[^/]+(?:/[^/]+)?)"
    r"(?:/(?P<verb>revision|tree|paths-info)/(?P<revision>[^/]+)(?:/(?P<under>.+))?)?/?"
)
RESOLVE = re.compile(r"/(?P<repo>(?:datasets/)?[^/]+(?:/[^/]+)?)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
RANGE = re.compile(r"bytes=(\d+)-(\d*)")
LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".model", ".parquet")
INVALID = "Invalid credentials in Authorization header"
RESET = struct.pack("ii", 1, 0)
LFS_BYTES = 10_000_000
"""Files that are larger, or end so, are in LFS and come from the second server."""


def hub_environment(url: str, cache: Path) -> dict[str, str]:
    """The environment of a process that uses the Hub at ``url`` with a cache and a login of its own."""
    own = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
    return own | {"HF_ENDPOINT": url, "HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}


@dataclass
class Request:
    """One request as it came, and what was answered."""

    server: str
    """'hub' or 'cdn'."""
    method: str
    path: str
    range: str | None
    has_token: bool
    status: int = 0
    sent: int = 0
    """Bytes of the body."""


@dataclass
class Fault:
    """What goes wrong with the next ``times`` requests whose 'SERVER METHOD PATH' the pattern is found in."""

    pattern: str
    times: int
    status: int | None = None
    text: str = "scripted fault"
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: int | None = None
    """Bytes of the body after which the connection ends."""
    reset: bool = False
    """Whether it ends by a reset, even before any answer when ``cut`` is None."""
    most: int | None = None
    """Bytes that a range is answered with at most."""
    lie: int | None = None
    """The file's size as the answer has it."""


@dataclass
class Repository:
    """A repository: commits are folders, revisions name them."""

    commits: dict[str, Path]
    revisions: dict[str, str]
    private: bool = False
    gated: bool = False
    disabled: bool = False

    def commit(self, revision: str) -> str | None:
        if revision in self.revisions:
            return self.revisions[revision]
        return next((commit for commit in self.commits if len(revision) > 6 and commit.startswith(revision)), None)


class HubServer:
    """Serves ``folder/org/name`` as repositories ``org/name``, and those that are added; ``datasets/org/name`` is a data set.

    ``hash_content=False`` makes up the sha256 of LFS files from their names and sizes: for large files that nobody reads whole.
    ``ranges``, ``sizes`` and ``redirects`` take abilities away. Bearer tokens other than ``token`` are refused. Addresses on
    the second server are signed as the Hub's are: until ``expire``, and for the one range that they were asked with, if any.
    """

    def __init__(self, folder: Path | None = None, *, token: str = "hf_good", hash_content: bool = True) -> None:
        self.token = token
        self.hash_content = hash_content
        self.ranges = self.sizes = self.redirects = True
        self.repos: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.leaks: list[str] = []
        """Requests of the second server that a token came with."""
        self.signature = "secret-1"
        self._faults: list[Fault] = []
        self.errors: list[BaseException] = []
        """Of the server itself; raised when it is left."""
        self._lock = threading.Lock()
        self._digests: dict[Path, str] = {}
        for path in sorted(folder.glob("*/*")) if folder is not None else ():
            if path.is_dir():
                self.add_repo(f"{path.parent.name}/{path.name}", path)
        self._servers = {name: _Server(self, name) for name in ("hub", "cdn")}
        self.url, self.cdn_url = (f"http://127.0.0.1:{server.server_port}" for server in self._servers.values())

    def __enter__(self) -> Self:
        self._threads = [threading.Thread(target=server.serve_forever, args=(0.01,)) for server in self._servers.values()]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for server in self._servers.values():
            server.shutdown()
            server.disconnect()
            server.server_close()
        for thread in self._threads:
            thread.join()
        if self.errors and error is None:
            raise self.errors[0]

    def add_repo(
        self,
        repo: str,
        folder: Path,
        *,
        private: bool = False,
        gated: bool = False,
        disabled: bool = False,
        revisions: Mapping[str, Path] | None = None,
    ) -> str:
        """Serve a folder as a repository's ``main``, others as its further revisions; returns the commit of ``main``."""
        folders = {"main": folder, **(revisions or {})}
        named = {name: hashlib.sha1(f"{repo} {path}".encode()).hexdigest() for name, path in folders.items()}
        commits = {named[name]: path for name, path in folders.items()}
        self.repos[repo] = Repository(commits, named, private, gated, disabled)
        return named["main"]

    def fail(self, pattern: str, times: int = 1, **how: Any) -> None:
        """Script a fault (see ``Fault``) for requests such as 'cdn GET /org/name/…'."""
        self._faults.append(Fault(pattern, times, **how))

    def expire(self) -> None:
        """Invalidate the addresses that were signed so far."""
        self.signature = f"secret-{int(self.signature.removeprefix('secret-')) + 1}"

    def asked(self, pattern: str) -> list[Request]:
        """The requests whose 'SERVER METHOD PATH' the pattern is found in."""
        with self._lock:
            return [seen for seen in self.requests if re.search(pattern, f"{seen.server} {seen.method} {seen.path}")]

    def forget(self) -> None:
        """Empty the log."""
        with self._lock:
            self.requests.clear()

    def received(self, request: Request) -> Fault | None:
        """Log a request and take the fault that is due."""
        with self._lock:
            self.requests.append(request)
            if request.server == "cdn" and request.has_token:
                self.leaks.append(request.path)
            for fault in self._faults:
                if fault.times and re.search(fault.pattern, f"{request.server} {request.method} {request.path}"):
                    fault.times -= 1
                    return fault
        return None

    def sha256(self, path: Path) -> str:
        """Of an LFS file, computed once, or made up."""
        with self._lock:
            if path not in self._digests:
                if self.hash_content:
                    with path.open("rb") as file:
                        self._digests[path] = hashlib.file_digest(file, "sha256").hexdigest()
                else:
                    self._digests[path] = hashlib.sha256(f"{path} {path.stat().st_size}".encode()).hexdigest()
            return self._digests[path]

    def is_lfs(self, path: Path) -> bool:
        return path.suffix in LFS_SUFFIXES or path.stat().st_size > LFS_BYTES

    def blob(self, path: Path) -> tuple[str, dict[str, Any] | None]:
        """A file's Git object id, and what the Hub lists of it when it is in LFS."""
        if not self.is_lfs(path):
            content = path.read_bytes()
            return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), None
        digest, size = self.sha256(path), path.stat().st_size
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {size}\n".encode()
        lfs = {"sha256": digest, "size": size, "pointerSize": len(pointer)}
        return hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest(), lfs


class _Server(ThreadingHTTPServer):
    daemon_threads = False
    request_queue_size = 128

    def __init__(self, hub: HubServer, name: str) -> None:
        self.hub, self.name = hub, name
        self.open: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), _Handler)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self.open.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        self.open.discard(request)
        if request.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8) == RESET:
            self.close_request(request)  # an orderly end before it would be no reset
        else:
            super().shutdown_request(request)

    def disconnect(self) -> None:
        """End the connections that clients keep open, so that their threads end."""
        for connection in list(self.open):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:  # it has just ended by itself
                continue

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        if error is not None and not isinstance(error, ConnectionError | TimeoutError):
            self.hub.errors.append(error)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 64 * 1024

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Nothing: the log is a list."""

    def do_HEAD(self) -> None:
        self._handle()

    def do_GET(self) -> None:
        self._handle()

    def do_POST(self) -> None:
        self.posted = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._handle()

    def _handle(self) -> None:
        self.hub = self.server.hub
        authorization = self.headers.get("Authorization")
        self.seen = Request(self.server.name, self.command, self.path, self.headers.get("Range"), authorization is not None)
        self.fault = self.hub.received(self.seen)
        if self.fault and self.fault.status:
            return self._text(self.fault.status, self.fault.text, **self.fault.headers)
        if self.fault and self.fault.reset and self.fault.cut is None:
            return self._cut()
        address = urlsplit(self.path)
        if self.server.name == "cdn":
            if authorization is not None:
                return self._text(400, "Only one auth mechanism allowed")
            signed = {key: values[0] for key, values in parse_qs(address.query).items()}
            if signed["Signature"] != self.hub.signature or signed.get("Range", self.seen.range) != self.seen.range:
                return self._text(403, f"Auth failed for {self.hub.cdn_url}{self.path}")
            return self._file(Path(signed["file"]), {})
        if authorization not in (None, f"Bearer {self.hub.token}"):
            return self._text(401, INVALID, **{"X-Error-Message": INVALID})
        if found := API.fullmatch(address.path):
            return self._api(found, address.query)
        if found := RESOLVE.fullmatch(address.path):
            return self._resolve(found)
        return self._text(404, "no such page")

    def _commit(self, found: re.Match[str]) -> tuple[Repository, str] | None:
        """The repository and commit that are meant; else the error has been sent."""
        has_token = self.headers.get("Authorization") is not None
        repo = self.hub.repos.get(unquote(found["repo"]))
        if repo is None or (repo.private and not has_token):
            code, text = (404, "Repository not found") if has_token else (401, "Invalid username or password.")
            self._text(code, text, **{"X-Error-Code": "RepoNotFound"})
        elif repo.disabled:
            self._text(403, "disabled", **{"X-Error-Message": "Access to this resource is disabled."})
        elif (commit := repo.commit(unquote(found["revision"] or "main"))) is None:
            self._text(404, "Invalid rev id", **{"X-Error-Code": "RevisionNotFound"})
        else:
            return repo, commit
        return None

    def _api(self, found: re.Match[str], query: str) -> None:
        if (meant := self._commit(found)) is None:
            return None
        repo, commit = meant
        folder = repo.commits[commit]
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        if found["verb"] in ("tree", "paths-info"):
            return self._json(self._entries(found, folder, query))
        with_blobs = parse_qs(query).get("blobs") == ["true"] and self.hub.sizes
        siblings = [_sibling(path, folder, *(self.hub.blob(path) if with_blobs else (None, None))) for path in paths]
        name = unquote(found["repo"])
        gated = "manual" if repo.gated else False
        return self._json(
            {"id": name, "modelId": name, "sha": commit, "private": repo.private, "gated": gated, "siblings": siblings}
        )

    def _entries(self, found: re.Match[str], folder: Path, query: str) -> list[dict[str, Any]]:
        """Files and folders below one, or those that are asked for by name."""
        if found["verb"] == "paths-info":
            asked = [folder / name for name in json.loads(self.posted)["paths"]]
        else:
            is_deep = parse_qs(query).get("recursive", ["false"])[0].lower() in ("true", "1")
            asked = sorted((folder / unquote(found["under"] or "")).glob("**/*" if is_deep else "*"))
        return [
            _tree_entry(path, folder, *self.hub.blob(path))
            if path.is_file()
            else {"type": "directory", "path": path.relative_to(folder).as_posix(), "oid": "0" * 40, "size": 0}
            for path in asked
            if path.exists() and path != folder
        ]

    def _resolve(self, found: re.Match[str]) -> None:
        if (meant := self._commit(found)) is None:
            return None
        repo, commit = meant
        if repo.gated:
            code = 403 if self.headers.get("Authorization") else 401
            return self._text(code, "Access to it is restricted.", **{"X-Error-Code": "GatedRepo"})
        path = repo.commits[commit] / unquote(found["file"])
        if not path.is_file():
            return self._text(404, "Entry not found", **{"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        blob, lfs = self.hub.blob(path)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{lfs["sha256"] if lfs else blob}"'}
        if lfs:
            headers |= {"X-Linked-Size": str(lfs["size"]), "X-Linked-Etag": headers["ETag"]}
        if lfs and self.hub.redirects:
            signed = {"file": path, "Signature": self.hub.signature} | ({"Range": self.seen.range} if self.seen.range else {})
            location = f"{self.hub.cdn_url}{urlsplit(self.path).path}?{urlencode(signed)}"
            return self._text(302, "", Location=location, **headers)
        return self._file(path, headers)

    def _file(self, path: Path, headers: Mapping[str, str]) -> None:
        size = path.stat().st_size
        told = self.fault.lie if self.fault and self.fault.lie is not None else size
        asked = RANGE.fullmatch(self.headers.get("Range") or "") if self.hub.ranges else None
        if asked is None:
            return self._body(200, path, 0, size, {**headers, "Content-Length": str(told)})
        start, stop = int(asked[1]), min(int(asked[2] or told) + 1, told)
        if self.fault and self.fault.most is not None:
            stop = min(stop, start + self.fault.most)
        if start >= told:
            return self._text(416, "", **{"Content-Range": f"bytes */{told}"})
        ranged = {"Content-Range": f"bytes {start}-{stop - 1}/{told}", "Content-Length": str(stop - start)}
        return self._body(206, path, start, stop, {**headers, **ranged})

    def _body(self, status: int, path: Path, start: int, stop: int, headers: Mapping[str, str]) -> None:
        cut = self.fault.cut if self.fault else None
        count = 0 if self.command == "HEAD" else stop - start if cut is None else min(cut, stop - start)
        self._start(status, {**headers, "Accept-Ranges": "bytes" if self.hub.ranges else "none"}, count)
        if count:
            with path.open("rb") as file:
                self.connection.sendfile(file, start, count)
        if cut is not None:
            self._cut()

    def _json(self, value: Any) -> None:
        self._text(200, json.dumps(value), **{"Content-Type": "application/json"})

    def _text(self, status: int, text: str, **headers: str) -> None:
        body = b"" if self.command == "HEAD" else text.encode()
        self._start(status, {"Content-Length": str(len(text.encode())), "Content-Type": "text/plain", **headers}, len(body))
        self.wfile.write(body)
        self.wfile.flush()

    def _start(self, status: int, headers: Mapping[str, str], sent: int) -> None:
        self.seen.status, self.seen.sent = status, sent
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.flush()

    def _cut(self) -> None:
        """End the connection: a reset drops what the client has not read yet."""
        self.close_connection = True
        if self.fault and self.fault.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)


def _sibling(path: Path, folder: Path, blob: str | None, lfs: Mapping[str, Any] | None) -> dict[str, Any]:
    known = {"size": path.stat().st_size, "blobId": blob} if blob else {}
    return {"rfilename": path.relative_to(folder).as_posix(), **known, **({"lfs": lfs} if lfs else {})}


def _tree_entry(path: Path, folder: Path, blob: str, lfs: Mapping[str, Any] | None) -> dict[str, Any]:
    entry = {"type": "file", "path": path.relative_to(folder).as_posix(), "size": path.stat().st_size, "oid": blob}
    return entry | ({"lfs": {"oid": lfs["sha256"], "size": lfs["size"], "pointerSize": lfs["pointerSize"]}} if lfs else {})
