"""Resources made up at random from a schema: sound ones, broken ones, and whatever lies at the edge of a rule.

Owns: what is tried for each kind of value. Must not: know which of them are sound; that is what two judges are asked.
"""

from __future__ import annotations

import random
from typing import Any

TEXTS = (
    *("a", "main", "a b", "-x", "x-", "Upper", "a.b", "a..b", "1chat", "a_b", "", "é", "v1.0/x", "token", "x" * 41),
    *(
        "x" * 128,
        "x" * 129,
        "x" * 253,
        "x" * 254,
        "0 8 * * 1-5",
        "0 8 * *",
        "@daily",
        "* * * * * *",
        "*/5 0-6,22 * JAN SUN",
    ),
)
URIS = (
    *(
        "hf://owner/name",
        "hf://owner/name/",
        "hf://owner",
        "hf://o/n.m_1-x",
        "hf:///n",
        "builtin://fable",
        "builtin://F",
    ),
    *(
        "pvc://claim",
        "pvc://claim/",
        "pvc://claim/a/b",
        "pvc://Claim/a",
        "file:///models/a",
        "file://models",
        "file:///",
    ),
    *("file:///a b", "file:///é", "https://a/b", "x", ""),
)
DURATIONS = (
    *(
        "0s",
        "0ms",
        "400ms",
        "60s",
        "10m",
        "600s",
        "601s",
        "20m",
        "1h30m",
        "9999h9999h9999h9999h",
        "1h1h1h1h1h",
        "10000h",
    ),
    *("0000000001ms", "1s1s1s1s", "-1s", "1.5s", "60", "", "1d", "s", "1S", 60, 0),
)
QUANTITIES = (
    *(
        0,
        1,
        2,
        8,
        "0",
        "1",
        "2",
        "8",
        "0.0",
        "0Gi",
        "1Gi",
        "1024Mi",
        "1.5",
        "500m",
        "2000m",
        "1.5Gi",
        "1e3",
        "1Ki",
        "1k",
    ),
    *(
        "-1",
        -1,
        "1GiB",
        "Gi",
        "",
        ".5",
        "1.",
        "0.000000001",
        "0.0000000001",
        10**15,
        10**15 + 1,
        "999999999999999999Ei",
    ),
)
COUNTS = (0, 1, 2, 9999, 10000, -1, "0", "1", "00", "0%", "1%", "00%", "25%", "100%", "101%", "10000", "", "%", "-1%")
KEYS = ("cpu", "memory", "nvidia.com/gpu", "example.com/x", "x" * 317, "x" * 318)
WORDS = {"uri": URIS, "metadata": ({},), "spec": ({}, {"x": [1]})}
SOMETIMES = 0.35
SELDOM = 0.04


class Guesser:
    """One seed, one series of resources."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def object(self, schema: dict[str, Any]) -> dict[str, Any]:
        """Required fields nearly always, the others now and then, unknown ones seldom."""
        required = schema.get("required", ())
        found = {
            name: self.value(node, name)
            for name, node in schema["properties"].items()
            if self.random.random() < (1 - SELDOM / 4 if name in required else SOMETIMES)
        }
        if self.random.random() < SELDOM / 8:
            found["surplus"] = 1
        return found

    def value(self, schema: dict[str, Any], name: str = "") -> Any:
        choose = self.random.choice
        if self.random.random() < SELDOM / 8:
            return choose(("text", 1, True, [], {}, 1.5))
        if "enum" in schema:
            return choose(schema["enum"]) if self.random.random() > SELDOM else "Other"
        if schema.get("x-kubernetes-int-or-string"):
            return choose(COUNTS if schema["maximum"] == 9999 else QUANTITIES)
        kind = schema["type"]
        if kind == "object" and "properties" in schema:
            return self.object(schema)
        if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
            names = self.random.sample(KEYS, self.random.randint(0, 3))
            return {key: self.value(schema["additionalProperties"]) for key in names}
        if kind == "object":
            return choose(({}, {"x": [1]}))
        if kind == "array":
            count = choose((0, 1, 1, 2, 2, 3)) if self.random.random() > SELDOM else schema["maxItems"] + 1
            return [self.value(schema["items"]) for _ in range(count)]
        if kind == "integer":
            low, high = schema["minimum"], schema["maximum"]
            return choose((low, high, low + 1, 2, 4, low - 1 if self.random.random() < 0.2 else low, high - 1))
        if kind == "boolean":
            return choose((True, False))
        return self.text(schema, name)

    def text(self, schema: dict[str, Any], name: str) -> str | int:
        if schema.get("pattern", "").startswith("^([0-9]"):
            return self.random.choice(DURATIONS) if self.random.random() < 0.3 else self.random.choice(DURATIONS[2:9])
        if name == "cron":
            return self.random.choice(TEXTS[-5:])
        if name == "uri":
            return self.random.choice(URIS) if self.random.random() < 0.5 else self.random.choice(URIS[::5])
        return self.random.choice(TEXTS[:15]) if self.random.random() < 0.3 else self.random.choice(("a", "main", "b"))
