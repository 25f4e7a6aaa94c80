"""One commit of a hub model as files in one folder: planned, fetched, resumed, verified, marked complete.

Owns: the layout `<into>/<owner>--<name>/<commit>/`, its two marks, and that one commit is downloaded once. The hub's
own client finds, authorises and streams; it keeps no half of a file over a restart, so parts are kept here.
Must not: parse the command line or answer anybody (download.py does).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lanewise.engine.sources import HUB, HUB_PATTERNS, PARTIAL
from lanewise.errors import ConfigError

COMMIT = re.compile("[0-9a-f]{40}")
COMPLETE = ".lanewise-complete"
PARTS = ".lanewise-parts"
THREADS = 4  # files at once
READ_BYTES = 4 * 1024 * 1024
LOCK_S = 6 * 3600.0  # for another process that downloads the same commit
LOCK_POLL_S = 1.0
API_S = 30.0


class DownloadFailed(Exception):
    """What another try may cure: the network, the hub, a full disk."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    path: str
    size: int
    sha256: str  # of large files; empty for the others
    git_oid: str  # sha1 of a git blob; of small files


@dataclass(slots=True)
class Progress:
    """What is known so far; read by another thread."""

    state: str = "resolving"  # waiting, downloading, verifying, complete, failed
    commit: str = ""
    error: str = ""
    folder: Path | None = None
    files: tuple[RemoteFile, ...] = field(default=())

    @property
    def bytes_total(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def bytes_done(self) -> int:
        """As the disk has it, so that a restart begins where the last run ended."""
        if self.folder is None:
            return 0
        return sum(min(_on_disk(self.folder, file), file.size) for file in self.files)

    def report(self) -> dict[str, object]:
        numbers = {"bytes_done": self.bytes_done, "bytes_total": self.bytes_total}
        return {"state": self.state, "commit": self.commit, **numbers, "error": self.error}


def fetch(uri: str, revision: str, into: Path, token: str | None, progress: Progress) -> dict[str, Any]:
    """The mark of the complete folder (`uri, commit, bytes, files, path`). Done before: nothing is downloaded.

    Raises ConfigError where no other try will help, DownloadFailed where one may.
    """
    repo = uri.removeprefix(HUB)
    if not uri.startswith(HUB) or repo.count("/") != 1:
        raise ConfigError(f"{uri}: write hf://owner/name")
    base = into / repo.replace("/", "--")
    if COMMIT.fullmatch(revision) and (mark := _complete(base / revision)) is not None:
        _finished(progress, base / revision, mark)  # a commit never changes: nobody needs to be asked
        return mark
    with _as_ours(uri, revision):
        from huggingface_hub import HfApi

        api = HfApi(token=token or False)
        progress.commit = commit = api.model_info(repo, revision=revision, timeout=API_S).sha or ""
        progress.folder = folder = base / commit
        folder.mkdir(parents=True, exist_ok=True)
        progress.state = "waiting"
        with _lock(base / f".{commit}.lock"):
            mark = _complete(folder)
            if mark is None:
                progress.files = _plan(api, uri, repo, commit)
                mark = _download(api, uri, repo, folder, progress)
        _finished(progress, folder, mark)
        return mark


# ---------------------------------------------------------------- parts


def _finished(progress: Progress, folder: Path, mark: dict[str, Any]) -> None:
    progress.files = tuple(RemoteFile(name, size, "", "") for name, size in mark["files"].items())
    progress.folder, progress.commit, progress.state = folder, mark["commit"], "complete"


def _complete(folder: Path) -> dict[str, Any] | None:
    try:
        mark = json.loads((folder / COMPLETE).read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        return None  # not ours, or of a disk that lost it: everything is looked at again
    return mark if isinstance(mark, dict) and isinstance(mark.get("files"), dict) else None


def _plan(api: Any, uri: str, repo: str, commit: str) -> tuple[RemoteFile, ...]:
    files = []
    for entry in api.list_repo_tree(repo, recursive=True, revision=commit):
        if hasattr(entry, "size") and any(fnmatch(entry.path, pattern) for pattern in HUB_PATTERNS):
            sha256 = entry.lfs.sha256 if entry.lfs is not None else ""
            files.append(RemoteFile(entry.path, entry.size, sha256, "" if sha256 else entry.blob_id))
    names = [file.path for file in files]
    for wanted in ("config.json", "*.safetensors"):
        if not any(fnmatch(name, wanted) for name in names):
            raise ConfigError(f"{uri} at {commit} has no {wanted}, so it is no model this version can serve")
    return tuple(sorted(files, key=lambda file: -file.size))


def _download(api: Any, uri: str, repo: str, folder: Path, progress: Progress) -> dict[str, Any]:
    (folder / PARTIAL).touch()
    missing = progress.bytes_total - progress.bytes_done
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise DownloadFailed(f"{missing} bytes are missing and {free} are free under {folder}")
    progress.state = "downloading"
    with ThreadPoolExecutor(THREADS) as pool:
        # list() raises what the first failed file raised; the others end with their current one
        list(pool.map(lambda file: _file(api, repo, progress.commit, folder, file), progress.files))
    mark = {
        "uri": uri,
        "commit": progress.commit,
        "bytes": progress.bytes_total,
        "path": str(folder),
        "files": {file.path: file.size for file in progress.files},
    }
    shutil.rmtree(folder / PARTS, ignore_errors=True)
    (folder / PARTIAL).unlink()
    _write_durably(folder / COMPLETE, json.dumps(mark))
    return mark


def _file(api: Any, repo: str, commit: str, folder: Path, file: RemoteFile) -> None:
    """One file, from where the last run left it. A file at its place has been verified."""
    place, part = folder / file.path, _part(folder, file)
    if place.is_file() and place.stat().st_size == file.size:
        return
    part.parent.mkdir(exist_ok=True)
    for _ in range(2):  # a part that is damaged is fetched once more, whole
        _stream(api, repo, commit, file, part)
        if _intact(part, file):
            place.parent.mkdir(parents=True, exist_ok=True)
            part.replace(place)
            return
        part.unlink()
    raise DownloadFailed(f"{file.path}: what the hub sends is not what it says it is")


def _stream(api: Any, repo: str, commit: str, file: RemoteFile, part: Path) -> None:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get

    part.touch()
    done = part.stat().st_size
    if done >= file.size:  # complete but not verified yet; one that is too long fails there
        return
    url = hf_hub_url(repo, file.path, revision=commit, endpoint=api.endpoint)
    found = get_hf_file_metadata(url, token=api.token, timeout=API_S, endpoint=api.endpoint)
    headers = api._build_hf_headers()
    if urlparse(found.location).netloc != urlparse(url).netloc:
        headers.pop("authorization", None)  # another host gets no token of ours
    with part.open("r+b") as sink:
        sink.seek(0, os.SEEK_END)
        http_get(found.location, sink, resume_size=done, headers=headers, expected_size=file.size)
        sink.flush()
        os.fsync(sink.fileno())


def _intact(part: Path, file: RemoteFile) -> bool:
    if part.stat().st_size != file.size:
        return False
    digest = hashlib.sha256() if file.sha256 else hashlib.sha1(b"blob %d\0" % file.size)
    with part.open("rb") as source:
        while chunk := source.read(READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest() == (file.sha256 or file.git_oid)


def _part(folder: Path, file: RemoteFile) -> Path:
    return folder / PARTS / (file.path.replace("/", "--") + ".part")


def _on_disk(folder: Path, file: RemoteFile) -> int:
    for path in (folder / file.path, _part(folder, file)):
        with contextlib.suppress(OSError):
            return path.stat().st_size
    return 0


def _write_durably(path: Path, text: str) -> None:
    draft = path.with_name(path.name + ".new")
    with draft.open("w") as sink:
        sink.write(text)
        sink.flush()
        os.fsync(sink.fileno())
    draft.replace(path)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held by one process; a process that is killed lets go of it."""
    deadline = time.monotonic() + LOCK_S
    with path.open("w") as handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise DownloadFailed(f"{path}: another process has held this for {LOCK_S:g} s") from None
                time.sleep(LOCK_POLL_S)
        yield


@contextlib.contextmanager
def _as_ours(uri: str, revision: str) -> Iterator[None]:
    """The edge to the hub's client: its errors in our words."""
    from huggingface_hub import errors

    try:
        yield
    except (ConfigError, DownloadFailed):
        raise
    except errors.GatedRepoError as error:
        raise ConfigError(f"{uri} is gated: accept its terms on the hub and give a token that may read it") from error
    except errors.RepositoryNotFoundError as error:
        raise ConfigError(f"{uri}: no such model on the hub, or the token may not read it") from error
    except errors.RevisionNotFoundError as error:
        raise ConfigError(f"{uri}: no revision {revision!r}") from error
    except Exception as error:
        raise DownloadFailed(f"{uri} at {revision}: {type(error).__name__}: {error}") from error
