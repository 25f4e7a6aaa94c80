"""kubectl and helm of the built version, and waiting with a deadline.

Owns: how the programs are called (their caches stay beside the kubeconfig, not in the user's home).
Must not: know how a cluster is made.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from tests.cluster.kube import gobuild

COMMAND_DEADLINE_S = 60.0
POLL_S = 0.1

T = TypeVar("T")


class CommandFailed(RuntimeError):
    """A program ended with an error; the message holds what it said."""


class TimedOut(AssertionError):
    """Something that was waited for did not happen; the message says what it was and what was seen last."""


def program(name: str) -> str:
    """The path of a built program, else the one of PATH. Raises CommandFailed."""
    for folder in gobuild.bin_dirs():
        if (folder / name).exists():
            return str(folder / name)
    raise CommandFailed(f"{name} is not built: run `python -m tests.cluster.kube build`")


def call(name: str, kubeconfig: Path, *args: str, stdin: str = "", deadline_s: float = COMMAND_DEADLINE_S) -> str:
    """Standard output of a program that talks to the cluster. Raises CommandFailed."""
    home = kubeconfig.parent / "home"
    env = {
        **os.environ,
        "KUBECONFIG": str(kubeconfig),
        "KUBECACHEDIR": f"{home}/kubectl",
        "HELM_CACHE_HOME": f"{home}/helm/cache",
        "HELM_CONFIG_HOME": f"{home}/helm/config",
        "HELM_DATA_HOME": f"{home}/helm/data",
    }
    command = [program(name), *args]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=deadline_s, env=env)
    if done.returncode != 0:
        raise CommandFailed(f"{name} {' '.join(args)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def kubectl(kubeconfig: Path, *args: str, stdin: str = "", deadline_s: float = COMMAND_DEADLINE_S) -> str:
    return call("kubectl", kubeconfig, *args, stdin=stdin, deadline_s=deadline_s)


def wait_for(probe: Callable[[], T | None], what: str, deadline_s: float = 60.0, poll_s: float = POLL_S) -> T:
    """The first true answer of `probe`. Raises TimedOut with the last answer.

    CommandFailed and AssertionError count as no answer, and LookupError: a status has no fields until its controller
    has come by.
    """
    ends = time.monotonic() + deadline_s
    last: object = None
    while True:
        try:
            answer = probe()
            if answer:
                return answer
            last = answer
        except (CommandFailed, AssertionError, LookupError) as error:
            last = error
        if time.monotonic() > ends:
            raise TimedOut(f"waited {deadline_s:.0f} s for {what}; last: {last!r}")
        time.sleep(poll_s)
