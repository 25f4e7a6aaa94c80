"""The prefill worker process: configuration, model, KV sender, then serving.

Owns: putting the parts together. Must not: hold logic of its own; that is in loop.py.
"""

from __future__ import annotations

import os
import uuid

import uvloop

from lanewise.config import WorkerConfig, parse_config
from lanewise.engine.runner import Engine
from lanewise.errors import ConfigError
from lanewise.fleet import Role
from lanewise.policy.batching import make_batch_policy
from lanewise.policy.cost import CostModel
from lanewise.prefill_worker.loop import PrefillLoop
from lanewise.rpc.outbox import Outbox
from lanewise.rpc.process import die, serve_worker, worker_facts
from lanewise.telemetry import setup_logging
from lanewise.transfer.encoding import wire_layout
from lanewise.transfer.faults import Faults
from lanewise.transfer.group_port import check, group_host
from lanewise.transfer.keys import Security
from lanewise.transfer.records import Endpoint
from lanewise.transfer.sender import Sender
from lanewise.transfer.trial import References


def main() -> None:
    try:
        config = parse_config(WorkerConfig)
        setup_logging("prefill", config.name, log_format=config.log_format, log_level=config.log_level)
        uvloop.run(_serve(config))
    except ConfigError as error:
        die(error)


async def _serve(config: WorkerConfig) -> None:
    faults = Faults.from_env(os.environ, (config.listen, config.kv_listen), config.name)
    security = Security.of(config.encryption, config.secret_dir)
    engine = Engine.load(config)  # before anything listens: nothing can ask for a model that is not there
    layout = wire_layout(engine.pool.layout, config.kv_encoding)
    check(
        config.kv_channel,
        device=engine.device,
        encryption=config.encryption,
        encoding=config.kv_encoding,
        ranks=config.tensor_parallel,
        shared=engine.pool.device_memory is not None,
    )
    engine.warm_up()
    incarnation = str(uuid.uuid4())
    capacity = engine.pool.usage().capacity_tokens
    facts = worker_facts(
        config, Role.PREFILL, engine, incarnation=incarnation, kv_address="", kv_capacity_tokens=capacity
    )
    endpoint = Endpoint(incarnation, engine.fingerprint, engine.fingerprint_fields, layout)

    def build(outbox: Outbox) -> PrefillLoop:
        policy = make_batch_policy(config.batch_policy, max_batch_tokens=config.max_batch_tokens, cost=CostModel())
        loop = PrefillLoop(engine, policy, outbox, faults, ttft_target_s=config.ttft_target_s)
        host = group_host(config.kv_channel, config.advertise_host or config.listen)
        direct = config.kv_channel in ("Auto", "IPC")
        sender = Sender(
            endpoint,
            engine.pool,
            loop.on_transfer,
            faults,
            security=security,
            group_host=host,
            group_device=engine.device,
            direct=direct,
            references=References.ALWAYS if config.kv_channel == "IPC" else References.AUTO,
        )
        loop.attach_sender(sender)
        sender.start()
        return loop

    await serve_worker(config, facts, build)
