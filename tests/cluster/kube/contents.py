"""What is in the test images: a Python of this machine, Lanewise with its packages, and little else.

Owns: the layers pause, python, control and native. Must not: contain torch, which is five gigabytes (worker
pods of the tests mount the virtual environment instead, see `worker_pod_template`).
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
import zipfile
from functools import partial
from pathlib import Path

import lanewise
from lanewise.kernels import cpu_build
from tests.cluster.kube.daemons import PAUSE_IMAGE
from tests.cluster.kube.gobuild import cache_root
from tests.cluster.kube.images import LEFT_OUT, REGISTRY, Image, Layer, LayerWriter, archive, layer

ROOT = Path(__file__).resolve().parents[3]
BUILD_ROOT = ROOT / "deploy" / "build-root.sh"
DEADLINE_S = 900
APP_IMAGE = f"{REGISTRY}/app:1"
CONTROL_IMAGE = f"{REGISTRY}/lanewise-control:{lanewise.__version__}"
WORKER_IMAGE = f"{REGISTRY}/lanewise-worker:{lanewise.__version__}"
PACKAGES = "/opt/lanewise"
"""Where deploy/build-root.sh puts the packages."""
NATIVE = "/opt/lanewise-native"
"""And the native CPU kernels."""
VENV_MOUNT = "/venv"
PAUSE_SOURCE = """
#include <signal.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>
static void leave(int s) { exit(0); }
static void reap(int s) { while (waitpid(-1, 0, WNOHANG) > 0); }
int main(void) { signal(SIGINT, leave); signal(SIGTERM, leave); signal(SIGCHLD, reap); for (;;) pause(); }
"""


def build(out: Path) -> Path:
    """All images in one archive. `out` is a folder for the archive; layers are cached between runs."""
    out.mkdir(parents=True, exist_ok=True)
    layers = cache_root() / "layers"
    python = layer(layers, "python", _python_key(), _python)
    pause = layer(layers, "pause", PAUSE_SOURCE, partial(_pause, out))
    control = _control(layers, out)
    env = {"PYTHONPATH": PACKAGES, "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1", "HOME": "/tmp"}
    native = layer(layers, "native", _native_key(), partial(_native, out)) if platform.machine() == "x86_64" else None
    images = [
        Image(PAUSE_IMAGE, (pause,), command=("/pause",)),
        Image(APP_IMAGE, (python,), command=("/usr/local/bin/python",)),
        Image(CONTROL_IMAGE, (python, *control), env, user="65532:65532"),
        Image(
            WORKER_IMAGE,
            (python, *control, *([native] if native else [])),
            env | {"LANEWISE_NATIVE_DIR": NATIVE},
            user="65532:65532",
        ),
    ]
    return archive(out / "images.tar", images)


def prepare() -> None:
    """Fills the cache of layers: what takes minutes the first time happens here, where no test waits for it."""
    with tempfile.TemporaryDirectory(prefix="lanewise-images-") as scratch:
        build(Path(scratch))


def worker_pod_template() -> dict[str, object]:
    """The podTemplate that gives worker pods torch and whatever else the virtual environment has."""
    return {
        "spec": {
            "volumes": [{"name": "venv", "hostPath": {"path": sysconfig.get_path("purelib"), "type": "Directory"}}],
            "containers": [
                {
                    "name": "worker",
                    "env": [{"name": "PYTHONPATH", "value": f"{PACKAGES}:{VENV_MOUNT}"}],
                    "volumeMounts": [{"name": "venv", "mountPath": VENV_MOUNT, "readOnly": True}],
                }
            ],
        }
    }


def _pause(scratch: Path, tar: LayerWriter) -> None:
    source = scratch / "pause.c"
    source.write_text(PAUSE_SOURCE)
    _run("gcc", "-static", "-Os", "-s", "-o", str(scratch / "pause"), str(source))
    tar.file(scratch / "pause", "/pause")


def _python_key() -> str:
    binary = Path(sys.base_prefix) / "bin" / _python_name()
    return f"4 {sys.version} {binary} {binary.stat().st_mtime} {_torch_library()}"


def _python_name() -> str:
    return f"python{sys.version_info.major}.{sys.version_info.minor}"


def _python(tar: LayerWriter) -> None:
    """The interpreter under its own prefix, a shell, and every system library that these and torch need."""
    prefix = Path(sys.base_prefix)
    library = prefix / "lib" / _python_name()
    for folder in ("/dev", "/etc", "/opt", "/proc", "/sys", "/usr/local/bin", "/var"):
        tar.folder(folder)
    tar.folder("/tmp", 0o1777)
    tar.text("/etc/nsswitch.conf", "hosts: files dns\n")
    tar.file(Path("/etc/ssl/certs/ca-certificates.crt"), "/etc/ssl/certs/ca-certificates.crt")
    binary = prefix / "bin" / _python_name()
    tar.file(binary, str(binary))
    for name in ("python", "python3"):
        tar.link(f"/usr/local/bin/{name}", str(binary))
    tar.tree(library, str(library), LEFT_OUT | {"site-packages"}, keep_times=True)
    for shared in prefix.glob("lib/libpython*.so*"):
        tar.file(shared, str(shared))
    tools = {"/bin/sh": "/bin/dash" if Path("/bin/dash").exists() else "/bin/sh"}
    tools |= {name: name for name in ("/bin/cat", "/bin/ls", "/bin/sleep")}
    for target, source in tools.items():
        tar.file(Path(source), target)
    wanted = [binary, *library.glob("lib-dynload/*.so"), *map(Path, tools.values()), *_torch_library()]
    for file in _shared_libraries(wanted):
        tar.file(Path(file), file)


def _torch_library() -> list[Path]:
    return sorted(Path(sysconfig.get_path("purelib")).glob("torch/lib/libtorch_python.so"))


def _shared_libraries(files: list[Path]) -> list[str]:
    """System libraries that these files are linked with, directly or not."""
    done = subprocess.run(["ldd", *map(str, files)], capture_output=True, text=True, timeout=DEADLINE_S)
    return sorted(set(re.findall(r"(?:=> |^\s+)(/(?:usr/)?lib(?:64|32)?/\S+)", done.stdout, re.M)))


def _control(layers: Path, scratch: Path) -> tuple[Layer, ...]:
    """Two layers: what deploy/build-root.sh makes, which seldom changes, and Lanewise itself."""
    wheel = build_wheel(scratch)
    with zipfile.ZipFile(wheel) as content:
        (described,) = (name for name in content.namelist() if name.endswith(".dist-info/METADATA"))
        needs = [line for line in content.read(described).decode().splitlines() if line.startswith("Requires-Dist")]
    key = "\n".join([BUILD_ROOT.read_text(), sys.version, *needs])
    packages = layer(layers, "packages", key, partial(_packages, wheel, scratch))
    version = hashlib.sha256(wheel.read_bytes()).hexdigest() + sys.version
    return packages, layer(layers, "lanewise", version, partial(_wheel, wheel, scratch))


def build_wheel(scratch: Path) -> Path:
    """A wheel of the working tree, built from a copy, as the build may leave files behind."""
    tree = scratch / "tree"
    tree.mkdir()
    left_out = shutil.ignore_patterns("__pycache__", "tests")
    with (ROOT / "pyproject.toml").open("rb") as file:
        parts = tomllib.load(file)["tool"]["hatch"]["build"]["targets"]["sdist"]["only-include"]
    for name in (*parts, "pyproject.toml"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=left_out)
        else:
            shutil.copy(ROOT / name, tree / name)
    _run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(scratch / "dist"), cwd=tree)
    (wheel,) = (scratch / "dist").glob("*.whl")
    return wheel


def _packages(wheel: Path, scratch: Path, tar: LayerWriter) -> None:
    """Everything but Lanewise itself, as the images of a release have it."""
    root = scratch / "root"
    _run("sh", str(BUILD_ROOT), "control", str(wheel), str(root), PYTHON=sys.executable)
    for own in (root / PACKAGES.strip("/")).glob("lanewise*"):
        shutil.rmtree(own)
    for folder in sorted(root.iterdir()):
        tar.tree(folder, f"/{folder.name}", frozenset())


def _wheel(wheel: Path, scratch: Path, tar: LayerWriter) -> None:
    """Lanewise with its byte code, which nobody could write later: the root of a pod is read-only."""
    with zipfile.ZipFile(wheel) as content:
        content.extractall(scratch / "wheel")
    mode = "--invalidation-mode=unchecked-hash"
    _run(sys.executable, "-m", "compileall", "-q", mode, "-s", str(scratch / "wheel"), str(scratch / "wheel"))
    tar.tree(scratch / "wheel", PACKAGES, frozenset())


def _native_key() -> str:
    """A library's name says what it was made from."""
    return " ".join(cpu_build.file_name(variant) for variant in cpu_build.VARIANTS)


def _native(scratch: Path, tar: LayerWriter) -> None:
    """As deploy/build-root.sh does for a worker image, whose torch is too big for it to be run here."""
    _run(sys.executable, "-m", "lanewise.kernels.cpu_build", str(scratch / "native"), cwd=ROOT)
    for file in (scratch / "native").glob("*.so"):
        tar.file(file, f"{NATIVE}/{file.name}")


def _run(*argv: str, cwd: Path | None = None, **env: str) -> None:
    done = subprocess.run(argv, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=DEADLINE_S)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(argv)}: {done.stderr[-2000:]}")
