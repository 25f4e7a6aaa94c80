"""A hub on this machine: a real HTTP server that speaks what huggingface_hub asks, and counts what it is asked for.

One model repository with one commit. Throttled on demand, so that a download can be killed half-way.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse

REPO = "tales/fable"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE_BYTES = 1 << 20  # from here on a file is in LFS and has a sha256


class Hub:
    """Serves `files` as REPO at COMMIT; `main` points to it."""

    def __init__(self, files: Mapping[str, bytes], token: str = "", host: str = "127.0.0.1") -> None:
        self.files = dict(files)
        self.token = token
        self.gets: list[tuple[str, int]] = []  # (file, first byte) of every download
        self.sent: dict[str, int] = {}  # bytes of each file that left
        self.bytes_per_s = 0.0  # 0: as fast as it goes
        self.damage: set[str] = set()  # files of which the next download is wrong
        self.down = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub._serve(self, body=True)

            def do_HEAD(self) -> None:
                hub._serve(self, body=False)

            def log_message(self, format: str, *args: object) -> None: ...

        self._server = ThreadingHTTPServer((host, 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        host, port = self._server.server_address[:2]
        return f"http://{host!s}:{port}"

    def __enter__(self) -> Hub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)

    # ------------------------------------------------------------ answers

    def _serve(self, call: BaseHTTPRequestHandler, *, body: bool) -> None:
        if self.down:
            return self._json(call, 503, {"error": "down"})
        if self.token and call.headers.get("Authorization") != f"Bearer {self.token}":
            return self._json(call, 401, {"error": "who are you"}, {"X-Error-Code": "RepoNotFound"})
        path = unquote(urlparse(call.path).path)
        if match := re.fullmatch(rf"/api/models/{REPO}(?:/revision/(.+))?", path):
            if match[1] not in (None, "main", COMMIT):
                return self._json(call, 404, {"error": "?"}, {"X-Error-Code": "RevisionNotFound"})
            siblings = [{"rfilename": name} for name in self.files]
            return self._json(call, 200, {"_id": "1", "id": REPO, "sha": COMMIT, "siblings": siblings, "tags": []})
        if path == f"/api/models/{REPO}/tree/{COMMIT}":
            return self._json(call, 200, [_entry(name, data) for name, data in self.files.items()])
        if match := re.fullmatch(rf"/{REPO}/resolve/{COMMIT}/(.+)", path):
            return self._file(call, match[1], body)
        return self._json(call, 404, {"error": path}, {"X-Error-Code": "RepoNotFound"})

    def _json(
        self, call: BaseHTTPRequestHandler, status: int, said: object, headers: Mapping[str, str] | None = None
    ) -> None:
        data = json.dumps(said).encode()
        call.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(data), **(headers or {})}.items():
            call.send_header(name, str(value))
        call.end_headers()
        if call.command != "HEAD":
            call.wfile.write(data)

    def _file(self, call: BaseHTTPRequestHandler, name: str, body: bool) -> None:
        data = self.files[name]
        first = 0
        if (wanted := call.headers.get("Range")) and body:
            first = int(wanted.removeprefix("bytes=").rstrip("-"))
        call.send_response(206 if first else 200)
        call.send_header("ETag", f'"{_entry(name, data)["oid"]}"')
        call.send_header("X-Repo-Commit", COMMIT)
        call.send_header("Accept-Ranges", "bytes")
        call.send_header("Content-Length", str(len(data) - first))
        if first:
            call.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        call.end_headers()
        if not body:
            return
        self.gets.append((name, first))
        if name in self.damage:
            self.damage.discard(name)
            data = data[:-1] + bytes([data[-1] ^ 1])
        self._send(call, name, data[first:])

    def _send(self, call: BaseHTTPRequestHandler, name: str, data: bytes) -> None:
        step = 64 * 1024
        try:
            for start in range(0, len(data), step):
                call.wfile.write(data[start : start + step])
                self.sent[name] = self.sent.get(name, 0) + len(data[start : start + step])
                if self.bytes_per_s:
                    time.sleep(step / self.bytes_per_s)
        except OSError:
            call.close_connection = True  # the client was killed


def _entry(name: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data)}
    entry["oid"] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    if len(data) >= LARGE_BYTES:
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry
