"""Captured CUDA graphs: decode by batch size, ragged short prompts by their total of new tokens; pieces for the others.

Owns: the sizes that are captured whole, the buffers they read, filling a batch up to a size, what is captured first.
Must not: change what is computed: a row that fills up has no slot for its KV, and its result is read by nobody.
**Not yet run on a GPU.** On a CPU the same buffers are computed from eagerly in Triton's interpreter, which the tests
compare with the plain path.

One graph takes any mixture of prompts and decode rows of its size: page tables, tiles and lengths are data, attention
grids are as large as they can get, and what is not needed of them ends at once. Longer prompts, and those whose KV is
announced layer by layer, run in pieces (pieces.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import partial

import numpy as np
import structlog
import torch

from lanewise.engine.capturing import Budget, Recorder
from lanewise.engine.carried import Carried
from lanewise.engine.model import OnLayers
from lanewise.engine.pieces import Pieces
from lanewise.engine.triton_model import TritonDecoder
from lanewise.kernels.copies import staged, upload
from lanewise.kernels.plan import Span
from lanewise.kernels.triton_attention import TritonPlan

PROMPT_ROWS = (16, 32, 64, 96, 128, 192, 256)  # about up to twice the knee of an H200: padding is nearly free below it
PROMPT_SPANS = 16

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Size:
    """A captured batch holds up to `rows` new tokens of up to `spans` sequences; `tiles` 0: decode rows alone."""

    rows: int
    spans: int
    tiles: int


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
        self._buffers = self._make_buffers(wanted, -(-max_context_tokens // self._kernels.page_tokens), max_rows)
        self._captured: dict[Size, tuple[torch.cuda.CUDAGraph | None, torch.Tensor]] = {}
        self._pieces = Pieces(self, self._buffers, max_rows)
        if self._kernels.device.type == "cuda":
            self._capture(wanted, Recorder(budget, self._kernels.device))
        else:
            self._captured = {size: (None, torch.empty(0)) for size in wanted}
            self._pieces.prepare(None)

    def run(
        self,
        spans: Seq[Span],
        ids: Seq[Seq[int]],
        sampled: Seq[bool],
        on_layers: OnLayers | None = None,
        carried: Carried | None = None,
    ) -> torch.Tensor | None:
        size = choose(list(self._captured), spans) if on_layers is None else None
        rows = size.rows if size is not None else self._pieces.choose(sum(span.num_new for span in spans))
        if rows is None:
            return super().run(spans, ids, sampled, on_layers, carried)
        host = self._kernels.host_plan(spans)
        self._fill_rows(rows, host, [token for part in ids for token in part])
        if carried is not None:
            carried.put(self.carry(carried), self._buffers["ids"], host.ends)
        last = np.array([end - 1 for end, flag in zip(host.ends, sampled, strict=True) if flag], dtype=np.int64)
        if size is not None:
            logits = self._run_whole(size, host, last)
        else:
            hidden = self._pieces.run(rows, self._device_plan(rows, host), on_layers)
            logits = self.logits(hidden[upload(last, hidden.device)]) if len(last) else None
        return logits

    def _run_whole(self, size: Size, host: TritonPlan[np.ndarray], last: np.ndarray) -> torch.Tensor | None:
        self._fill_spans(size, host, last)
        graph, logits = self._captured[size]
        if graph is None:
            logits = self._compute(size)
        else:
            graph.replay()
        return logits[: len(last)] if len(last) else None

    def _device_plan(self, rows: int, host: TritonPlan[np.ndarray]) -> TritonPlan[torch.Tensor]:
        """For attention between pieces: that of the batch itself."""
        device, b = self._kernels.device, self._buffers
        table, decode, tiles = (upload(array, device) for array in (host.table, host.decode, host.tiles))
        positions, slots = b["positions"][:rows], b["slots"][:rows]
        return TritonPlan(host.order, host.ends, positions, slots, table, decode, tiles, host.max_tokens)

    def _make_buffers(self, wanted: list[Size], num_pages: int, max_rows: int) -> dict[str, torch.Tensor]:
        device = self._kernels.device
        rows, spans, tiles = (max(getattr(size, name) for size in wanted) for name in ("rows", "spans", "tiles"))
        rows = max(rows, max_rows)

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

    def _fill_rows(self, rows: int, host: TritonPlan[np.ndarray], ids: list[int]) -> None:
        """The new tokens into the buffers, filled up to `rows`."""
        self._put("ids", np.array(ids, dtype=np.int64), rows, 0)
        self._put("positions", host.positions, rows, 0)
        self._put("slots", host.slots, rows, -1)

    def _fill_spans(self, size: Size, host: TritonPlan[np.ndarray], last: np.ndarray) -> None:
        self._put("wanted", last, size.spans, 0)
        self._put("decode", host.decode, size.spans, 0)
        self._put("tiles", host.tiles, size.tiles, 0)
        table = staged(host.table, self._kernels.device)
        self._buffers["table"][: len(table), : table.shape[1]].copy_(table, non_blocking=True)

    def _put(self, name: str, values: np.ndarray, count: int, filler: int) -> None:
        """They may still be read by the replay before: copies wait for it on the device, the host does not."""
        padded = np.full((count, *values.shape[1:]), filler, dtype=values.dtype)
        padded[: len(values)] = values
        self._buffers[name][:count].copy_(staged(padded, self._kernels.device), non_blocking=True)

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

    def _capture(self, wanted: list[Size], recorder: Recorder) -> None:
        """What is used most first; what the budget leaves out is said."""
        for size in _by_use(wanted):
            if not recorder.spent:
                self._captured[size] = recorder.record(partial(self._compute, size))
        self._pieces.prepare(recorder)
        torch.cuda.synchronize(self._kernels.device)
        log.info(
            "graphs_captured",
            captured=len(self._captured),
            left_out=len(wanted) - len(self._captured),
            pieces=len(self._pieces.captured),
            pieces_left_out=len(self._pieces.sizes) - len(self._pieces.captured),
            seconds=round(recorder.seconds, 1),
            memory_bytes=recorder.num_bytes,
        )


def _by_use(wanted: list[Size]) -> Iterator[Size]:
    """Decode before prompts, each from large to small."""
    yield from sorted(wanted, key=lambda size: (size.tiles > 0, -size.rows))
