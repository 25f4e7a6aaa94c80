"""One client request from prompts to text: tokenizes, starts a flight per choice, turns tokens into text events.

Owns: the text of every choice (stop strings included) and the events both transports answer with.
Must not: know HTTP or gRPC. The client's task pulls; nothing here runs on its own.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from lanewise.config import RouterConfig
from lanewise.errors import ErrorCode, LanewiseError
from lanewise.request import FinishReason, Sampling, Token, choice_seed
from lanewise.router.catalog import Catalog, Model
from lanewise.router.dispatch import Dispatcher
from lanewise.router.held import HELD_BYTES_PER_TOKEN
from lanewise.router.orders import End, Order
from lanewise.router.outbox import Outbox
from lanewise.router.sampling import GenerationRequest, Prompt, check_shape, resolve
from lanewise.text import TextStream

THREAD_CHARS = 20_000  # a longer text is tokenized in a thread: it would stop every stream for milliseconds
CHARS_BYTES = 4  # of memory, at most, per character of a waiting prompt
LONGEST_S = 1e7  # a deadline beyond this is none


@dataclass(slots=True)
class Delta:
    """What came of one choice since the last look."""

    choice: int
    text: str = ""
    tokens: list[Token] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Ended:
    """The one end of a choice."""

    choice: int
    reason: FinishReason
    stop_reason: str
    error: LanewiseError | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


Event = Delta | Ended


@dataclass(slots=True)
class _Choice:
    order: Order
    text: TextStream = field(init=False)  # made while the workers compute already
    stop: str | None = None  # the stop string that was reached
    ended: bool = False


class Generation:
    """A running client request. `close` must be called, whatever happens."""

    def __init__(self, model: Model, dispatcher: Dispatcher, outbox: Outbox, choices: list[_Choice]) -> None:
        self.model = model
        self.id = choices[0].order.request_id
        self.created = int(time.time())
        self.prompt_tokens = 0
        self._dispatcher = dispatcher
        self._outbox = outbox
        self._choices = choices
        self._open = len(choices)

    @property
    def num_choices(self) -> int:
        return len(self._choices)

    @property
    def done(self) -> bool:
        return self._open == 0

    async def prepare(self, stops: Sequence[str]) -> None:
        """Make what only the first token needs. Submissions leave first: they wait for a turn of the loop."""
        try:
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.close()
            raise
        for choice in self._choices:
            order = choice.order
            choice.text = TextStream(self.model.tokenizer, order.prompt_ids, stops, order.sampling.min_tokens)

    async def next(self, timeout_s: float | None = None) -> list[Event]:
        """The next events, one Delta at most per choice and look. Empty: nothing in time, or nothing worth telling."""
        events: list[Event] = []
        deltas: dict[int, Delta] = {}
        for index, item in await self._outbox.take(timeout_s):
            choice = self._choices[index]
            if isinstance(item, End):
                if ended := self._end(index, choice, item, deltas, events):
                    events.append(ended)
            elif choice.stop is None:
                self._push(choice, item, _delta_of(index, deltas, events))
        return events

    def close(self, reason: str = "cancelled by the client") -> None:
        """Free whatever still runs. Safe to call at any time, and more than once."""
        self._outbox.close()
        for choice in self._choices:
            if not choice.ended:
                self._dispatcher.cancel(choice.order.request_id, reason)

    def _push(self, choice: _Choice, token: Token, delta: Delta) -> None:
        delta.tokens.append(token)
        if token.finish is FinishReason.STOP:  # an end-of-sequence or stop id, which has no text of its own
            choice.text.count()
            return
        step = choice.text.push(token.token_id)
        delta.text += step.text
        if step.stop is not None:
            choice.stop = step.stop
            self._dispatcher.stop(choice.order.request_id, step.stop)

    def _end(
        self, index: int, choice: _Choice, end: End, deltas: dict[int, Delta], events: list[Event]
    ) -> Ended | None:
        choice.ended = True
        self._open -= 1
        if choice.stop is not None:  # whatever the workers made of it afterwards
            end = replace(end, reason=FinishReason.STOP, error=None, stop_reason=choice.stop)
        elif end.error is None and (rest := choice.text.flush()):
            _delta_of(index, deltas, events).text += rest
        return Ended(
            choice=index,
            reason=end.reason,
            stop_reason=end.stop_reason,
            error=end.error,
            prompt_tokens=len(choice.order.prompt_ids),
            completion_tokens=choice.text.num_tokens,
            cached_tokens=end.cached_tokens,
        )


def _delta_of(index: int, deltas: dict[int, Delta], events: list[Event]) -> Delta:
    if index not in deltas:
        deltas[index] = Delta(index)
        events.append(deltas[index])
    return deltas[index]


class Front:
    """What both servers call."""

    def __init__(self, config: RouterConfig, catalog: Catalog, dispatcher: Dispatcher) -> None:
        self._config = config
        self._catalog = catalog
        self._dispatcher = dispatcher
        self._early_bytes = 0  # of requests that wait for the first model to become known
        self._early = 0
        self.early_total = 0
        self.draining = False

    @property
    def num_early(self) -> int:
        """Requests that wait for the first worker to tell of its model."""
        return self._early

    @property
    def num_held(self) -> int:
        """All requests that wait for workers, those before any was seen too: whoever scales must know of them."""
        return self._early + self._dispatcher.num_held

    async def generate(self, request: GenerationRequest, on_stall: Callable[[], None]) -> Generation:
        """Accept a request, or raise the LanewiseError that refuses it. `on_stall` cuts off a client that hangs."""
        started = time.monotonic()
        if self.draining:
            raise LanewiseError(ErrorCode.DRAINING, "this router is shutting down", retry_after_s=1.0)
        check_shape(request)
        timeout_s = min(request.timeout_s or self._config.request_timeout_s, LONGEST_S)
        model = await self._model(request, timeout_s)
        choices: list[_Choice] = []
        prompt_tokens = 0
        for prompt in request.prompts:
            ids = await _encode(model, prompt)
            sampling = resolve(request.options, model, ids)
            prompt_tokens += len(ids)
            for i in range(request.n):
                order = _order(request, model, ids, sampling, i, started + timeout_s)
                choices.append(_Choice(order))
        outbox = Outbox(self._config.client_stall_s, on_stall)
        generation = Generation(model, self._dispatcher, outbox, choices)
        generation.prompt_tokens = prompt_tokens
        for index, choice in enumerate(choices):
            self._dispatcher.start(choice.order, outbox, index)
        await generation.prepare(request.stop)
        return generation

    async def _model(self, request: GenerationRequest, timeout_s: float) -> Model:
        """Before any worker has been seen there is no tokenizer: such requests are held as they came, also bounded."""
        if not self._catalog.models():
            self._catalog.check_name(request.model)
            size = sum(_size(prompt) for prompt in request.prompts)
            config = self._config
            if self._early >= config.hold_max_requests or self._early_bytes + size > config.hold_max_bytes:
                message = f"{self._early} requests already wait for workers; retry later"
                raise LanewiseError(ErrorCode.OVERLOADED, message, retry_after_s=1.0)
            self._early, self._early_bytes = self._early + 1, self._early_bytes + size
            self.early_total += 1
            hold_s = self._dispatcher.hold_timeout_s
            try:
                await self._catalog.wait(min(timeout_s, hold_s))
            finally:
                self._early, self._early_bytes = self._early - 1, self._early_bytes - size
            if not self._catalog.models() and timeout_s < hold_s:
                raise LanewiseError(ErrorCode.DEADLINE, "the deadline passed before any worker was there")
        return self._catalog.get(request.model)


def _order(
    request: GenerationRequest, model: Model, ids: tuple[int, ...], sampling: Sampling, choice: int, deadline_at: float
) -> Order:
    return Order(
        request_id=str(uuid.uuid4()),
        model=model.name,
        prompt_ids=ids,
        sampling=replace(sampling, seed=choice_seed(sampling.seed, choice)) if choice else sampling,
        deadline_at=deadline_at,
        ttft_target_s=request.ttft_target_s,
        tenant_salt=request.tenant_salt,
    )


def _size(prompt: Prompt) -> int:
    """Memory that a prompt takes before it is tokenized, at most."""
    if isinstance(prompt, str):
        return len(prompt) * CHARS_BYTES
    if isinstance(prompt, tuple):
        return len(prompt) * HELD_BYTES_PER_TOKEN
    return sum(len(message["content"]) * CHARS_BYTES for message in prompt.messages)


async def _encode(model: Model, prompt: Prompt) -> tuple[int, ...]:
    tokenizer = model.tokenizer
    if isinstance(prompt, tuple):
        return prompt
    special = isinstance(prompt, str)  # a chat template writes the special tokens itself
    text = prompt if isinstance(prompt, str) else tokenizer.render_chat(prompt.messages)
    if len(text) < THREAD_CHARS:
        return tuple(tokenizer.encode(text, special))
    return tuple(await asyncio.to_thread(tokenizer.encode_long, text, special))
