"""From what benchmarks/gpu.py found to its table in Markdown, with what was wanted. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.gpu_models import SHAPES, Wanted

SPLIT_ROWS = (("TTFT", "ttft_ms"), ("first to second token", "gap_ms"), ("second token", "second_token_ms"))


def table(found: dict[str, Any]) -> str:
    """Every shape that is in it; a part that was not measured is left out."""
    lines: list[str] = []
    for name, parts in found.items():
        shape = SHAPES[name]
        lines += [f"\n### {name}\n"]
        if "engine" in parts:
            lines += _engine(parts["engine"], shape.decode, shape.prefill_tokens, shape.product, shape.wanted)
        if "serve" in parts:
            lines += _serve(parts["serve"], shape.wanted)
        if "split" in parts:
            lines += _split(parts["split"], shape.split_prompt_tokens)
    return "\n".join(lines)


def _engine(
    found: dict[str, Any], decode: tuple[int, int], prefill: int, product: int, wanted: Wanted
) -> Iterator[str]:
    yield f"{found['device']}, torch {found['torch']}, kernels: {found['kernels']}\n"
    yield "| engine alone | figure | wanted | |"
    yield "|---|---|---|---|"
    step, share = found["decode_step_ms"], found["prefill_products_share"]
    limit, met = _limit(wanted.decode_step_ms), _verdict(step, wanted.decode_step_ms)
    yield f"| decode step, {decode[0]} × {decode[1]} tokens | {step:.2f} ms | {limit} | {met} |"
    yield f"| plain product, {product}³ | {found['product_ms']:.2f} ms, {found['product_tflops']:.1f} TFLOP/s | | |"
    yield f"| prefill of {prefill} tokens | {found['prefill_ms']:.1f} ms | | |"
    limit = "" if wanted.prefill_share is None else f"≥ {wanted.prefill_share:.0%}"
    met = "" if wanted.prefill_share is None else _word(share >= wanted.prefill_share)
    yield f"| its products alone, of the plain product's rate | {share:.1%} | {limit} | {met} |"
    yield f"| the same with the operations of attention | {found['prefill_share']:.1%} | | |\n"


def _serve(found: dict[str, Any], wanted: Wanted) -> Iterator[str]:
    ours, theirs = found["lanewise"], found["fcfs"]
    theirs_columns = "FCFS, no graphs: req/s | TTFT p50, ms"
    yield f"| clients | {theirs_columns} | Lanewise: req/s | TTFT p50 | p99 | server mean | req/s, wanted ≥ 1 × |"
    yield "|---|---|---|---|---|---|---|---|"
    for clients, mine in ours.items():
        its = theirs[clients]
        ratio = mine["request_rate"] / its["request_rate"]
        yield (
            f"| {clients} | {its['request_rate']:.1f} | {its['ttft_ms']['p50']:.1f} | {mine['request_rate']:.1f} | "
            f"{mine['ttft_ms']['p50']:.1f} | {mine['ttft_ms']['p99']:.1f} | {mine['server_ttft_ms']:.1f} | "
            f"{ratio:.2f} ×, {_word(ratio >= 1)} |"
        )
    first, last = min(ours, key=int), max(ours, key=int)
    cold, crowd = ours[first]["server_ttft_ms"], ours[last]["ttft_ms"]["p50"]
    yield f"\n- cold TTFT, clients: {first}, at the server: {cold:.1f} ms{_against(cold, wanted.cold_ttft_ms)}"
    yield f"- median TTFT, clients: {last}: {crowd:.1f} ms{_against(crowd, wanted.crowd_ttft_ms)}\n"


def _split(found: dict[str, Any], prompt: int) -> Iterator[str]:
    transfers, prompts = found["split"]["kv_transfers"], found["split"]["prompts"]
    yield f"| prompts of {prompt} tokens | one process | two on one GPU | cost of the split |"
    yield "|---|---|---|---|"
    for clients in (key for key in found["split"] if key.isdigit()):
        together, split = found["together"][clients], found["split"][clients]
        for what, path in SPLIT_ROWS:
            one, two = together[path]["p50"], split[path]["p50"]
            yield f"| {what} p50, clients: {clients} | {one:.1f} ms | {two:.1f} ms | {two - one:+.1f} ms |"
        one, two = together["output_tokens_per_s"], split["output_tokens_per_s"]
        yield f"| output tokens/s, clients: {clients} | {one:.0f} | {two:.0f} | {two / one:.2f}× |"
    yield f"\nThe KV of {transfers:g} of {prompts} prompts travelled between the two processes.\n"


def _limit(value: float | None) -> str:
    return "" if value is None else f"≤ {value:g} ms"


def _against(value: float, limit: float | None) -> str:
    return "" if limit is None else f" (wanted {_limit(limit)}: {_verdict(value, limit)})"


def _verdict(value: float, limit: float | None) -> str:
    return "" if limit is None else _word(value <= limit)


def _word(met: bool) -> str:
    return "met" if met else "**missed**"
