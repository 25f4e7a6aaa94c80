"""One side of the channel as a process that may kill itself; used by test_processes.py.

    python peer_process.py decode INCARNATION LISTEN [GROUP_HOST]     prints its endpoint, grants everything
    python peer_process.py prefill ADDRESS INCARNATION        sends 200 tokens as ("r", 1)

With LANEWISE_STANDIN, the library of standin/, the pool is in the "GPU" that this stands in for.
LANEWISE_FAULTS and LANEWISE_FAULTS_SPEC say where it dies. Every event is printed as one line.
"""

from __future__ import annotations

import os
import sys

from conftest import CACHE_KEY, STEADY, Decode, Net, NumpyStore, Prefill, endpoint
from standin_gpu import StandIn

from lanewise.transfer import Faults, Limits, Peer


def dress(store: NumpyStore) -> None:
    if library := os.environ.get("LANEWISE_STANDIN"):
        StandIn(library, store)


def main() -> None:
    role, *rest = sys.argv[1:]
    faults = Faults.from_env(os.environ, [rest[1] if role == "decode" else rest[0]])
    if role == "decode":
        me, host = endpoint(incarnation=rest[0]), "".join(rest[2:])
        side = Decode(me, faults, STEADY, Limits(), rest[1], group_host=host, dress=dress)
        side.grant_all()
        ids = list(range(200))
        side.receiver.expect(("r", 1), ids, CACHE_KEY)
        print(side.address, flush=True)
        events = side.log
    else:
        prefill = Prefill(endpoint(), faults, STEADY, Limits(chunk_bytes=4096), dress=dress)
        ids, key = list(range(200)), ("r", 1)
        pages = prefill.compute(ids)
        prefill.sender.begin(key, Peer(rest[0], rest[1]), ids, CACHE_KEY, pages)
        prefill.sender.commit(key, Net.token(key))
        print("begun", flush=True)
        events = prefill.log
    for line in sys.stdin:  # lives until its parent hangs up
        if line.strip() == "events":
            print([type(event).__name__ for event in events.events], flush=True)


if __name__ == "__main__":
    main()
