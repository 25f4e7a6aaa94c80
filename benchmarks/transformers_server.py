"""`transformers` behind the part of the OpenAI API that `lanewise bench` uses: a peer that needs nothing installed.

    python benchmarks/transformers_server.py MODEL --port 8001 [--threads 2]

Its own generation loop with its own KV cache in bf16, one request after the other, as `model.generate` serves them:
what a server written in an afternoon does. Greedy, and every token is sent when it is there.
"""

from __future__ import annotations

import argparse
import asyncio
import inspect
import json
import queue
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
from aiohttp import web

Job = tuple[list[int], int, Callable[[int | None], None]]


class Generator(threading.Thread):
    """Takes jobs one by one; each is told its tokens, then None."""

    def __init__(self, directory: str) -> None:
        super().__init__(daemon=True)
        import transformers

        warnings.simplefilter("ignore")
        self.model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        self.jobs: queue.Queue[Job] = queue.Queue()

    def run(self) -> None:
        while True:
            ids, count, tell = self.jobs.get()
            try:
                self.generate(ids, count, tell)
            finally:
                tell(None)

    @torch.inference_mode()
    def generate(self, ids: list[int], count: int, tell: Callable[[int | None], None]) -> None:
        cache, rows = None, torch.tensor([ids])
        # Renamed in transformers 5.24, which warns of the old name.
        name = "cache" if "cache" in inspect.signature(self.model.forward).parameters else "past_key_values"
        for _ in range(count):
            step = self.model(input_ids=rows, use_cache=True, logits_to_keep=1, **{name: cache})
            cache, token = getattr(step, name), int(step.logits[0, -1].argmax())
            tell(token)
            rows = torch.tensor([[token]])


GENERATOR = web.AppKey("generator", Generator)


async def complete(request: web.Request) -> web.StreamResponse:
    generator = request.app[GENERATOR]
    body = await request.json()
    prompt = body["prompt"]
    ids = prompt if isinstance(prompt, list) else generator.tokenizer.encode(prompt)
    loop, tokens = asyncio.get_running_loop(), asyncio.Queue[int | None]()
    generator.jobs.put((ids, body["max_tokens"], lambda token: loop.call_soon_threadsafe(tokens.put_nowait, token)))
    response = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await response.prepare(request)

    async def event(**fields: Any) -> None:
        await response.write(f"data: {json.dumps(fields)}\n\n".encode())

    sent = 0
    while (token := await tokens.get()) is not None:
        sent += 1
        await event(choices=[{"text": generator.tokenizer.decode([token]), "token_ids": [token]}])
    await event(choices=[{"text": "", "finish_reason": "length"}])
    await event(choices=[], usage={"prompt_tokens": len(ids), "completion_tokens": sent})
    await response.write(b"data: [DONE]\n\n")
    return response


async def models(_: web.Request) -> web.Response:
    return web.json_response({"data": [{"id": "m"}]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--port", type=int, default=8001)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    app = web.Application()
    app[GENERATOR] = Generator(options.model)
    app[GENERATOR].start()
    app.router.add_post("/v1/completions", complete)
    app.router.add_get("/v1/models", models)
    web.run_app(app, host="127.0.0.1", port=options.port, print=None)


if __name__ == "__main__":
    main()
