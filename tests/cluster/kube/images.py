"""OCI image archives written without a builder or a registry, from files of this machine.

Owns: the archive format and the layers' cache. Must not: decide what belongs into which image (see contents.py).
The dotted host in the names keeps the container runtime from looking on docker.io.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

REGISTRY = "registry.local"
LEFT_OUT = frozenset({"test", "tests", "idlelib", "ensurepip", "turtledemo", "tkinter"})
_LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"
_CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
_MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"


@dataclass(frozen=True)
class Layer:
    """An uncompressed tar on disk and its digest."""

    path: Path
    digest: str

    @property
    def descriptor(self) -> dict[str, object]:
        return {"mediaType": _LAYER_TYPE, "digest": self.digest, "size": self.path.stat().st_size}


@dataclass(frozen=True)
class Image:
    """`name` is complete: registry.local/NAME:TAG."""

    name: str
    layers: tuple[Layer, ...]
    env: dict[str, str] = field(default_factory=dict)
    command: tuple[str, ...] = ()
    user: str = "0:0"


class LayerWriter:
    """Adds files to a layer's tar with owners and times that do not depend on this machine."""

    def __init__(self, tar: tarfile.TarFile) -> None:
        self.tar = tar
        self.added: set[str] = set()

    def file(self, source: Path, target: str) -> None:
        """One file; a link is followed."""
        if target in self.added:
            return
        self.added.add(target)
        with source.resolve().open("rb") as content:
            self.tar.addfile(_plain(self.tar.gettarinfo(str(source.resolve()), target.strip("/"))), content)

    def tree(self, source: Path, target: str, skip: frozenset[str], keep_times: bool = False) -> None:
        """A folder with what is in it, without static libraries and names in `skip`; byte code may need its times."""

        def keep(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
            name = os.path.basename(info.name)
            return None if name in skip or name.endswith(".a") else _plain(info, keep_times)

        self.tar.add(str(source), target.strip("/"), filter=keep)

    def text(self, target: str, content: str) -> None:
        info = tarfile.TarInfo(target.strip("/"))
        info.size, info.mode = len(content.encode()), 0o644
        self.tar.addfile(info, io.BytesIO(content.encode()))

    def folder(self, target: str, mode: int = 0o755) -> None:
        info = tarfile.TarInfo(target.strip("/"))
        info.type, info.mode = tarfile.DIRTYPE, mode
        self.tar.addfile(info)

    def link(self, target: str, to: str) -> None:
        info = tarfile.TarInfo(target.strip("/"))
        info.type, info.linkname = tarfile.SYMTYPE, to
        self.tar.addfile(info)


def layer(folder: Path, name: str, key: str, fill: Callable[[LayerWriter], None]) -> Layer:
    """The layer `name` with content described by `key`; written once, older ones of the same name are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    for path in folder.glob(f"{stem}.*.tar"):
        os.utime(path)
        return Layer(path, "sha256:" + path.name.split(".")[1])
    partial = folder / f".{stem}.{os.getpid()}.partial"
    try:
        with tarfile.open(partial, "w") as tar:
            fill(LayerWriter(tar))
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    with partial.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    _drop_old(folder, name)
    path = folder / f"{stem}.{digest}.tar"
    partial.replace(path)
    return Layer(path, f"sha256:{digest}")


def archive(out: Path, images: Sequence[Image]) -> Path:
    """One archive with all images; a layer that several share is in it once."""
    blobs: dict[str, bytes] = {}
    shared = {part.digest: part for image in images for part in image.layers}
    manifests = [_manifest(image, blobs) for image in images]
    with tarfile.open(out, "w") as tar:
        index = {"schemaVersion": 2, "manifests": manifests}
        for name, content in (("oci-layout", {"imageLayoutVersion": "1.0.0"}), ("index.json", index)):
            LayerWriter(tar).text(name, json.dumps(content))
        for digest, blob in blobs.items():
            LayerWriter(tar).text(f"blobs/sha256/{digest.removeprefix('sha256:')}", blob.decode())
        for part in shared.values():
            LayerWriter(tar).file(part.path, f"blobs/sha256/{part.digest.removeprefix('sha256:')}")
    return out


def _manifest(image: Image, blobs: dict[str, bytes]) -> dict[str, object]:
    env = {"PATH": "/usr/local/bin:/usr/bin:/bin", **image.env}
    config = {
        "architecture": "amd64" if os.uname().machine == "x86_64" else "arm64",
        "os": "linux",
        "config": {
            "Env": [f"{key}={value}" for key, value in env.items()],
            "User": image.user,
            **({"Cmd": list(image.command)} if image.command else {}),
        },
        "rootfs": {"type": "layers", "diff_ids": [part.digest for part in image.layers]},
        "history": [{"created_by": "lanewise tests"} for _ in image.layers],
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": _MANIFEST_TYPE,
        "config": _blob(blobs, config, _CONFIG_TYPE),
        "layers": [part.descriptor for part in image.layers],
    }
    tag = image.name.rsplit(":", 1)[1]
    names = {"io.containerd.image.name": image.name, "org.opencontainers.image.ref.name": tag}
    return {**_blob(blobs, manifest, _MANIFEST_TYPE), "annotations": names}


def _blob(blobs: dict[str, bytes], content: object, media_type: str) -> dict[str, object]:
    data = json.dumps(content).encode()
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    blobs[digest] = data
    return {"mediaType": media_type, "digest": digest, "size": len(data)}


def _plain(info: tarfile.TarInfo, keep_times: bool = False) -> tarfile.TarInfo:
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    info.mtime = info.mtime if keep_times else 0
    info.mode |= 0o444 | (0o111 if info.isdir() or info.mode & 0o100 else 0)
    return info


def _drop_old(folder: Path, name: str, keep: int = 2) -> None:
    """Clones of different versions may share the cache, so the newest few stay."""
    found = sorted(folder.glob(f"{name}-*.tar"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in found[keep:]:
        path.unlink(missing_ok=True)
