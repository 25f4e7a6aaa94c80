"""`python -m lanewise.engine.download`: fetches one model into a folder that workers then mount read-only.

The operator runs it as a Job, once per resolved commit. Owns: the command line, `GET /progress` while it runs, and the
last word in the pod's termination message, so that nobody needs a right to write anywhere in the cluster.
Must not: know what a model is (hub_files.py fetches, the engine reads).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from lanewise.early_stop import end_on_sigterm
from lanewise.engine.hub_files import DownloadFailed, Progress, fetch
from lanewise.errors import ConfigError

TERMINATION_LOG = "/dev/termination-log"
TERMINATION_BYTES = 4096  # what the kubelet keeps
AGAIN, HOPELESS = 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0: the folder is complete. 1: try again. 2: no other try will help until something is changed."""
    options = _parse(argv)
    end_on_sigterm()  # what is on the disk by then is what the next run begins with
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    progress = Progress()
    try:
        with _answering(options.progress, progress):
            mark = fetch(options.uri, options.revision, options.into, _token(options.token_file), progress)
    except (ConfigError, DownloadFailed) as error:
        progress.state, progress.error = "failed", str(error)
        print(f"lanewise: {error}", file=sys.stderr)
        _last_words(options.termination_log, {"error": str(error)[: TERMINATION_BYTES // 2]})
        return HOPELESS if isinstance(error, ConfigError) else AGAIN
    said = {name: mark[name] for name in ("commit", "bytes", "path")}
    print(json.dumps(said))
    _last_words(options.termination_log, said)
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m lanewise.engine.download",
        description="Download one model into <into>/<owner>--<name>/<commit>/ and mark it complete.",
        epilog="example:\n  python -m lanewise.engine.download --uri hf://Qwen/Qwen2.5-0.5B --into /models",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--uri", required=True, help="hf://owner/name")
    parser.add_argument("--revision", default="main", help="branch, tag or commit (default main)")
    parser.add_argument("--into", required=True, type=Path, metavar="DIR")
    parser.add_argument("--progress", default="", metavar="HOST:PORT", help="answer GET /progress here meanwhile")
    parser.add_argument("--token-file", type=Path, help="holds the hub's token; default: $HF_TOKEN")
    parser.add_argument("--termination-log", type=Path, default=Path(TERMINATION_LOG), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _token(file: Path | None) -> str | None:
    if file is None:
        return os.environ.get("HF_TOKEN") or None
    try:
        return file.read_text().strip() or None
    except OSError as error:
        raise ConfigError(f"--token-file {file}: {error.strerror}") from error


def _last_words(path: Path, said: dict[str, object]) -> None:
    """Only where the kubelet has put the file: elsewhere nobody reads it."""
    if path.exists():
        with contextlib.suppress(OSError):
            path.write_text(json.dumps(said))


@contextlib.contextmanager
def _answering(address: str, progress: Progress) -> Iterator[None]:
    if not address:
        yield
        return
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        raise ConfigError(f"--progress {address!r} is not host:port")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.path == "/progress"
            body = json.dumps(progress.report()).encode() if known else b""
            self.send_response(200 if known else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Asked every few seconds: not worth a line."""

    try:
        server = ThreadingHTTPServer((host or "0.0.0.0", int(port)), Handler)
    except OSError as error:
        raise ConfigError(f"--progress: cannot listen on {address}: {error}") from error
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5.0)


if __name__ == "__main__":
    raise SystemExit(main())
