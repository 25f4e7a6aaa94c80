"""Static buffers and sizes of captured graphs and pieces. On a GPU they are captured and replayed; without one, what
would be replayed is computed eagerly from the same buffers."""

from __future__ import annotations

import os
from itertools import pairwise

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported and when a kernel is defined
pytest.importorskip("triton")

from lanewise.engine import graphs
from lanewise.engine.capturing import Budget
from lanewise.engine.carried import Carried
from lanewise.engine.checkpoint import Checkpoint
from lanewise.engine.graphs import PROMPT_ROWS, GraphedDecoder, Size, choose, sizes
from lanewise.engine.model_config import read_model_config
from lanewise.engine.pieces import PIECE_ROWS
from lanewise.engine.weights import load_weights
from lanewise.kernels.plan import Span
from lanewise.kernels.triton_attention import TritonAttention

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PAGE, PAGES, CONTEXT = 8, 40, 64


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> GraphedDecoder:
    """Two layers with head norms, biases and a window; graphs for up to 3 sequences or 16 new tokens, pieces for 32."""
    import transformers

    directory = tmp_path_factory.mktemp("model")
    config = transformers.Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=128, initializer_range=0.2,
        attention_bias=True, use_sliding_window=True, sliding_window=9, max_window_layers=1,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Qwen3ForCausalLM(config).save_pretrained(directory)
    read = read_model_config(directory)
    loaded = load_weights(Checkpoint(directory), read, torch.float32, DEVICE)
    attention = TritonAttention(16, 2, PAGE, torch.float32, DEVICE)
    attention.block_tokens, attention.tile_rows, attention.split_tokens = 16, 16, 32
    cache = list(torch.zeros(2, 2, PAGES, PAGE, 2, 16, device=DEVICE))
    made = GraphedDecoder(read, loaded, attention, cache)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "PROMPT_SPANS", 4)  # every entry that only fills up takes time in the interpreter
        made.prepare(CONTEXT, 3, 32, Budget(60.0, 1 << 30))
    del made._captured[Size(2, 2, 0)]  # so that two rows are filled up to three
    del made._captured[Size(32, 4, 6)]
    return made


BATCHES = {
    "decode of one": ([(5, 1)], [True]),
    "decode that fills its size": ([(5, 1), (40, 1), (0, 1)], [True] * 3),
    "decode filled up": ([(33, 1), (9, 1)], [True, True]),
    "a prompt": ([(0, 11)], [True]),
    "prompts after cached ones, one unfinished, beside decode": ([(8, 5), (20, 1), (0, 3)], [True, True, False]),
    "a chunk that wants no token": ([(16, 6)], [False]),
}


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_a_filled_up_batch_is_the_batch(batch, decoder):
    """The same logits, the same KV, and not one other slot of the pool is written.

    To rounding: the library's products and its silu add and round in another order for 16 rows than for 11.
    """
    compare(decoder, *batch, announced=False)


PIECES = {
    "decode, announced": ([(5, 1)], [True], True, 16),
    "more than a whole graph holds": ([(0, 17)], [True], False, 32),
    "cached, unfinished, beside decode, announced": ([(8, 5), (20, 1), (0, 13)], [True, True, False], True, 32),
}


@pytest.mark.parametrize("batch", PIECES.values(), ids=PIECES)
def test_a_batch_in_pieces_is_the_batch(batch, decoder, monkeypatch):
    """So it runs where it is long, or where its KV is announced layer by layer."""
    *shapes_and_sampled, announced, rows = batch
    run, ran = decoder._pieces.run, []
    monkeypatch.setattr(decoder._pieces, "run", lambda size, *rest: ran.append(size) or run(size, *rest))
    compare(decoder, *shapes_and_sampled, announced=announced)
    assert ran == [rows]


def compare(decoder: GraphedDecoder, shapes: list[tuple[int, int]], sampled: list[bool], *, announced: bool) -> None:
    """`decoder` against the same without graphs. `announced`: each layer's KV must be there when it is said to be."""
    generator = torch.Generator().manual_seed(2)
    order = torch.randperm(PAGES, generator=generator).tolist()
    spans = [Span([order.pop() for _ in range(-(-(old + new) // PAGE))], old, new) for old, new in shapes]
    ids = [torch.randint(0, 64, (new,), generator=generator).tolist() for _, new in shapes]
    before = [torch.randn(layer.shape, generator=generator).to(DEVICE) for layer in decoder.cache]
    said: list[torch.Tensor] = []

    def on_layers(low: int, high: int) -> None:
        assert (low, high) == (len(said), len(said) + 1)
        said.append(decoder.cache[low].clone())

    found = []
    for captured in (True, False):
        for layer, old in zip(decoder.cache, before, strict=True):
            layer.copy_(old)
        # Leftovers of a larger batch must not show.
        for name, buffer in decoder._buffers.items():
            buffer.fill_(63 if name == "ids" else 1)
        run = decoder.run if captured else super(GraphedDecoder, decoder).run
        with torch.inference_mode():
            logits = run(spans, ids, sampled, on_layers if captured and announced else None)
        found.append((logits, [layer.clone() for layer in decoder.cache]))
    (logits, kv), (plain_logits, plain_kv) = found
    for left, right, old in zip(kv, plain_kv, before, strict=True):
        torch.testing.assert_close(left, right, atol=2e-6, rtol=1e-5)
        written = (right != old).any(-1).any(-1)
        assert int(written.sum()) == 2 * sum(new for _, new in shapes)
        assert torch.equal(left[~written], right[~written])
    assert len(said) == (len(kv) if announced else 0)
    assert all(torch.equal(layer, left) for layer, left in zip(said, kv, strict=False))
    assert (logits is None) == (plain_logits is None) == (not any(sampled))
    if logits is not None and plain_logits is not None:
        torch.testing.assert_close(logits, plain_logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("batch", ["decode filled up", "prompts after cached ones, one unfinished, beside decode"])
@pytest.mark.parametrize("captured", [True, False], ids=["graphs", "eager"])
def test_ids_are_taken_from_the_device(captured, batch, decoder):
    """The id of a decode row that a launch before has left on the device: the same logits and KV, to the bit."""
    shapes, sampled = BATCHES[batch]
    generator = torch.Generator().manual_seed(3)
    order = torch.randperm(PAGES, generator=generator).tolist()
    spans = [Span([order.pop() for _ in range(-(-(old + new) // PAGE))], old, new) for old, new in shapes]
    ids = [torch.randint(0, 64, (new,), generator=generator).tolist() for _, new in shapes]
    before = [torch.randn(layer.shape, generator=generator).to(DEVICE) for layer in decoder.cache]
    rows = [index for index, (_, new) in enumerate(shapes) if new == 1]
    assert rows
    # What was sampled lies in another order, among others.
    tokens = torch.tensor([63, *(ids[index][0] for index in reversed(rows)), 62], device=DEVICE)
    carried = Carried(tokens, {index: len(rows) - place for place, index in enumerate(rows)})
    unknown = [[0] if index in rows else part for index, part in enumerate(ids)]
    found = []
    for given, known in ((ids, None), (unknown, carried)):
        for layer, old in zip(decoder.cache, before, strict=True):
            layer.copy_(old)
        with torch.inference_mode():
            run = decoder.run if captured else super(GraphedDecoder, decoder).run
            logits = run(spans, given, sampled, None, known)
        found.append((logits.clone(), [layer.clone() for layer in decoder.cache]))
    (logits, kv), (carried_logits, carried_kv) = found
    assert torch.equal(logits, carried_logits)
    assert all(torch.equal(left, right) for left, right in zip(kv, carried_kv, strict=True))


def test_all_is_captured_where_there_is_a_gpu(decoder):
    """Within a minute and a gigabyte; elsewhere nothing can be."""
    on_gpu = DEVICE.type == "cuda"
    assert all((graph is not None) == on_gpu for graph, _ in decoder._captured.values())
    assert all((pieces is not None) == on_gpu for pieces in decoder._pieces._graphs.values())
    assert decoder._pieces.captured == [16, 32]


def test_sizes_are_chosen_by_what_they_hold():
    every = sizes(max_running=6, max_rows=64, tile_rows=64)
    assert [size.rows for size in every if size.tiles == 0] == [1, 2, 3, 4, 5, 6]
    assert [size.rows for size in every if size.tiles] == [16, 32, 64]

    def chosen(*new: int) -> Size | None:
        return choose(every, [Span([0], 0, count) for count in new])

    assert chosen(1, 1, 1, 1) == Size(4, 4, 0)
    assert chosen(*[1] * 7) == Size(16, 16, 16)  # more decode rows than a decode graph has
    assert chosen(15, 1) == Size(16, 16, 16)
    assert chosen(17) == Size(32, 16, 16)
    assert chosen(65) is None
    assert chosen(*[2] * 17) is None  # more sequences than a prompt graph has


def test_pieces_go_on_where_whole_graphs_end():
    whole = len(PROMPT_ROWS)
    assert PIECE_ROWS[:whole] == PROMPT_ROWS
    assert all(more - rows <= rows / 8 for rows, more in pairwise(PIECE_ROWS[whole - 1 :]))


@pytest.mark.parametrize("max_running", [1, 7, 64, 600])
def test_a_decode_batch_is_padded_by_little(max_running):
    every = sizes(max_running, 512, 64)
    for count in range(1, max_running + 1):
        size = choose(every, [Span([0], 3, 1)] * count)
        if count <= 512 or count == max_running:
            assert size is not None
            assert size.rows < max(count * 1.5, count + 4) or size.rows == max_running
