"""Where the time of a start went, phase by phase. Owns: the clock of it. Must not: be used once requests are served."""

from __future__ import annotations

import os
import time
from pathlib import Path


class Phases:
    """`seconds` by phase, in the order they ended; the first, `import`, is what came before this was made."""

    def __init__(self) -> None:
        self.seconds = {"import": round(_process_age_s(), 3)}
        self._last = time.monotonic()

    def end(self, name: str) -> None:
        """What was done since the last phase ended was `name`."""
        now = time.monotonic()
        self.seconds[name] = round(now - self._last, 3)
        self._last = now


def _process_age_s() -> float:
    """Seconds since this process was started; 0 where nobody tells."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0
