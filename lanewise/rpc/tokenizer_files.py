"""The text side of a model directory, as `Describe` serves it to routers.

Owns: reading tokenizer.json, the chat template, the special tokens and the generation defaults.
Must not: tokenize (the router does) or know weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lanewise.errors import ConfigError
from lanewise.rpc.serve import TokenizerFiles

_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
_DEFAULTS = ("temperature", "top_p", "top_k", "repetition_penalty")


def read_tokenizer_files(model_dir: Path, eos_token_ids: Iterable[int]) -> TokenizerFiles:
    """Raises ConfigError naming the file that is missing or unreadable. A missing chat template is the empty string."""
    try:
        tokenizer = (model_dir / "tokenizer.json").read_bytes()
    except OSError as error:
        raise ConfigError(f"{model_dir}: a model directory needs tokenizer.json ({error.strerror})") from error
    config = _read_json(model_dir / "tokenizer_config.json")
    generation = _read_json(model_dir / "generation_config.json")
    special = {name: _token_text(config[name]) for name in _SPECIAL if config.get(name)}
    defaults = {name: generation[name] for name in _DEFAULTS if generation.get(name) is not None}
    return TokenizerFiles(
        tokenizer_json=tokenizer,
        tokenizer_hash=hashlib.sha256(tokenizer).hexdigest(),
        chat_template=_chat_template(model_dir, config),
        special_tokens=special,
        eos_token_ids=tuple(sorted(eos_token_ids)),
        generation_defaults_json=json.dumps(defaults),
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a JSON object")
    return value


def _token_text(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else str(token.get("content", ""))


def _chat_template(model_dir: Path, config: dict[str, Any]) -> str:
    separate = model_dir / "chat_template.jinja"
    if separate.exists():
        return separate.read_text(encoding="utf-8")
    template = config.get("chat_template") or ""
    if isinstance(template, list):  # several named templates
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default", "")
    return str(template)
