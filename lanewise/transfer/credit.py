"""How many bytes the senders of one receiver may have on their way. Pure.

Owns: the budget. A transfer's credit is an absolute total since BEGIN, so lost or doubled ACKs cannot change it.
"""

from __future__ import annotations

from lanewise.transfer.receiver_state import ReceiverTransfer
from lanewise.transfer.records import Limits


class CreditPool:
    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.outstanding_bytes = 0

    def top_up(self, transfer: ReceiverTransfer) -> None:
        """Raises the transfer's credit towards a full window, within the budget of all.

        One chunk is always granted, even over budget: a transfer that holds nothing must not wait for one whose
        prompt is still being computed.
        """
        open_bytes = transfer.credited_bytes - transfer.received_bytes
        missing = transfer.missing_bytes
        room = max(0, self._limits.credit_bytes - self.outstanding_bytes)
        target = min(self._limits.window_bytes, missing, open_bytes + room)
        target = max(target, min(self._limits.max_chunk_bytes, missing))
        if target > open_bytes:
            transfer.credited_bytes += target - open_bytes
            self.outstanding_bytes += target - open_bytes

    def used(self, nbytes: int) -> None:
        self.outstanding_bytes -= nbytes

    def end(self, transfer: ReceiverTransfer) -> None:
        """What was credited and will not come."""
        self.outstanding_bytes -= transfer.credited_bytes - transfer.received_bytes
        transfer.credited_bytes = transfer.received_bytes
