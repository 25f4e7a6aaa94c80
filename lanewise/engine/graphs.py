"""Captured CUDA graphs: decode by batch size, ragged short prompts by their total of new tokens.

Owns: the sizes that are captured, the buffers they read, filling a batch up to a size, and the budget of capturing.
Must not: change what is computed: a row that fills up has no slot for its KV, and its result is read by nobody.
**Not yet run on a GPU.** On a CPU the same buffers are computed from eagerly in Triton's interpreter, which the tests
compare with the plain path.

One graph takes any mixture of prompts and decode rows of its size: page tables, tiles and lengths are data, attention
grids are as large as they can get, and what is not needed of them ends at once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import structlog
import torch

from lanewise.engine.carried import Carried
from lanewise.engine.model import OnLayers
from lanewise.engine.triton_model import TritonDecoder
from lanewise.kernels.copies import staged
from lanewise.kernels.plan import Span
from lanewise.kernels.triton_attention import TritonPlan

PROMPT_ROWS = (16, 32, 64, 96, 128, 192, 256)  # about up to twice the knee of an H200: padding is nearly free below it
PROMPT_SPANS = 16
WARM_RUNS = 2

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Size:
    """A captured batch holds up to `rows` new tokens of up to `spans` sequences; `tiles` 0: decode rows alone."""

    rows: int
    spans: int
    tiles: int


@dataclass(frozen=True, slots=True)
class Budget:
    """What capturing may take: wall time, and device memory beside weights and KV."""

    seconds: float
    num_bytes: int


def sizes(max_running: int, max_rows: int, tile_rows: int) -> list[Size]:
    """Those worth capturing, small to large: every batch size at first, then steps of an eighth or less."""
    counts = [*range(1, 9), *range(12, 33, 4), *range(40, 129, 8), *range(144, 513, 16)]
    decode = [count for count in counts if count < max_running] + [max_running]
    prompts = [rows for rows in PROMPT_ROWS if rows <= max_rows]
    return [
        *(Size(count, count, 0) for count in decode),
        *(Size(rows, min(rows, PROMPT_SPANS), rows // tile_rows + min(rows, PROMPT_SPANS)) for rows in prompts),
    ]


def choose(captured: Seq[Size], spans: Seq[Span]) -> Size | None:
    """The smallest size that holds this batch; None: it is computed without a graph."""
    rows = sum(span.num_new for span in spans)
    decode = rows == len(spans)
    fitting = [
        size for size in captured if size.rows >= rows and size.spans >= len(spans) and (size.tiles == 0) <= decode
    ]
    return min(fitting, key=lambda size: (size.rows, size.tiles), default=None)


class GraphedDecoder(TritonDecoder):
    """As `TritonDecoder`, through graphs where a batch fits one; `prepare` before the first run."""

    kernels = "triton, graphs"

    def prepare(self, max_context_tokens: int, max_running: int, max_rows: int, budget: Budget) -> None:
        """Makes the buffers and captures what the budget allows; on a CPU nothing is captured and every size is run."""
        wanted = sizes(max_running, max_rows, self._kernels.tile_rows)
        self._max_tokens = max_context_tokens
        self._buffers = self._make_buffers(wanted, -(-max_context_tokens // self._kernels.page_tokens))
        self._captured: dict[Size, tuple[torch.cuda.CUDAGraph | None, torch.Tensor]] = {}
        if self._kernels.device.type == "cuda":
            self._capture(wanted, budget)
        else:
            self._captured = {size: (None, torch.empty(0)) for size in wanted}

    def run(
        self,
        spans: Seq[Span],
        ids: Seq[Seq[int]],
        sampled: Seq[bool],
        on_layers: OnLayers | None = None,
        carried: Carried | None = None,
    ) -> torch.Tensor | None:
        size = choose(list(self._captured), spans) if on_layers is None else None
        if size is None:
            return super().run(spans, ids, sampled, on_layers, carried)
        host = self._kernels.host_plan(spans)
        self._fill(size, host, [token for part in ids for token in part], sampled)
        if carried is not None:
            carried.put(self.carry(carried), self._buffers["ids"], host.ends)
        graph, logits = self._captured[size]
        if graph is None:
            logits = self._compute(size)
        else:
            graph.replay()
        return logits[: sum(sampled)] if any(sampled) else None

    def _make_buffers(self, wanted: list[Size], num_pages: int) -> dict[str, torch.Tensor]:
        device = self._kernels.device
        rows, spans, tiles = (max(getattr(size, name) for size in wanted) for name in ("rows", "spans", "tiles"))

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return {
            "ids": zeros(rows),
            "positions": zeros(rows),
            "slots": zeros(rows) - 1,
            "wanted": zeros(spans),
            "table": zeros(spans, num_pages, dtype=torch.int32),
            "decode": zeros(spans, 3, dtype=torch.int32),
            "tiles": zeros(tiles, 4, dtype=torch.int32),
        }

    def _fill(self, size: Size, host: TritonPlan[np.ndarray], ids: list[int], sampled: Seq[bool]) -> None:
        """The batch into the buffers, filled up to `size`. They may still be read by the replay before: copies wait for
        it on the device, the host does not."""
        last = [end - 1 for end, flag in zip(host.ends, sampled, strict=True) if flag]
        parts = (
            ("ids", np.array(ids), size.rows, 0),
            ("positions", host.positions, size.rows, 0),
            ("slots", host.slots, size.rows, -1),
            ("wanted", np.array(last, dtype=np.int64), size.spans, 0),
            ("decode", host.decode, size.spans, 0),
            ("tiles", host.tiles, size.tiles, 0),
        )
        for name, values, count, filler in parts:
            padded = np.full((count, *values.shape[1:]), filler, dtype=values.dtype)
            padded[: len(values)] = values
            self._buffers[name][:count].copy_(staged(padded, self._kernels.device), non_blocking=True)
        table = staged(host.table, self._kernels.device)
        self._buffers["table"][: len(table), : table.shape[1]].copy_(table, non_blocking=True)

    def _compute(self, size: Size) -> torch.Tensor:
        """Logits [spans of the size, vocab] from what is in the buffers; this is what a graph holds."""
        b = self._buffers
        plan = TritonPlan(
            order=[],
            ends=[],
            positions=b["positions"][: size.rows],
            slots=b["slots"][: size.rows],
            table=b["table"],
            decode=b["decode"][: size.spans],
            tiles=b["tiles"][: size.tiles],
            max_tokens=self._max_tokens,
        )
        hidden = self._forward(b["ids"][: size.rows], plan, None)
        return self.logits(hidden[b["wanted"][: size.spans]])

    def _capture(self, wanted: list[Size], budget: Budget) -> None:
        """Large sizes first, since smaller ones then fit into their memory; what the budget leaves out is said."""
        device = self._kernels.device
        started, before = time.monotonic(), torch.cuda.memory_reserved(device)
        pool = torch.cuda.graph_pool_handle()
        for size in _by_use(wanted):
            used = torch.cuda.memory_reserved(device) - before
            if time.monotonic() - started > budget.seconds or used > budget.num_bytes:
                break
            for _ in range(WARM_RUNS):  # compiles kernels, chooses products
                self._compute(size)
            torch.cuda.synchronize(device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                logits = self._compute(size)
            graph.replay()  # the first is slower
            self._captured[size] = graph, logits
        torch.cuda.synchronize(device)
        log.info(
            "graphs_captured",
            captured=len(self._captured),
            left_out=len(wanted) - len(self._captured),
            seconds=round(time.monotonic() - started, 1),
            memory_bytes=torch.cuda.memory_reserved(device) - before,
        )


def _by_use(wanted: list[Size]) -> Iterator[Size]:
    """Decode before prompts, each from large to small."""
    yield from sorted(wanted, key=lambda size: (size.tiles > 0, -size.rows))
