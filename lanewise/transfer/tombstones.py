"""What is remembered of ended transfers: the recorded answer to a duplicate, and the epochs that are fenced. Pure."""

from __future__ import annotations

import msgspec

from lanewise.transfer import messages as m
from lanewise.transfer.records import Key

_MAX = 100_000


class Tombstones:
    def __init__(self, keep_s: float) -> None:
        self._keep_s = keep_s
        self._answers: dict[Key, tuple[float, m.FromReceiver]] = {}  # in order of time, oldest first
        self._epochs: dict[str, int] = {}
        self._mac_keys: dict[Key, bytes] = {}  # its late chunks still have to be told from forged ones

    def __len__(self) -> int:
        return len(self._answers)

    def answer(self, key: Key, to: str = "") -> m.FromReceiver | None:
        """What was said last, now to `to` (a transfer that ended before BEGIN had nobody to be told)."""
        found = self._answers.get(key)
        return msgspec.structs.replace(found[1], dst=to) if found else None

    def late(self, message: m.Chunk | m.Commit | m.Abort, me: str) -> m.FromReceiver:
        """The answer to a message of a transfer that has ended or never was."""
        names = (me, message.src, *message.key)
        answer = self.answer(message.key, message.src)
        if isinstance(answer, m.CommitAck):
            # Also to ABORT: a commit is final, and nobody may believe otherwise. Also to a CHUNK: the sender may have
            # lost both our last ACK and COMMIT_ACK, and then it resends chunks, not COMMIT.
            return answer
        if isinstance(message, m.Abort):
            return m.AbortAck(*names, True)
        return m.Abort(*names, getattr(answer, "reason", "no such transfer"))

    def mac_key(self, key: Key) -> bytes:
        return self._mac_keys.get(key, b"")

    def bury(self, key: Key, answer: m.FromReceiver, now: float, mac_key: bytes = b"") -> None:
        self._answers.pop(key, None)
        if mac_key:
            self._mac_keys[key] = mac_key
        self._answers[key] = (now + self._keep_s, answer)
        if len(self._answers) > _MAX:
            self._drop(next(iter(self._answers)))

    def seen(self, key: Key) -> int | None:
        """Records an epoch; returns the highest one seen before (None: none)."""
        request_id, epoch = key
        before = self._epochs.get(request_id)
        if before is None or epoch > before:
            self._epochs[request_id] = epoch
        return before

    def fences(self, key: Key) -> bool:
        return self._epochs.get(key[0], key[1]) > key[1]

    def purge(self, now: float) -> None:
        while self._answers:
            key, (until, _) = next(iter(self._answers.items()))
            if until > now:
                return
            self._drop(key)

    def _drop(self, key: Key) -> None:
        del self._answers[key]
        self._mac_keys.pop(key, None)
        if self._epochs.get(key[0]) == key[1]:
            del self._epochs[key[0]]

    @property
    def deadline(self) -> float:
        return next(iter(self._answers.values()))[0] if self._answers else float("inf")
