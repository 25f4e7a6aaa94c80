"""Where a cluster can be started at all.

Owns: that one question. Must not: change anything.
"""

from __future__ import annotations

import os
import sys


def why_not() -> str:
    """Why no cluster can be started here, in words; empty where one can."""
    if not sys.platform.startswith("linux"):
        return f"a cluster needs Linux, this is {sys.platform}"
    if os.geteuid() != 0:
        return "a cluster needs root (namespaces, mounts, cgroups)"
    return ""
