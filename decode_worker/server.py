"""The decode worker process: configuration, model, KV receiver, then serving.

Owns: putting the parts together. Must not: hold logic of its own; that is in loop.py.
"""

from __future__ import annotations

import os
import uuid

import uvloop

from lanewise.config import WorkerConfig, parse_config
from lanewise.decode_worker.ahead import runs_ahead
from lanewise.decode_worker.loop import DecodeLoop
from lanewise.engine.runner import Engine
from lanewise.errors import ConfigError
from lanewise.fleet import Role
from lanewise.policy.batching import make_batch_policy
from lanewise.policy.cost import CostModel
from lanewise.rpc.outbox import Outbox
from lanewise.rpc.process import die, serve_worker, worker_facts
from lanewise.telemetry import setup_logging
from lanewise.transfer.encoding import wire_layout
from lanewise.transfer.faults import Faults
from lanewise.transfer.group_port import check, group_host
from lanewise.transfer.keys import Security
from lanewise.transfer.receiver import Receiver
from lanewise.transfer.records import Endpoint, ReceiverEvent


def main() -> None:
    try:
        config = parse_config(WorkerConfig)
        setup_logging("decode", config.name, log_format=config.log_format, log_level=config.log_level)
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
    endpoint = Endpoint(incarnation, engine.fingerprint, engine.fingerprint_fields, layout)
    started: list[DecodeLoop] = []  # the receiver must be bound before the loop exists, since its address is told

    def on_event(event: ReceiverEvent) -> None:
        started[0].on_transfer(event)

    receiver = Receiver(
        endpoint,
        engine.pool,
        on_event,
        faults,
        listen=config.kv_listen,
        data_listen=config.kv_data_listen,
        security=security,
        group_host=group_host(config.kv_channel, config.advertise_host or config.kv_listen),
        group_device=engine.device,
        direct=config.kv_channel in ("Auto", "IPC"),
    )
    facts = worker_facts(
        config,
        Role.DECODE,
        engine,
        incarnation=incarnation,
        kv_address=_reachable(receiver.start(), config),
        kv_capacity_tokens=capacity,
    )

    def build(outbox: Outbox) -> DecodeLoop:
        policy = make_batch_policy(config.batch_policy, max_batch_tokens=config.max_batch_tokens, cost=CostModel())
        loop = DecodeLoop(
            engine,
            policy,
            receiver,
            outbox,
            faults,
            max_running=config.max_running,
            ttft_target_s=config.ttft_target_s,
            ahead=runs_ahead(config.run_ahead, engine.device),
        )
        started.append(loop)
        return loop

    await serve_worker(config, facts, build)


def _reachable(bound: str, config: WorkerConfig) -> str:
    """The bound endpoint as partners should write it: the port that was found, the host that was asked for."""
    port = bound.rpartition(":")[2]
    host = config.advertise_host or config.kv_listen.rpartition("://")[2].rpartition(":")[0]
    return f"tcp://{host}:{port}"
