"""Which processes a service is on one machine: roles, cores, ports, flags, environment.

Owns: the decision, as a pure function of the resource, the machine and the ports it may use.
Must not: look at the machine (machine.py), start anything (child.py).
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lanewise.errors import ConfigError
from lanewise.local.machine import Machine
from lanewise.spec import LLMService
from lanewise.spec_roles import DecodeRole, PrefillRole

MODULES = {"router": "lanewise.router", "prefill": "lanewise.prefill_worker", "decode": "lanewise.decode_worker"}
SPARE_CORE_FROM = 8  # on a machine this wide the router gets a core that no worker uses


@dataclass(frozen=True, slots=True)
class ProcessPlan:
    """One child process."""

    name: str
    role: str  # router, prefill, decode
    argv: tuple[str, ...]
    environment: dict[str, str]
    address: str  # gRPC
    kv_address: str = ""


@dataclass(frozen=True, slots=True)
class ServicePlan:
    service: str
    served_name: str
    model: str
    http: str
    grpc: str
    startup_timeout_s: float
    processes: tuple[ProcessPlan, ...]  # workers first, the router last
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Share:
    """What one worker gets of the machine."""

    cores: tuple[int, ...]  # empty: not pinned
    threads: int
    gpus: str | None  # as CUDA_VISIBLE_DEVICES spells them, one for each rank
    sharing: int  # workers on the same memory


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line adds to the resource."""

    http: str
    grpc: str
    log_level: str = "info"
    secret_dir: str = ""  # the keys of the service; empty: there are none, and nothing is encrypted


def plan(service: LLMService, machine: Machine, ports: Iterator[int], options: Options) -> ServicePlan:
    """The processes of `service` on `machine`; `ConfigError` where the resource asks for what a laptop has not."""
    spec = service.spec
    _refuse_unsupported(service, machine)
    num_prefill, num_decode = count_workers(service, machine)
    roles = ["prefill"] * num_prefill + ["decode"] * num_decode
    shares = divide(machine, [_part(service, role).tensor_parallel for role in roles])
    workers = []
    for index, (role, share) in enumerate(zip(roles, shares, strict=True)):
        number = index if role == "prefill" else index - num_prefill
        address = f"127.0.0.1:{next(ports)}"
        kv_address = f"tcp://127.0.0.1:{next(ports)}" if role == "decode" else ""
        flags = [*_worker_flags(service, role, share), *_key_flags(service, options), "--listen", address]
        flags += ["--kv-listen", kv_address] if kv_address else []
        if kv_address and spec.transfer.encryption == "Authenticated" and options.secret_dir:
            flags += ["--kv-data-listen", f"tcp://127.0.0.1:{next(ports)}"]
        workers.append(_process(f"{role}-{number}", role, tuple(flags), options, share, address, kv_address))
    router_flags = (
        *("--http", options.http, "--grpc", options.grpc),
        *("--workers", ",".join(worker.address for worker in workers)),
        *("--disaggregation", spec.disaggregation if num_prefill else "Never"),
        *("--ttft-target-s", f"{spec.slo.ttft.seconds:g}", "--tpot-target-s", f"{spec.slo.tpot.seconds:g}"),
        *("--drain-max-s", f"{spec.drain.max.seconds:g}"),
        *(("--worker-tls-dir", options.secret_dir) if _key_flags(service, options) else ()),
    )
    router = _process("router", "router", router_flags, options, _Share((), 1, None, 1), options.grpc, "")
    return ServicePlan(
        service=service.metadata.name,
        served_name=spec.model.name,
        model=spec.model.uri,
        http=options.http,
        grpc=options.grpc,
        startup_timeout_s=spec.startup_timeout.seconds,
        processes=(*workers, router),
        notes=tuple(_notes(service, num_prefill, options)),
    )


def count_workers(service: LLMService, machine: Machine) -> tuple[int, int]:
    """(prefill, decode). Few cores and no GPU: splitting them costs more than it saves, so `Auto` starts combined."""
    spec = service.spec
    small = machine.usable_cores < 4 and not machine.gpus
    if spec.disaggregation == "Never" or (spec.disaggregation == "Auto" and small):
        num_prefill = 0
    else:
        num_prefill = 1 if spec.prefill.replicas is None else spec.prefill.replicas
    return num_prefill, 1 if spec.decode.replicas is None else spec.decode.replicas


def divide(machine: Machine, degrees: Sequence[int]) -> list[_Share]:
    """Cores and GPUs by worker, each given by its tensor-parallel degree.

    Cores are divided without overlap where there are enough; the first get the rest. GPUs go round.
    """
    num_workers = len(degrees)
    quota_bound = machine.usable_cores < len(machine.cores)
    # Under a quota the cores belong to other containers too; pinning would crowd everyone onto the lowest numbers.
    cores = machine.cores if not quota_bound else ()
    num_cores = machine.usable_cores
    if num_cores >= SPARE_CORE_FROM and num_cores > num_workers:
        cores, num_cores = cores[:-1], num_cores - 1
    shares = []
    gpus = _gpus(machine, degrees)
    for index, mine_of_gpus in enumerate(gpus):
        low, high = (_border(i, num_cores, num_workers) for i in (index, index + 1))
        mine = tuple(cores[low:high]) if high > low else cores[index % num_cores : index % num_cores + 1]
        sharing = max((sum(gpu in others for others in gpus) for gpu in mine_of_gpus), default=num_workers)
        shares.append(_Share(mine, max(1, high - low), ",".join(mine_of_gpus) if mine_of_gpus else None, sharing))
    return shares


def _gpus(machine: Machine, degrees: Sequence[int]) -> list[tuple[str, ...]]:
    """The GPUs of each worker; none where the machine has none."""
    dealt = itertools.cycle(machine.gpus)
    return [tuple(itertools.islice(dealt, degree)) for degree in degrees]


def _border(index: int, num_cores: int, num_workers: int) -> int:
    """First core of worker `index`: equal shares, one more for each of the first `num_cores % num_workers`."""
    return index * (num_cores // num_workers) + min(index, num_cores % num_workers)


def _part(service: LLMService, role: str) -> PrefillRole | DecodeRole:
    return service.spec.prefill if role == "prefill" else service.spec.decode


def _worker_flags(service: LLMService, role: str, share: _Share) -> list[str]:
    spec, model, part = service.spec, service.spec.model, _part(service, role)
    flags = ["--model", model.uri, "--revision", model.revision, "--served-name", model.name]
    flags += ["--threads", str(share.threads), "--sharing", str(share.sharing)]
    flags += ["--cores", ",".join(map(str, share.cores))] if share.cores else []
    flags += ["--dtype", model.dtype] if "dtype" in model.model_fields_set else []
    flags += ["--max-context-tokens", str(model.max_context_tokens)] if model.max_context_tokens else []
    flags += ["--tensor-parallel", str(part.tensor_parallel)] if part.tensor_parallel > 1 else []
    flags += ["--kv-cache-bytes", str(int(part.kv_cache_memory.value))] if part.kv_cache_memory else []
    flags += ["--kv-channel", spec.transfer.channel] if spec.transfer.channel != "Auto" else []
    flags += ["--kv-encoding", spec.transfer.encoding] if spec.transfer.encoding != "Native" else []
    flags += ["--ttft-target-s", f"{spec.slo.ttft.seconds:g}"]
    flags += ["--drain-timeout-s", f"{spec.drain.timeout.seconds:g}", "--drain-max-s", f"{spec.drain.max.seconds:g}"]
    return flags


def _process(
    name: str, role: str, flags: tuple[str, ...], options: Options, share: _Share, address: str, kv_address: str
) -> ProcessPlan:
    common = ("--name", name, "--log-format", "json", "--log-level", options.log_level)
    threads = str(share.threads)
    environment = {
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
    }
    if share.gpus is not None:
        # Its own GPUs alone are visible: the worker's `auto` finds them, or the CPU where torch has no CUDA.
        environment["CUDA_VISIBLE_DEVICES"] = share.gpus
    return ProcessPlan(
        name, role, (sys.executable, "-m", MODULES[role], *common, *flags), environment, address, kv_address
    )


def _refuse_unsupported(service: LLMService, machine: Machine) -> None:
    spec = service.spec
    if spec.model.uri.startswith("pvc://"):
        raise ConfigError(
            f"spec.model.uri: {spec.model.uri} is a Kubernetes claim; expected hf://, file:// or builtin://"
        )
    for role in ("prefill", "decode"):
        degree = getattr(spec, role).tensor_parallel
        if machine.gpus and degree > len(machine.gpus):
            raise ConfigError(
                f"spec.{role}.tensorParallel: expected at most the {len(machine.gpus)} GPUs here, got {degree}"
            )


def _key_flags(service: LLMService, options: Options) -> tuple[str, ...]:
    encryption = service.spec.transfer.encryption
    if encryption == "None" or not options.secret_dir:
        return ()
    return ("--encryption", encryption, "--secret-dir", options.secret_dir)


def _notes(service: LLMService, num_prefill: int, options: Options) -> Iterator[str]:
    spec = service.spec
    if num_prefill == 0 and (spec.prefill.replicas or 0) > 0:
        yield f"combined: the decode worker prefills too (disaggregation {spec.disaggregation} on this machine)"
    if spec.router.tls is not None:
        yield "spec.router.tls names a Kubernetes Secret; this local service speaks plain HTTP and gRPC"
    if spec.transfer.encryption != "None" and not options.secret_dir:
        yield (
            f"spec.transfer.encryption {spec.transfer.encryption} needs LANEWISE_SECRET_DIR, a folder from "
            "`lanewise keys make`; without it local workers talk over loopback unencrypted"
        )
