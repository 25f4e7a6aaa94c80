"""Whether two workers may exchange KV, and if not, why, in words a person can act on. Pure.

Must not: decide what a refusal leads to. Page size, parallelism and pool layout are no reason: the wire is canonical.
"""

from __future__ import annotations

from lanewise.transfer import messages as m
from lanewise.transfer.records import Endpoint

_SHORT = 48


def hello(identity: Endpoint, to: str) -> m.Hello:
    return m.Hello(
        identity.incarnation,
        to,
        m.PROTOCOL,
        identity.fingerprint,
        dict(identity.fingerprint_fields),
        m.WireLayout.of(identity.layout),
    )


def hello_ack(identity: Endpoint, to: str, refusal: str, max_chunk_bytes: int) -> m.HelloAck:
    mine = hello(identity, to)
    facts = (mine.protocol, mine.fingerprint, mine.fields, mine.layout)
    return m.HelloAck(mine.src, to, *facts, m.clip(refusal), max_chunk_bytes)


def differences(identity: Endpoint, theirs: m.Hello | m.HelloAck) -> str:
    """Each differing fact with both values, the local one first; empty when the two may pair."""
    out: list[str] = []
    if theirs.protocol != m.PROTOCOL:
        out.append(_pair("protocol", str(m.PROTOCOL), str(theirs.protocol)))
    mine_layout = m.WireLayout.of(identity.layout)
    for name in mine_layout.__struct_fields__:
        here, there = getattr(mine_layout, name), getattr(theirs.layout, name)
        if here != there:
            out.append(_pair(f"layout.{name}", str(here), str(there)))
    if theirs.fingerprint != identity.fingerprint:
        out += _field_differences(dict(identity.fingerprint_fields), theirs.fields) or [
            _pair("fingerprint", identity.fingerprint, theirs.fingerprint)
        ]
    return "; ".join(out)


def _field_differences(mine: dict[str, str], theirs: dict[str, str]) -> list[str]:
    return [
        _pair(name, mine.get(name), theirs.get(name))
        for name in sorted(mine.keys() | theirs.keys())
        if mine.get(name) != theirs.get(name)
    ]


def _pair(name: str, here: str | None, there: str | None) -> str:
    return f"{name}: {_short(here)} here, {_short(there)} there"


def _short(value: str | None) -> str:
    if value is None:
        return "absent"
    return value if len(value) <= _SHORT else f"{value[: _SHORT - 1]}…"
