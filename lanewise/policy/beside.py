"""How many prompt tokens a step may take when it decodes as well: everyone who decodes waits for its end.

Owns: that bound. Must not: order prompts, or know what else limits a batch.
"""

from __future__ import annotations

from lanewise.policy.cost import CostModel
from lanewise.policy.sizing import MIN_KNEES

STALL_S = 0.05  # what prompts may add to a step; a newcomer, too, waits for no more than such a step
LEAST_TOKENS, MOST_TOKENS = 16, 512  # more gain nothing even where they would be over sooner


def beside_decoding(cost: CostModel, most: int) -> int:
    """New prompt tokens of a step beside sequences that decode: at most `most`, the worker's own limit.

    Never fewer than a few knees: below, a step reads the weights for almost nothing and everyone waits longer in all.
    """
    wanted = max(min(cost.tokens_in(STALL_S), MOST_TOKENS), MIN_KNEES * cost.knee_tokens, LEAST_TOKENS)
    return min(most, int(wanted))
