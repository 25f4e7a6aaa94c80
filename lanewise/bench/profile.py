"""`lanewise profile`: a worker's cost model, measured, as a YAML file that `sim`, `plan` and workers read.

Owns: the command, the two sources (an engine loaded here, a worker that runs), and the file.
Must not: time steps (`engine/measure.py`) or fit (`policy/fit.py`); the engine is imported only when it is measured.
"""

from __future__ import annotations

import contextlib
import importlib
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from lanewise.cli import CommandFailed, command_parser
from lanewise.config import WorkerConfig, parse_config
from lanewise.errors import ConfigError
from lanewise.policy.cost import CostModel
from lanewise.policy.fit import Fitted, Measured, fit_cost
from lanewise.policy.refit import WARM_BATCHES

DIGITS = 4  # significant ones in the file
ANSWER_S = 5.0
STATS_S = 10.0


def main(argv: Sequence[str]) -> int:
    """Measures, fits, writes."""
    parser = command_parser(
        "profile",
        "Measure a model on this machine and write its cost profile. Without --worker the engine is loaded here, in\n"
        "this process, and run over a sweep of batches; further flags are those of a worker (--model, --cores, ...).\n"
        "With --worker, the model that a running worker has refitted from its own traffic is read.",
        "lanewise profile --model builtin://fable --cores '[0]' --threads 1 --output fable.yaml",
    )
    parser.add_argument("--worker", metavar="ADDR", help="gRPC address of a running prefill or decode worker")
    parser.add_argument("--output", metavar="F", help="file to write (default: standard output)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="times each batch is run (default: 5)")
    options, rest = parser.parse_known_args(argv)
    if options.worker:
        if rest:
            raise ConfigError(f"with --worker there is no engine to configure: {rest[0]}")
        data = profile_of_worker(options.worker)
    else:
        if options.repeats < 1:
            raise ConfigError(f"--repeats: expected at least 1, got {options.repeats}")
        with contextlib.redirect_stdout(sys.stderr):  # what the engine logs; standard output is for the profile
            data = profile_of_engine(parse_config(WorkerConfig, rest), options.repeats)
    text = yaml.safe_dump(data, sort_keys=False, width=120)
    if options.output is None:
        print(text, end="")
        return 0
    try:
        Path(options.output).write_text(text, encoding="utf-8")
    except OSError as error:
        raise CommandFailed(f"cannot write {options.output}: {error.strerror}") from error
    return 0


def profile_of_engine(config: WorkerConfig, repeats: int) -> dict[str, Any]:
    """The profile of an engine that is loaded here for the purpose."""
    try:
        runner = importlib.import_module("lanewise.engine.runner")
        measuring = importlib.import_module("lanewise.engine.measure")
    except ImportError as error:
        raise ConfigError(f"measuring needs the worker packages (pip install 'lanewise[worker]'): {error}") from error
    engine = runner.Engine.load(config)
    engine.warm_up()
    measured = [
        Measured(shape.chunks, shape.decoding, shape.decoding * shape.context, seconds)
        for shape, seconds in measuring.measure(engine, repeats=repeats, on_step=_progress())
    ]
    fitted = fit_cost(measured, CostModel())
    return {
        "name": f"{config.served_name or config.model.rstrip('/').rpartition('/')[2]}@{engine.device}",
        "coefficients": _rounded(fitted.cost),
        "kv_bytes_per_token": engine.pool.layout.bytes_per_token,
        "kv_capacity_tokens": engine.pool.usage().capacity_tokens,
        "notes": _notes(fitted, len(measured), engine.kernels),
    }


def _progress() -> Any:
    """A line that is rewritten on a terminal; nothing elsewhere."""
    if not sys.stderr.isatty():
        return None

    def show(done: int, total: int) -> None:
        print(f"\rmeasuring {done} of {total}", end="\n" if done == total else "", file=sys.stderr, flush=True)

    return show


def _notes(fitted: Fitted, batches: int, kernels: str) -> dict[str, Any]:
    return {
        "measured": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": platform.machine(),
        "kernels": kernels,
        "batches": batches,
        "mean_error_percent": round(100 * fitted.mean_error, 1),
        "worst_error_percent": round(100 * fitted.worst_error, 1),
    }


def _rounded(cost: CostModel) -> dict[str, float]:
    return {name: float(f"{value:.{DIGITS}g}") for name, value in asdict(cost).items()}


def profile_of_worker(address: str) -> dict[str, Any]:
    """What a running worker says of itself: its refitted cost model and its pool. Its traffic goes on undisturbed."""
    import grpc

    from lanewise.rpc import convert
    from lanewise.rpc import lanewise_pb2 as pb
    from lanewise.rpc import lanewise_pb2_grpc as pb_grpc

    def hello() -> Any:
        yield pb.RouterMessage(hello=pb.RouterHello(router="lanewise profile", protocol=1))
        time.sleep(STATS_S)  # in gRPC's own thread: the stream stays open this long at most

    try:
        with grpc.insecure_channel(address) as channel:
            stub = pb_grpc.WorkerStub(channel)  # type: ignore[no-untyped-call]
            identity = convert.description_from_wire(stub.Describe(pb.DescribeRequest(), timeout=ANSWER_S).description)
            call = stub.Session(hello(), timeout=STATS_S)
            stats = next(convert.stats_from_wire(m.stats) for m in call if m.WhichOneof("message") == "stats")
            call.cancel()
    except grpc.RpcError as error:
        raise CommandFailed(f"{address}: {error.code().name}: {error.details()}") from error
    except StopIteration:
        raise CommandFailed(f"{address}: the worker sent no statistics") from None
    cost = CostModel.from_mapping(stats.cost)
    if not stats.cost or cost == CostModel():
        raise CommandFailed(f"{address}: this worker has computed no {WARM_BATCHES} batches yet; send it work first")
    return {
        "name": f"{identity.model}@{identity.device}",
        "coefficients": _rounded(cost),
        "kv_bytes_per_token": identity.kv_bytes_per_token,
        "kv_capacity_tokens": identity.kv_capacity_tokens,
        "notes": {
            "measured": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "worker": identity.name,
            "source": "refitted online: four scales of the default model, from this worker's traffic",
        },
    }
