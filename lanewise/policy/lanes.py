"""Lanes over instances: which prefill instances prefer short, and which long prompts.

Owns: the move decision. Placeholder until filled in below.
"""

from __future__ import annotations

from typing import Any

PERIOD_S = 5.0
LANE_CONTROLLERS: dict[str, Any] = {}
