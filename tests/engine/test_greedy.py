"""Greedy output in fp32 equals that of `transformers` with the same weights, token for token, on every path."""

from __future__ import annotations

import torch

from lanewise.engine.runner import Work
from lanewise.request import Sampling

GREEDY = Sampling(max_tokens=64, temperature=0.0)


def test_alone_and_whole_prompts(oracle, engine, driver):
    drive = driver(chunk_tokens=1000, concurrency=1, key=b"a")
    assert drive.run(engine, drive.open(oracle.prompts, GREEDY)) == oracle.outputs


def test_sixteen_at_once_in_odd_chunks(oracle, engine, driver):
    drive = driver(chunk_tokens=37, concurrency=16, key=b"b")
    assert drive.run(engine, drive.open(oracle.prompts, GREEDY)) == oracle.outputs


def test_from_the_prefix_cache(oracle, engine, driver):
    drive = driver(key=b"c")
    first, second = drive.open(oracle.prompts, GREEDY), drive.open(oracle.prompts, GREEDY)
    drive.run(engine, first)
    cached = [engine.pool.attach(seq, drive.key) for seq in second]
    assert cached == [(len(prompt) - 1) // 64 * 64 for prompt in oracle.prompts]
    assert drive.run(engine, second) == oracle.outputs


def test_prefilled_here_and_decoded_there(oracle, engine, load, driver):
    """The engine's part of a transfer: KV read from one pool, written into one of another page size, layer by layer."""
    other = load(oracle.directory, page_tokens=32)
    assert other.fingerprint == engine.fingerprint
    drive = driver(chunk_tokens=64, key=b"d")
    here, there = drive.open(oracle.prompts, GREEDY), drive.open(oracle.prompts, GREEDY)
    for seq, received in zip(here, there, strict=True):
        while seq.num_output == 0:
            drive.step(engine, [seq])
        assert other.pool.ensure(received, received.num_prompt)
        layout = engine.pool.layout
        for layer in range(layout.num_layers):
            where = range(seq.num_prompt), range(layer, layer + 1), range(layout.num_kv_heads)
            other.pool.write(received.pages, *where, memoryview(engine.pool.read(seq.pages, *where)))
        received.num_computed = received.num_prompt
        received.ids.append(seq.ids[-1])
        engine.pool.release(seq)
    assert drive.run(other, there) == oracle.outputs


def test_the_built_in_model(load, driver):
    """With trained weights, up to the first token whose best two logits rounding could swap."""
    from transformers import AutoModelForCausalLM

    engine = load("builtin://fable")
    model = AutoModelForCausalLM.from_pretrained(engine.model_dir, dtype=torch.float32).eval()
    prompts = [list(range(100, 110)), [7] * 70, list(range(1000, 1200))]
    drive = driver()
    outputs = drive.run(engine, drive.open(prompts, Sampling(max_tokens=32, temperature=0.0)))
    compared = 0
    for prompt, output in zip(prompts, outputs, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1]
        best = logits.topk(2).values
        for token, row, (first, second) in zip(output, logits, best.tolist(), strict=True):
            if first - second > 1e-3:
                assert token == int(row.argmax())
                compared += 1
    assert compared > 80


def test_layers_are_reported_once_their_kv_is_there(oracle, engine, driver):
    seq, *_ = driver().open([oracle.prompts[-1]], GREEDY)
    assert engine.pool.ensure(seq, seq.num_prompt)
    seen = {}

    def there(low: int, high: int) -> bytes:
        heads = range(engine.pool.layout.num_kv_heads)
        return engine.pool.read(seq.pages, range(seq.num_prompt), range(low, high), heads).tobytes()

    def on_layers(low: int, high: int) -> None:
        seen[low, high] = there(low, high)

    engine.step([Work(seq, seq.num_prompt)], on_layers)
    assert list(seen) == [(0, 1), (1, 2), (2, 3)]
    assert seen == {(low, high): there(low, high) for low, high in seen}
    engine.pool.release(seq)
