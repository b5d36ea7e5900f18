"""Stands before an object store on loopback: what is asked of it, and faults on demand."""

from __future__ import annotations

import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SECRET = "never-in-a-message"
"""Of a fake account; the store's own error texts hold it too."""


class Gateway(ThreadingHTTPServer):
    """Records requests to ``upstream``, an address of moto, and does what the script says, one step per request."""

    daemon_threads = True

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = upstream
        self.script: list[int | str] = []
        """A status to answer with, 'cut' to send half of the body, 'hang up' to send nothing, 'no If-Match' to
        drop the condition as some stores do, 'pass' to change nothing."""
        self.seen: list[tuple[str, str | None]] = []
        """Path and Range of each GET."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def put(self, key: str, content: bytes) -> None:
        self.send("PUT", key, content)

    def delete(self, key: str) -> None:
        self.send("DELETE", key)

    def send(self, method: str, key: str, content: bytes | None = None) -> None:
        # urllib's own type is that of a form, which moto would parse; without any signature it lets nothing be replaced
        headers = {
            "Content-Type": "application/octet-stream",
            "Authorization": "AWS4-HMAC-SHA256 Credential=x/20260101/us-east-1/s3/aws4_request",
        }
        urllib.request.urlopen(urllib.request.Request(f"{self.upstream}/{key}", content, headers, method=method)).close()

    def ranges(self, key: str) -> list[str | None]:
        return [asked for path, asked in self.seen if path.endswith(f"/{key}")]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Gateway

    def log_message(self, *arguments: Any) -> None:
        """Nothing is printed."""

    def do_GET(self) -> None:
        self.server.seen.append((self.path.partition("?")[0], self.headers.get("Range")))
        step = self.server.script.pop(0) if self.server.script else "pass"
        if step == "hang up":
            self.close_connection = True
            return
        if isinstance(step, int):
            self.answer(step, {}, f"<Error><Code>Scripted</Code><Message>{SECRET}</Message></Error>".encode())
            return
        passed = {name: value for name in ("Range", "If-Match", "Authorization") if (value := self.headers.get(name))}
        if step == "no If-Match":
            passed.pop("If-Match", None)
        request = urllib.request.Request(self.server.upstream + self.path, headers=passed)
        try:
            with urllib.request.urlopen(request) as response:
                self.answer(response.status, dict(response.headers), response.read(), is_cut=step == "cut")
        except urllib.error.HTTPError as error:
            with error:
                self.answer(error.code, dict(error.headers), error.read())

    def answer(self, status: int, headers: dict[str, str], body: bytes, is_cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if is_cut else body)
        self.close_connection = self.close_connection or is_cut
