"""Text to token ids and back, from the bytes a worker serves by `Describe`; no model files, no torch.

Owns: encoding of prompts and chats (as the model's own Hugging Face tokenizer does it), decoding, the text and the
bytes of one token. Must not: stream (that is text.py), read files of its own accord, or know requests.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from tokenizers import Tokenizer as _Backend

from lanewise.errors import invalid

_BYTE_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for all 256 bytes: what a byte-level vocabulary is written in."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(shifted)}


class _Generation(Extension):
    """Accepts `{% generation %}…{% endgeneration %}`, which marks assistant text for training and renders as itself."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own class attribute

    def parse(self, parser: Parser) -> Node | list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _SafeNamespace(Namespace):
    """Jinja's namespace without attributes that start with an underscore, as Hugging Face restricts it."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"chat templates cannot set {name!r}")
        super().__setitem__(name, value)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    # Jinja's own filter escapes HTML characters, which a prompt must not.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def compile_template(source: str) -> Template:
    """A chat template in the environment Hugging Face documents; templates come from model repositories: untrusted."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    environment.globals["namespace"] = _SafeNamespace
    return environment.from_string(source)


class Tokenizer:
    """One model's tokenizer. Cheap to share: nothing here changes after construction but a cache."""

    def __init__(
        self,
        tokenizer_json: bytes,
        *,
        chat_template: str = "",
        special_tokens: Mapping[str, str] | None = None,
        eos_ids: Iterable[int] = (),
    ) -> None:
        self._backend = _Backend.from_buffer(tokenizer_json)
        # A file may carry settings of a training run; a server must never cut or pad a prompt.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._chat_template = chat_template
        self._special_tokens = dict(special_tokens or {})
        self.eos_ids = frozenset(eos_ids)
        self.vocab_size: int = self._backend.get_vocab_size(with_added_tokens=True)
        self._bytes: dict[int, bytes] = {}

    # ------------------------------------------------------------ encoding

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text: with what the tokenizer's own post-processor adds (a prompt), or without (a rendered chat)."""
        return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def encode_long(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The same, for a thread: the batch call lets other threads run meanwhile."""
        return list(self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """A conversation. The template writes the special tokens itself, so none are added."""
        return self.encode(self.render_chat(messages), add_special_tokens=False)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        if not self._chat_template:
            raise invalid("this model has no chat template; use completions", "messages")
        try:
            return self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except (TemplateError, TypeError, KeyError, ValueError, RecursionError) as error:
            raise invalid(f"the model's chat template refuses these messages: {error}", "messages") from error

    @cached_property
    def _template(self) -> Template:
        return compile_template(self._chat_template)

    # ------------------------------------------------------------ decoding

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return str(self._backend.decode(ids, skip_special_tokens=skip_special_tokens))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes this one token stands for (possibly a part of a character)."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._find_bytes(token_id)
        return known

    def token_text(self, token_id: int) -> str:
        """For logprobs: readable, with U+FFFD in place of an incomplete character."""
        return self.token_bytes(token_id).decode(errors="replace")

    def _find_bytes(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id)
        if token is None:  # models pad their vocabulary beyond the tokenizer's
            return b""
        if token_id in self._added:
            return token.encode()
        if self._is_byte_level:
            try:
                return bytes(self._alphabet[char] for char in token)
            except KeyError:  # not written in the alphabet: stands for itself
                return token.encode()
        if fallback := _BYTE_FALLBACK.fullmatch(token):
            return bytes.fromhex(fallback[1])
        return token.replace("▁", " ").encode()

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self._backend.get_added_tokens_decoder())

    @cached_property
    def _alphabet(self) -> dict[str, int]:
        return _byte_level_alphabet()

    @cached_property
    def _is_byte_level(self) -> bool:
        decoder = self._backend.decoder
        return decoder is not None and b'"ByteLevel"' in decoder.__getstate__()
