"""The decode side of a transfer between two processes on one GPU, for test_device_memory.py.

python gpu_peer.py INCARNATION     prints its endpoint, takes 2,000 tokens as ("r", 1); "sum" prints their checksum
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "transfer"))

from conftest import CACHE_KEY, Log, endpoint

from lanewise.engine.kv_pool import KVPool
from lanewise.policy.blocks import KVLayout
from lanewise.transfer import Receiver
from lanewise.transfer.word_sum import word_sum

LAYOUT = KVLayout(num_layers=3, num_kv_heads=2, head_dim=8, dtype="bfloat16", dtype_bytes=2)
PAGES = list(range(90, 20, -1))  # of 32 tokens


def main() -> None:
    pool = KVPool(LAYOUT, 128, 32, torch.device("cuda", 0))
    pool.share()
    log = Log()
    receiver = Receiver(endpoint(incarnation=sys.argv[1], layout=LAYOUT), pool, log)
    log.react = lambda event: type(event).__name__ == "Offered" and receiver.grant(event.key, PAGES, 0)
    receiver.expect(("r", 1), list(range(2000)), CACHE_KEY)
    print(receiver.start(), flush=True)
    for line in sys.stdin:  # lives until its parent hangs up
        if line.strip() == "sum":
            data = pool.read(PAGES, range(2000), range(LAYOUT.num_layers), range(LAYOUT.num_kv_heads))
            print(word_sum(data.tobytes()).hex(), flush=True)


if __name__ == "__main__":
    main()
