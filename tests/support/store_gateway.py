"""Stands before an object store on loopback: what is asked of it, and faults on demand."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

import pytest
from moto.server import ThreadedMotoServer

from storage import buckets

SECRET = "never-in-a-message"
"""Of a fake account; the store's own error texts hold it too."""

Step = int | str


@contextmanager
def moto_server() -> Iterator[str]:
    """The address of an object store on loopback."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()


@contextmanager
def empty_bucket(upstream: str, name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    """The one bucket of a store, and the environment that leads to it; retries are few and quick."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "anyone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.delenv("AWS_ALLOW_HTTP", raising=False)
    backoff = {"init_backoff": timedelta(milliseconds=5), "max_backoff": timedelta(milliseconds=20), "base": 2}
    monkeypatch.setattr(buckets, "RETRIES", {"max_retries": 2, "backoff": backoff, "retry_timeout": timedelta(seconds=30)})
    monkeypatch.setattr(buckets, "PAUSE_S", 0.01)
    urllib.request.urlopen(urllib.request.Request(f"{upstream}/moto-api/reset", b"", method="POST")).close()
    with Gateway(upstream).serving() as gateway:
        monkeypatch.setenv("AWS_ENDPOINT_URL", gateway.url)
        gateway.send("PUT", name)
        yield gateway
    buckets.forget_connections()


class Gateway(ThreadingHTTPServer):
    """Records requests to ``upstream``, an address of moto, and does what the scripts say, one step per request."""

    daemon_threads = True

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = upstream
        self.scripts: defaultdict[str, list[Step]] = defaultdict(list)
        """By operation, as S3 names it (GET, HEAD, DELETE and PUT for those of one object). A status to answer with, or one
        with a code as in '503 SlowDown'; 'cut' to send half of the body, 'short' to send half of it as if it were all,
        'hang up' to send nothing, in the middle of what comes; 'lost' to do it and send nothing; 'no If-Match' to drop the
        condition as some stores do; 'pass' to change nothing."""
        self.seen: list[tuple[str, str | None]] = []
        """Path and Range of each GET."""
        self.asked: list[str] = []
        """The operation of each request."""
        self._taking = threading.Lock()

    @property
    def script(self) -> list[Step]:
        """That of GET, which listings are too."""
        return self.scripts["GET"]

    @script.setter
    def script(self, steps: list[Step]) -> None:
        self.scripts["GET"] = steps

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @contextmanager
    def serving(self) -> Iterator[Self]:
        """Answer until the end of the block."""
        thread = threading.Thread(target=self.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield self
        finally:
            self.shutdown()
            thread.join()
            self.server_close()

    def next_step(self, operation: str) -> Step:
        with self._taking:
            self.asked.append(operation)
            steps = self.scripts[operation]
            return steps.pop(0) if steps else "pass"

    def put(self, key: str, content: bytes) -> None:
        self.send("PUT", key, content)

    def delete(self, key: str) -> None:
        self.send("DELETE", key)

    def send(self, method: str, key: str, content: bytes | None = None) -> bytes:
        # urllib's own type is that of a form, which moto would parse; without any signature it lets nothing be replaced
        headers = {
            "Content-Type": "application/octet-stream",
            "Authorization": "AWS4-HMAC-SHA256 Credential=x/20260101/us-east-1/s3/aws4_request",
        }
        request = urllib.request.Request(f"{self.upstream}/{key}", content, headers, method=method)
        with urllib.request.urlopen(request) as response:
            found: bytes = response.read()
        return found

    def uploads(self, bucket: str) -> int:
        """Uploads that were begun and neither completed nor aborted."""
        return self.send("GET", f"{bucket}?uploads").count(b"<UploadId>")

    def ranges(self, key: str) -> list[str | None]:
        return [asked for path, asked in self.seen if path.endswith(f"/{key}")]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Gateway

    def log_message(self, *arguments: Any) -> None:
        """Nothing is printed."""

    def do_GET(self) -> None:
        self.server.seen.append((self.path.partition("?")[0], self.headers.get("Range")))
        self.pass_on("GET")

    def do_HEAD(self) -> None:
        self.pass_on("HEAD")

    def do_DELETE(self) -> None:
        self.pass_on("AbortMultipartUpload" if "uploadId=" in self.path else "DELETE")

    def do_PUT(self) -> None:
        operation = "UploadPart" if "partNumber=" in self.path else "PUT"
        self.pass_on("CopyObject" if self.headers.get("x-amz-copy-source") else operation)

    def do_POST(self) -> None:
        query = self.path.partition("?")[2]
        completes = "CompleteMultipartUpload" if "uploadId=" in query else "CreateMultipartUpload"
        self.pass_on("DeleteObjects" if query.startswith("delete") else completes)

    def pass_on(self, operation: str) -> None:
        step = self.server.next_step(operation)
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length // 2 if step == "hang up" else length)
        if step == "hang up":
            self.close_connection = True
            return
        status, _, code = str(step).partition(" ")
        if status.isdigit():
            text = f"<Error><Code>{code or 'Scripted'}</Code><Message>{SECRET}</Message></Error>"
            self.answer(int(status), {}, text.encode())
            return
        found, headers, content = self.ask(body, keeps_condition=step != "no If-Match")
        if step == "lost":
            self.close_connection = True
            return
        self.answer(found, headers, content[: len(content) // 2] if step == "short" else content, is_cut=step == "cut")

    def ask(self, body: bytes, *, keeps_condition: bool) -> tuple[int, dict[str, str], bytes]:
        """What the store upstream answers."""
        passed = {name: value for name, value in self.headers.items() if name.lower() not in ("host", "connection", "if-match")}
        if keeps_condition and (condition := self.headers.get("If-Match")):
            passed["If-Match"] = condition
        if self.command in ("PUT", "POST"):
            passed.setdefault("Content-Type", "application/octet-stream")
        data = body if self.command in ("PUT", "POST") else None
        request = urllib.request.Request(self.server.upstream + self.path, data, passed, method=self.command)
        try:
            with urllib.request.urlopen(request) as response:
                return response.status, dict(response.headers), response.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, dict(error.headers), error.read()

    def answer(self, status: int, headers: dict[str, str], body: bytes, is_cut: bool = False) -> None:
        self.send_response_only(status)
        size = str(len(body))
        for name, value in headers.items():
            if name.lower() == "content-length" and self.command == "HEAD":
                size = value
            elif name.lower() not in ("content-length", "connection", "transfer-encoding"):
                self.send_header(name, value)
        self.send_header("Content-Length", size)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if is_cut else body)
        self.close_connection = self.close_connection or is_cut
