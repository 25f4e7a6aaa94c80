"""The harness as a tool: `python -m tests.cluster.kube build | up | load | down | list`.

Owns: the commands behind `make cluster` and `make cluster-down`. Must not: hold anything that tests need.
"""

from __future__ import annotations

import argparse
import sys
import time

from tests.cluster.kube import contents, debian, gobuild, lifecycle
from tests.cluster.kube.chart import install
from tests.cluster.kube.cluster import Cluster
from tests.cluster.kube.components import CORE, SOAK
from tests.cluster.kube.requirements import why_not


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.cluster.kube", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="build the programs of a cluster, once per version")
    build.add_argument("--if-possible", action="store_true", help="succeed where no cluster can run")
    build.add_argument("--soak", action="store_true", help="KEDA as well")
    up = commands.add_parser("up", help="start a cluster with the operator, leave it running, print its kubeconfig")
    up.add_argument("--bare", action="store_true", help="without the operator")
    down = commands.add_parser("down", help="end clusters that were left running, with every trace of them")
    down.add_argument("index", nargs="*", type=int, help="default: all that no test run owns")
    commands.add_parser(
        "load", help="images of the working tree as it is now, into all clusters that were left running"
    )
    commands.add_parser("list", help="clusters that were left running")
    arguments = parser.parse_args()
    reason = why_not()
    if reason:
        print(f"no cluster here: {reason}", file=sys.stderr)
        return 0 if getattr(arguments, "if_possible", False) else 1
    if arguments.command == "build":
        debian.install()
        gobuild.build((*CORE, *SOAK) if arguments.soak else CORE)
        contents.prepare()
    elif arguments.command == "up":
        _up(bare=arguments.bare)
    elif arguments.command == "down":
        for slot in lifecycle.left_running():
            if not arguments.index or slot.index in arguments.index:
                lifecycle.down(slot)
                print(f"cluster {slot.index} is gone")
    elif arguments.command == "load":
        for running in filter(None, map(lifecycle.attach, lifecycle.left_running())):
            lifecycle.load_images(running)
    else:
        for slot in lifecycle.left_running():
            print(f"{slot.index}\t{'running' if lifecycle.attach(slot) else 'dead'}\t{slot.kubeconfig}")
    return 0


def _up(bare: bool) -> None:
    debian.install()
    gobuild.build()
    contents.prepare()
    started = time.monotonic()
    running = lifecycle.start(detached=True)
    if not bare:
        install(Cluster(running.slot.kubeconfig, running))
    print(f"cluster {running.slot.index} runs after {time.monotonic() - started:.1f} s", file=sys.stderr)
    print(f"export KUBECONFIG={running.slot.kubeconfig} PATH={':'.join(map(str, gobuild.bin_dirs()))}:$PATH")


if __name__ == "__main__":
    sys.exit(main())
