"""The scaling table on what no constant was chosen with: other seeds, another day, another mix of requests.

Owns: which days are held out. Must not: hold a rule, a model or a target; scaling_table.py does.

    python benchmarks/scaling_held_out.py            the table (some minutes)
    python benchmarks/scaling_held_out.py measure    first measures the mix's part of data/scaling_response.json again
"""

from __future__ import annotations

import sys
from itertools import product

from rich.console import Console
from scaling_table import AZURE, MOONCAKE, TRACES, Row, Trace, measure_all, table

SEEDS = (6, 7, 8)
WORKDAY = tuple(
    (hour / 24, way)
    for hour, way in (
        *((0, 0.05), (5, 0.0), (7, 0.1), (9, 0.9), (11, 1.0), (12, 0.95), (13, 0.55), (14, 0.85)),
        *((16, 0.9), (18, 0.5), (19, 0.4), (21, 0.6), (24, 0.05)),
    )
)
"""Three peaks, and a morning that rises by most of the way in two hours."""
MIXED = Trace("azure + mooncake", (AZURE, MOONCAKE), 2.0, "ideal")
"""Every other request from each trace, neither in proportion nor with its target: 2 s to the first token for all."""


def main() -> int:
    """Exit status 1 where a target is missed."""
    console = Console() if sys.stdout.isatty() else Console(width=220)
    if unknown := set(sys.argv[1:]) - {"measure"}:
        print(f"scaling_held_out: unknown part {sorted(unknown)[0]!r}; known: measure", file=sys.stderr)
        return 2
    if "measure" in sys.argv[1:]:
        measure_all(console, [MIXED])
    both, sizes = TRACES, (4,)  # more GPUs take minutes a line
    good = [
        table(console, [Row(trace, size, SEEDS) for trace, size in product(both, sizes)], "the same day, other seeds"),
        table(console, [Row(trace, size, SEEDS, WORKDAY) for trace, size in product(both, sizes)], "a working day"),
        table(console, [Row(MIXED, size, SEEDS) for size in sizes], "the same day, requests of both traces"),
        table(console, [Row(MIXED, size, SEEDS, WORKDAY) for size in sizes], "a working day, requests of both traces"),
    ]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
