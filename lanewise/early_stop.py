"""SIGTERM before a process has handlers of its own.

Process 1 of a container has no default action for signals: without a handler SIGTERM is lost, and a pod that is deleted
while it still imports or loads would wait out its whole grace period. Owns: that first handler. Must not: import.
"""

from __future__ import annotations

import os
import signal
from types import FrameType


def end_on_sigterm() -> None:
    """Until another handler is set, SIGTERM ends the process at once: it has nothing to finish yet."""
    signal.signal(signal.SIGTERM, _end)


def _end(number: int, _frame: FrameType | None) -> None:
    os._exit(128 + number)
