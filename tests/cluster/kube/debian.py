"""Debian packages that the harness needs: what a build or a node takes from the machine.

Owns: the list of packages and their installation. Must not: be used where the caller is not root.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

INSTALL_DEADLINE_S = 600
PROGRAMS = {
    "gcc": "gcc",
    "c++": "g++",
    "pkg-config": "pkg-config",
    "openssl": "openssl",
    "ip": "iproute2",
    "nft": "nftables",
    "conntrack": "conntrack",
    "unshare": "util-linux",
    "mount": "mount",
    "curl": "curl",
}
"""Program -> the package that brings it."""
HEADERS = {"/usr/include/seccomp.h": "libseccomp-dev", "/usr/include/stdlib.h": "libc6-dev"}
CERTIFICATES = {"/etc/ssl/certs/ca-certificates.crt": "ca-certificates"}


class PackagesMissing(RuntimeError):
    """Packages are missing and could not be installed."""


def missing() -> list[str]:
    """Packages whose program or header is not there."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    programs = [package for program, package in PROGRAMS.items() if not shutil.which(program, path=path)]
    return programs + [package for file, package in {**HEADERS, **CERTIFICATES}.items() if not Path(file).exists()]


def install() -> None:
    """Installs what is missing with apt-get. Raises PackagesMissing, naming the packages."""
    wanted = missing()
    if not wanted:
        return
    if not shutil.which("apt-get"):
        raise PackagesMissing(f"please install {' '.join(wanted)} (there is no apt-get here)")
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (
        ["apt-get", "update", "-q"],
        ["apt-get", "install", "-q", "-y", "--no-install-recommends", *wanted],
    ):
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=INSTALL_DEADLINE_S)
    if missing():
        raise PackagesMissing(
            f"apt-get could not install {' '.join(wanted)}:\n{done.stdout[-1000:]}{done.stderr[-1000:]}"
        )
