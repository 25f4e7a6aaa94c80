"""Greedy output through real processes equals `transformers` on the same weights, token for token, on every path."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.e2e import models
from tests.e2e.service import Generated, generate_all, request, running, service_file

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
TOKENS = 64
SPLIT = {"disaggregation": "Always", "prefill": {"replicas": 1}, "decode": {"replicas": 1}}
COMBINED = {"disaggregation": "Never", "prefill": {"replicas": 0}, "decode": {"replicas": 1}}


@pytest.fixture(scope="module", params=["fable", *models.FAMILIES])
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[list[int]], list[list[int]]]:
    """Model directory, prompts, expected ids."""
    if request.param == "fable":
        directory, vocab = models.FABLE, 1000
    else:
        directory, vocab = models.make_model(request.param, tmp_path_factory.mktemp(request.param)), models.VOCAB
    batch = models.prompts(vocab)
    return directory, batch, models.oracle(directory, batch, TOKENS)


def ask(address: str, batch: list[list[int]], concurrency: int) -> list[Generated]:
    results: list[Generated] = []
    for start in range(0, len(batch), concurrency):
        messages = [
            request(prompt, max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
            for prompt in batch[start : start + concurrency]
        ]
        results += asyncio.run(generate_all(address, messages))
    return results


def check(results: list[Generated], expected: list[list[int]], path: str) -> None:
    for number, (result, ids) in enumerate(zip(results, expected, strict=True)):
        assert result.reason == "length"
        assert result.token_ids == ids, f"{path}: prompt {number} differs"


@pytest.mark.parametrize("topology", ["split", "combined"])
def test_every_path_equals_transformers(
    case: tuple[Path, list[list[int]], list[list[int]]], topology: str, tmp_path: Path
) -> None:
    directory, batch, expected = case
    spec = SPLIT if topology == "split" else COMBINED
    file = service_file(tmp_path / "spec", model={"uri": f"file://{directory}", "dtype": "float32"}, **spec)
    # Small batches, so that prompts of 900 tokens take many chunks, which are no multiple of a page.
    with running(tmp_path / "state", file, env={"LANEWISE_MAX_BATCH_TOKENS": "200"}) as service:
        check(ask(service.grpc, batch, 1), expected, "first")
        again = ask(service.grpc, batch, 1)
        check(again, expected, "prefix-cached")
        longest = again[-1].finished[0].usage
        assert longest.cached_tokens >= 832, f"the second run of 900 tokens found only {longest.cached_tokens} cached"
        check(ask(service.grpc, batch, 16), expected, "16 at once")
        service.audit()
        moved = service.metric("lanewise_kv_bytes_total", direction="received")
        assert (moved > 0) == (topology == "split"), f"{moved} bytes of KV moved"
