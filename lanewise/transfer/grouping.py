"""How many layers of freshly computed KV to announce at once, so that sending overlaps with computing. Pure.

A group must be worth a wake-up of the transfer thread and a chunk of its own; what is too short to be worth cutting
goes whole, with the last layer.
"""

from __future__ import annotations

from lanewise.policy.blocks import KVLayout

GROUP_BYTES = 256 * 1024
"""Least size of a group: below it the cost per chunk outweighs what overlap hides."""
GROUP_S = 0.001
"""Least time of a group on the link: less is over before the next layers are computed anyway."""
WHOLE_S = 0.002
"""A transfer that takes no longer than this goes whole."""
USUAL_BYTES_PER_S = 1e9
"""Of a link that has not been measured yet."""


def layers_per_group(layout: KVLayout, tokens: int, bytes_per_s: float) -> int:
    """Layers to announce together when KV of `tokens` new tokens is computed layer by layer; 1 to all of them."""
    rate = bytes_per_s if bytes_per_s > 0 else USUAL_BYTES_PER_S
    layer = layout.slice_bytes(tokens, 1)
    if layer * layout.num_layers <= max(GROUP_BYTES, rate * WHOLE_S):
        return layout.num_layers
    wanted = max(GROUP_BYTES, rate * GROUP_S)
    return min(layout.num_layers, max(1, -(-int(wanted) // max(1, layer))))
