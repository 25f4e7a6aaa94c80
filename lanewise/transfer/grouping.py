"""Which layers of freshly computed KV to announce at once, so that sending overlaps with computing. Pure.

A group must be worth a wake-up of the transfer thread and a chunk of its own; what is too short to be worth cutting
goes whole, with the last layer.
"""

from __future__ import annotations

from lanewise.policy.blocks import KVLayout

GROUP_BYTES = 256 * 1024
"""Least size of a group: below it the cost per chunk outweighs what overlap hides."""
GROUP_S = 0.002
"""Least time of a group on the link. Each takes 0.6 ms of a core that computes, wherever its bytes go; and the last one
is all that is left to be sent when token 1 is there."""
WHOLE_S = 0.002
"""A transfer that takes no longer than this goes whole."""
USUAL_BYTES_PER_S = 1e9
"""Of a link that has not been measured yet."""


MOST_GROWTH = 4.0
CAUTION = 0.5
"""Of how much faster layers are said to be sent than computed: the link is others' too."""


def group_ends(layout: KVLayout, tokens: int, bytes_per_s: float, layers_sent: float) -> tuple[int, ...]:
    """After which layers to announce KV of `tokens` new tokens: ascending, the last one is the number of layers.

    `layers_sent`: of the whole batch, while one layer of it is computed; 0: not known. From the end backwards: the
    last group is as small as is worth it, since nothing is computed any more while it is sent. The one before may be
    as much larger as it can still be sent while the last is computed, and so on. Where sending is no faster than
    computing all are small, so that it begins at once."""
    count = layout.num_layers
    rate = bytes_per_s if bytes_per_s > 0 else USUAL_BYTES_PER_S
    layer = layout.slice_bytes(tokens, 1)
    if layer * count <= max(GROUP_BYTES, rate * WHOLE_S):
        return (count,)
    least = max(1, -(-int(max(GROUP_BYTES, rate * GROUP_S)) // max(1, layer)))
    growth = min(max(CAUTION * layers_sent, 1.0), MOST_GROWTH)
    ends, size = [count], float(least)
    while (end := ends[0] - int(size)) >= least:
        ends.insert(0, end)
        size *= growth
    return tuple(ends)
