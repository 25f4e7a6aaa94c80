"""From what a client asked for to what a worker is told: checks, defaults and limits of one generation.

Owns: the transport-neutral request, the range of every sampling parameter, and the order client > model > ours.
Must not: know HTTP or gRPC, or the fleet beyond the model's limits.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lanewise.errors import ErrorCode, LanewiseError, invalid
from lanewise.request import Sampling
from lanewise.router.catalog import Model

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_STOPS = 4
MAX_STOP_CHARS = 1024
MAX_STOP_IDS = 128
MAX_BIASED = 1024


@dataclass(frozen=True, slots=True)
class Chat:
    messages: tuple[Mapping[str, Any], ...]


Prompt = str | tuple[int, ...] | Chat


@dataclass(frozen=True, slots=True)
class Options:
    """Sampling as the client gave it; None where it gave nothing."""

    max_tokens: int | None = None
    default_max_tokens: int | None = None  # where max_tokens is not given; None: as many as fit
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    min_tokens: int | None = None
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    model: str
    prompts: tuple[Prompt, ...]
    options: Options
    stop: tuple[str, ...] = ()
    n: int = 1
    ttft_target_s: float | None = None
    timeout_s: float | None = None  # the client's own deadline
    tenant_salt: bytes = b""


# field: (lowest, highest, default). The ranges of the OpenAI API where it has the parameter.
_RANGES: dict[str, tuple[float, float, float]] = {
    "temperature": (0.0, 2.0, 1.0),
    "top_p": (0.0, 1.0, 1.0),
    "top_k": (-1, 2**31 - 1, 0),
    "min_p": (0.0, 1.0, 0.0),
    "presence_penalty": (-2.0, 2.0, 0.0),
    "frequency_penalty": (-2.0, 2.0, 0.0),
    "repetition_penalty": (0.01, 10.0, 1.0),
}
_MODEL_DEFAULTS = frozenset({"temperature", "top_p", "top_k", "min_p", "repetition_penalty"})
_dice = random.Random()  # from the system's entropy; a seed is no secret, so it need not be asked again each time
_SMALLEST_TOP_P = 1e-9  # 0 means the same: only the most likely token


def check_shape(request: GenerationRequest) -> None:
    """What can be refused without a tokenizer."""
    if not request.prompts:
        raise invalid("the prompt is empty", "prompt")
    if not 1 <= request.n <= MAX_CHOICES:
        raise invalid(f"n must be between 1 and {MAX_CHOICES}", "n")
    if len(request.prompts) * request.n > MAX_CHOICES:
        raise invalid(f"prompts times n must be at most {MAX_CHOICES}", "n")
    if len(request.stop) > MAX_STOPS:
        raise invalid(f"at most {MAX_STOPS} stop strings", "stop")
    if any(not 1 <= len(stop) <= MAX_STOP_CHARS for stop in request.stop):
        raise invalid(f"a stop string has 1 to {MAX_STOP_CHARS} characters", "stop")
    options = request.options
    for name, (low, high, _) in _RANGES.items():
        value = getattr(options, name)
        if value is not None and not low <= value <= high:  # false for NaN as well
            raise invalid(f"{name} must be between {low:g} and {high:g}", name)
    if options.max_tokens is not None and options.max_tokens < 1:
        raise invalid("max_tokens must be at least 1", "max_tokens")
    if options.min_tokens is not None and options.min_tokens < 0:
        raise invalid("min_tokens must not be negative", "min_tokens")
    if options.logprobs is not None and not 0 <= options.logprobs <= MAX_LOGPROBS:
        raise invalid(f"logprobs must be between 0 and {MAX_LOGPROBS}", "logprobs")
    if options.seed is not None and not -(2**63) <= options.seed < 2**64:
        raise invalid("seed must be a 64-bit integer", "seed")
    _check_ids(options)
    if request.ttft_target_s is not None and not 0 < request.ttft_target_s < 1e6:
        raise invalid("the TTFT target must be positive", "x-slo-ttft-ms")


def _check_ids(options: Options) -> None:
    if len(options.stop_token_ids) > MAX_STOP_IDS:
        raise invalid(f"at most {MAX_STOP_IDS} stop token ids", "stop_token_ids")
    if len(options.logit_bias) > MAX_BIASED:
        raise invalid(f"at most {MAX_BIASED} biased tokens", "logit_bias")
    if any(not -100 <= bias <= 100 for bias in options.logit_bias.values()):
        raise invalid("a bias must be between -100 and 100", "logit_bias")


def resolve(options: Options, model: Model, prompt_ids: Sequence[int]) -> Sampling:
    """The sampling of one prompt, complete: client over model over ours. `seed` is that of choice 0."""
    num_prompt, limit = len(prompt_ids), model.max_total_tokens
    if num_prompt == 0:
        raise invalid("the prompt has no tokens", "prompt")
    if num_prompt >= limit:
        raise LanewiseError(
            ErrorCode.PROMPT_TOO_LONG,
            f"the prompt has {num_prompt} tokens; with at least one output token the limit is {limit} tokens",
            param="prompt",
        )
    room = limit - num_prompt
    max_tokens = options.max_tokens or min(options.default_max_tokens or room, room)
    if max_tokens > room:
        raise invalid(
            f"the prompt has {num_prompt} tokens and max_tokens is {max_tokens}; together the limit is {limit} tokens",
            "max_tokens",
        )
    named = (("stop_token_ids", options.stop_token_ids), ("logit_bias", options.logit_bias), ("prompt", prompt_ids))
    for name, ids in named:
        if ids and not 0 <= min(ids) <= max(ids) < model.vocab_size:
            outside = min(ids) if min(ids) < 0 else max(ids)
            raise invalid(f"{name} holds token id {outside}; the vocabulary has {model.vocab_size} tokens", name)
    base = _base(model)
    return Sampling(
        max_tokens=max_tokens,
        temperature=_either(options.temperature, base["temperature"]),
        top_p=max(_either(options.top_p, base["top_p"]), _SMALLEST_TOP_P),
        top_k=max(int(_either(options.top_k, base["top_k"])), 0),
        min_p=_either(options.min_p, base["min_p"]),
        presence_penalty=_either(options.presence_penalty, base["presence_penalty"]),
        frequency_penalty=_either(options.frequency_penalty, base["frequency_penalty"]),
        repetition_penalty=_either(options.repetition_penalty, base["repetition_penalty"]),
        logit_bias=dict(options.logit_bias),
        seed=_dice.getrandbits(64) if options.seed is None else options.seed % 2**64,
        min_tokens=min(options.min_tokens or 0, max_tokens),
        stop_token_ids=frozenset(options.stop_token_ids),
        ignore_eos=options.ignore_eos,
        logprobs=options.logprobs,
    )


def _either(given: float | None, otherwise: float) -> float:
    return otherwise if given is None else float(given)


def _base(model: Model) -> dict[str, float]:
    """Every parameter where the client gives none: the model's own value, within range, or ours. Made once a model."""
    base = model.base
    if not base:
        base.update((name, _default(name, model)) for name in _RANGES)
    return base


def _default(name: str, model: Model) -> float:
    low, high, default = _RANGES[name]
    of_model = model.defaults.get(name) if name in _MODEL_DEFAULTS else None
    return float(min(max(of_model, low), high)) if isinstance(of_model, int | float) else default
