"""The native CPU library: found ready-made, or compiled once on the machine that uses it.

Owns: the choice of instructions, the compiler command, the cache of built libraries.
Must not: load the library (native.py does) or fail because no compiler is there: the caller then computes with torch.

A library is named after its sources, flags and instructions, so a stale one is never found. `python -m
lanewise.kernels.cpu_build` builds what this machine uses into the cache; with a DIRECTORY it builds every variant
there, for images without a compiler: set LANEWISE_NATIVE_DIR. LANEWISE_NATIVE_AT_MOST names the best variant that may
be used.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).parent / "cpu"
COMMON = ("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-Wno-psabi")
COMPILERS = ("c++", "g++", "clang++")
COMPILE_TIMEOUT_S = 180.0


@dataclass(frozen=True, slots=True)
class Variant:
    """One set of instructions; `needs` are flags as Linux spells them in /proc/cpuinfo."""

    name: str
    needs: frozenset[str]
    flags: tuple[str, ...]
    optional: bool = False
    """Whether a directory of all variants may lack it, since compilers still in use do not know the instructions."""


_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mprefer-vector-width=512")
_NEEDS_512 = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx2", "fma"})
_AVX512_BF16 = (*_AVX512, "-mavx512bf16", "-mavx512vnni")
_NEEDS_BF16 = _NEEDS_512 | {"avx512_bf16", "avx512_vnni"}
_HIDDEN = "-fvisibility=hidden"
"""For what blocks differently: statics of templates are otherwise one for all libraries that a process has loaded."""
_AMX = (*_AVX512_BF16, "-mamx-tile", "-mamx-bf16", "-mamx-int8", _HIDDEN)
VARIANTS = (
    Variant("avx512_amx", _NEEDS_BF16 | {"amx_tile", "amx_bf16", "amx_int8"}, _AMX, optional=True),
    Variant("avx512_bf16", _NEEDS_BF16, _AVX512_BF16),
    Variant("avx512", _NEEDS_512, _AVX512),
    Variant("avx2", frozenset({"avx2", "fma"}), ("-mavx2", "-mfma")),
)
"""Best first."""


class CannotBuild(Exception):
    """Why there is no native library here, in words."""


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """What this CPU can do; empty where nobody says."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return frozenset()
    found = next((line.partition(":")[2] for line in lines if line.startswith("flags")), "")
    return frozenset(found.split())


def usable_variants(flags: frozenset[str]) -> tuple[Variant, ...]:
    """Those for a CPU with these flags that LANEWISE_NATIVE_AT_MOST allows, best first. Raises CannotBuild."""
    names = [variant.name for variant in VARIANTS]
    most = os.environ.get("LANEWISE_NATIVE_AT_MOST") or names[0]
    if most not in names:
        raise CannotBuild(f"LANEWISE_NATIVE_AT_MOST is {most!r}, which is none of {', '.join(names)}")
    if found := tuple(variant for variant in VARIANTS[names.index(most) :] if variant.needs <= flags):
        return found
    raise CannotBuild(f"this CPU ({platform.machine()}) has neither AVX2 with FMA nor AVX-512")


def library(variant: Variant) -> Path:
    """The built library, compiled now if it is nowhere yet. Raises CannotBuild."""
    name = file_name(variant)
    for directory in _directories():
        if (directory / name).is_file():
            return directory / name
    directory = _writable_directory()
    with _turn(directory):  # workers that start together need not all compile
        made = directory / name
        return made if made.is_file() else build(variant, directory)


def build(variant: Variant, directory: Path) -> Path:
    """Compiles into `directory`; a reader never sees half a file."""
    compiler = _compiler()
    target = directory / file_name(variant)
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        made = Path(scratch) / target.name
        command = [compiler, *COMMON, *variant.flags, str(SOURCES / "decoder.cpp"), "-o", str(made)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise CannotBuild(f"{compiler} failed: {error}") from error
        if done.returncode:
            raise CannotBuild(f"{compiler} ended with {done.returncode}: {done.stderr[-2000:]}")
        os.replace(made, target)
    return target


@contextmanager
def _turn(directory: Path) -> Iterator[None]:
    """One process at a time, as long as that takes no longer than a compilation may; then each for itself."""
    with (directory / "building.lock").open("w") as lock:
        deadline = time.monotonic() + COMPILE_TIMEOUT_S
        while time.monotonic() < deadline:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
        yield


def file_name(variant: Variant) -> str:
    state = hashlib.sha256(" ".join((*COMMON, *variant.flags)).encode())
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in (".h", ".cpp"):
            state.update(path.name.encode() + b"\0" + path.read_bytes())
    return f"lanewise-cpu-{variant.name}-{state.hexdigest()[:16]}.so"


def _compiler() -> str:
    asked = os.environ.get("CXX", "").split()
    for name in (*asked[:1], *COMPILERS):
        if found := shutil.which(name):
            return found
    raise CannotBuild(f"no C++ compiler: none of {', '.join(COMPILERS)} is in PATH and CXX names none")


def _directories() -> Iterator[Path]:
    if named := os.environ.get("LANEWISE_NATIVE_DIR"):
        yield Path(named)
    yield _cache()


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "lanewise"


def _writable_directory() -> Path:
    """The user's cache, or where that cannot be written a directory that only this process knows."""
    try:
        _cache().mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(_cache(), os.W_OK):
            return _cache()
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="lanewise-native-"))


def main(arguments: list[str]) -> None:
    if not arguments:
        print(next(_built(usable_variants(cpu_flags()), library)))
        return
    where = Path(arguments[0])
    where.mkdir(parents=True, exist_ok=True)
    for path in _built(VARIANTS, lambda variant: build(variant, where)):
        print(path)


def _built(variants: Sequence[Variant], make: Callable[[Variant], Path]) -> Iterator[Path]:
    for variant in variants:
        try:
            yield make(variant)
        except CannotBuild as error:
            if not variant.optional:
                raise
            print(f"{variant.name} is left out, as it cannot be built here: {error}", file=sys.stderr)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except CannotBuild as error:
        sys.exit(f"no native CPU kernels, torch will compute: {error}")
