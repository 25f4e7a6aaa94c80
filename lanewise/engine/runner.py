"""The engine of a worker: a loaded model, its KV pool, and forward passes one after the other.

Owns: loading in order (device, cores, weights, pool), `launch` and `step`. Must not: decide what to compute (the loops
and policies do), end or preempt sequences, or be used from two threads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lanewise.config import WorkerConfig
from lanewise.engine import machine, power, sources, weights
from lanewise.engine.assemble import Opened, count_pages, make_decoder, open_model
from lanewise.engine.carried import Carried
from lanewise.engine.kv_pool import KVPool, layout_of
from lanewise.engine.model import Decoder, OnLayers
from lanewise.engine.native_model import NativeModel
from lanewise.engine.phases import Phases
from lanewise.engine.ranks import LeadingDecoder, Ranks, share
from lanewise.engine.sampler import Drawn, Sampled, draw
from lanewise.engine.sequence import Sequence
from lanewise.engine.shard import Shard
from lanewise.kernels.plan import Span
from lanewise.request import Sampling

__all__ = ["Engine", "Pending", "Sampled", "Work"]


@dataclass(slots=True)
class Work:
    """Compute `num_new` ids of `seq` after those computed or launched; the pool has ensured pages for them.

    One of which the host does not know the id: that which the launch before samples."""

    seq: Sequence
    num_new: int


class Pending:
    """A forward pass that was launched. Its sequences' pages belong to it until `result` has been called."""

    def __init__(self, work: list[Work], spans: list[Span], complete: list[bool], drawn: Drawn | None) -> None:
        self._work = work
        self._spans = spans
        self._complete = complete
        self._drawn = drawn

    @property
    def done(self) -> bool:
        """Whether `result` would not wait; on a CPU always."""
        return self._drawn is None or self._drawn.done

    def result(self) -> list[Sampled | None]:
        """Waits for the pass, once, in the order of the launches: for each work the token sampled or None.

        Tokens are not appended. What was computed of an id that nobody has appended is nobody's: it does not count."""
        drawn = iter(self._drawn.result() if self._drawn is not None else ())
        for item, span in zip(self._work, self._spans, strict=True):
            seq = item.seq
            if seq.num_computed != span.num_context:
                raise RuntimeError(
                    f"{seq.key}: {seq.num_computed} tokens computed where the launch had {span.num_context}"
                )
            seq.num_computed = min(span.num_tokens, len(seq.ids))
            seq.num_ahead -= item.num_new
        return [next(drawn) if flag else None for flag in self._complete]

    def carried(self, seqs: dict[int, Sequence]) -> Carried:
        """The newest id of each of these sequences, which this pass samples."""
        sampled = [item.seq for item, flag in zip(self._work, self._complete, strict=True) if flag]
        rows = {id(seq): row for row, seq in enumerate(sampled)}
        if self._drawn is None or any(id(seq) not in rows for seq in seqs.values()):
            raise ValueError("the launch before does not sample all ids that are missing")
        return Carried(self._drawn.tokens, {index: rows[id(seq)] for index, seq in seqs.items()})


class Engine:
    """Make it with `load`."""

    def __init__(
        self,
        opened: Opened,
        decoder: Decoder | NativeModel | LeadingDecoder,
        pool: KVPool,
        fields: dict[str, str],
        phases: Phases,
    ) -> None:
        self._phases = phases
        self._ranks: Ranks | None = None
        self.startup_s = phases.seconds
        self.model_dir = opened.directory
        self.model_config = model_config = opened.config
        self.pool = pool
        self.fingerprint_fields = fields
        self.fingerprint = weights.fingerprint(fields)
        self.eos_ids = model_config.eos_ids
        self.vocab_size = model_config.vocab_size
        self.max_context_tokens = opened.max_context_tokens
        self.device = str(pool.device)
        self.memory_bytes = machine.memory_bytes(pool.device)
        self.power_watts = power.limit_watts(pool.device)
        self.kernels = decoder.kernels
        self._decoder = decoder

    @classmethod
    def load(cls, config: WorkerConfig, on_progress: sources.Progress | None = None) -> Engine:
        """A ready engine, or ConfigError. Binds the calling thread to the worker's cores if it has its own."""
        phases = Phases()
        opened = open_model(share(config, 0), on_progress)
        ranks = Ranks(config, opened) if config.tensor_parallel > 1 else None
        dtype = str(opened.dtype).removeprefix("torch.")
        fields = weights.fingerprint_fields(opened.checkpoint, opened.config, dtype, config.weights)
        if config.kv_encoding != "Native":
            fields["kv_encoding"] = config.kv_encoding  # so that what came by it has cache keys of its own
        phases.end("open")
        try:
            with torch.inference_mode():
                shard = Shard(0, config.tensor_parallel)
                loaded = weights.load_weights(
                    opened.checkpoint, opened.config, opened.dtype, opened.device, on_progress, config.weights, shard
                )
                phases.end("load")
                num_pages = count_pages(config, opened, loaded)
                decoder: Decoder | NativeModel | LeadingDecoder
                if ranks is None:
                    pool = KVPool(layout_of(opened.config, opened.dtype), num_pages, config.page_tokens, opened.device)
                    decoder = make_decoder(config, opened.config, loaded, pool, on_progress)
                else:
                    pool, decoder = ranks.lead(opened, loaded, num_pages, config.page_tokens)
        except BaseException:
            if ranks is not None:
                ranks.close()
            raise
        if config.kv_channel in ("Auto", "IPC") and config.encryption == "None" and config.kv_encoding == "Native":
            pool.share()
        phases.end("pack")
        engine = cls(opened, decoder, pool, fields, phases)
        engine._ranks = ranks
        return engine

    def close(self) -> None:
        """Ends the other ranks, where there are some. A worker process need not: they end with it."""
        if self._ranks is not None:
            self._ranks.close()

    def step(self, work: list[Work], on_layers: OnLayers | None = None) -> list[Sampled | None]:
        """`launch`, and its result at once: what has been sampled for each work whose ids are then all computed."""
        return self.launch(work, on_layers).result()

    @torch.inference_mode()
    def launch(self, work: list[Work], on_layers: OnLayers | None = None, after: Pending | None = None) -> Pending:
        """Gives the device one forward pass over all work. Where all ids of a sequence are then computed, its next
        token is sampled. `on_layers(lo, hi)` is called when the KV of these layers is in the pool, before this returns.

        `after`: the launch before, whose result may not have been taken. A sequence all of whose ids are computed or
        launched is then continued by the id which that samples, taken from where it lies on the device. The caller must
        know that it does not end there by length; it may end there by what is sampled. On a CPU the pass is over when
        this returns. ValueError for work that cannot be done; then nothing was launched."""
        spans, ids, missing = self._read(work)
        if not work:
            return Pending([], [], [], None)
        if missing and after is None:
            raise ValueError(f"{missing[min(missing)].key}: no id is left to compute")
        carried = after.carried(missing) if missing and after is not None else None
        complete = [item.num_new >= item.seq.num_uncomputed for item in work]
        logits = self._decoder.run(spans, ids, complete, self._synchronised(on_layers), carried)
        drawn = None
        if logits is not None:
            rows = [index for index, flag in enumerate(complete) if flag]
            drawn = draw(logits, [work[index].seq for index in rows], carried.of(rows) if carried is not None else None)
        for item in work:
            item.seq.num_ahead += item.num_new
        return Pending(work, spans, complete, drawn)

    def _read(self, work: list[Work]) -> tuple[list[Span], list[list[int]], dict[int, Sequence]]:
        """Spans and ids of the work, and by its index in it every sequence whose new id is not among its ids."""
        spans, ids, missing = [], [], {}
        for index, item in enumerate(work):
            seq, start, stop = item.seq, item.seq.num_launched, item.seq.num_launched + item.num_new
            if stop == start + 1 == len(seq.ids) + 1:
                missing[index] = seq
            elif not start < stop <= len(seq.ids):
                raise ValueError(f"{seq.key}: cannot compute {item.num_new} of {seq.num_uncomputed} ids")
            if stop > len(seq.pages) * self.pool.page_tokens:
                raise ValueError(f"{seq.key}: pages have not been ensured")
            spans.append(Span(seq.pages, start, item.num_new))
            ids.append(seq.ids[start:stop] or [0])
        return spans, ids, missing

    def warm_up(self) -> None:
        """One short prefill and one decode step, so that the first request meets loaded pages and chosen kernels; then
        memory of the pool is populated in the background."""
        ids = [index % self.vocab_size for index in range(min(32, self.max_context_tokens - 2))]
        seq = Sequence(("warm-up", 0), ids, len(ids), Sampling(max_tokens=2, temperature=0.0))
        try:
            for _ in range(2):
                if not self.pool.ensure(seq, len(seq.ids)):
                    return
                sampled = self.step([Work(seq, seq.num_uncomputed)])[0]
                assert sampled is not None
                seq.ids.append(sampled.token_id)
        finally:
            self.pool.release(seq)
            self.pool.populate()
            self._phases.end("warm")

    def _synchronised(self, on_layers: OnLayers | None) -> OnLayers | None:
        """On a GPU the host runs ahead: wait until the KV is really there before saying so."""
        if on_layers is None or self.pool.device.type == "cpu":
            return on_layers
        said: Callable[[int, int], None] = on_layers

        def after(low: int, high: int) -> None:
            torch.cuda.current_stream(self.pool.device).synchronize()
            said(low, high)

        return after
