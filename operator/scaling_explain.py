"""`kubectl lanewise scaling`: inputs, requirement, decision of a ScalingPolicy, on one screen.

Owns: how a policy's status is shown. Must not: read a cluster (kubectl.py does) or decide.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def show(console: Console, item: dict[str, Any]) -> None:
    """One ScalingPolicy as the API server has it."""
    metadata, spec, status = item["metadata"], item.get("spec", {}), item.get("status", {})
    ranges = ", ".join(f"{role} {spec[role].get('min', 1)}-{spec[role]['max']}" for role in ("prefill", "decode"))
    target = spec["targetRef"]["name"]
    console.print(f"[bold]{metadata['namespace']}/{metadata['name']}[/]  scales LLMService {target}  ({ranges})")
    current = status.get("current")
    if current is None:
        console.print("  no decision yet")
    else:
        console.print(f"  inputs       {current.get('inputs', '')}", highlight=False)
        console.print(f"  requirement  {current.get('requirement', '')}", highlight=False)
        console.print(f"  decision     {current['prefill']} prefill + {current['decode']} decode", highlight=False)
        console.print(f"  because      {current.get('reason', '')}", highlight=False, markup=False)
    conditions = Table("condition", "status", "reason", "message", box=None, padding=(0, 2))
    for found in status.get("conditions", []):
        conditions.add_row(found["type"], found["status"], found["reason"], escape(found.get("message", "")))
    console.print(conditions)
    if status.get("history"):
        moves = Table("when", "prefill", "decode", "why", box=None, padding=(0, 2))
        for move in status["history"]:
            moves.add_row(move["time"], str(move["prefill"]), str(move["decode"]), escape(move.get("reason", "")))
        console.print(moves)
