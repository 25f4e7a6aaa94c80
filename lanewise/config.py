"""Configuration of the processes: one frozen model per process; flag > environment > YAML file > default.

Owns: names, defaults and limits of every knob that is not part of the LLMService resource (that is spec.py).
Must not: read files or start anything at import. Derived values are properties, never mutations.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Annotated, Literal, TypeVar

from pydantic import BeforeValidator, Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    CliApp,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

from lanewise.errors import ConfigError

MIB = 1024 * 1024


def _number(value: object) -> object:
    """A flag or variable is text, and a Literal of numbers knows no text."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


class _ProcessConfig(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix="LANEWISE_", frozen=True, extra="forbid", cli_kebab_case=True, cli_implicit_flags=True
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        file = os.environ.get("LANEWISE_CONFIG")  # a YAML file, as a ConfigMap mounts it
        yaml = (YamlConfigSettingsSource(settings_cls, yaml_file=file),) if file else ()
        return (init_settings, env_settings, *yaml)

    name: str = Field("", description="process name in logs, status and metrics; default: role and pid")
    log_format: Literal["json", "text"] = Field("json", description="one JSON object per line, or readable text")
    log_level: Literal["debug", "info", "warning", "error"] = "info"


class WorkerConfig(_ProcessConfig):
    """A prefill or decode worker."""

    listen: str = Field("127.0.0.1:0", description="gRPC address; port 0 picks a free one and prints it")
    kv_listen: str = Field("tcp://127.0.0.1:0", description="ZeroMQ endpoint of the KV channel (decode workers)")
    advertise_host: str = Field(
        "", description="host under which others reach this worker; default: the one it listens on"
    )
    model: str = Field("builtin://fable", description="builtin://fable, file:///dir, a directory, or hf://owner/name")
    revision: str = Field("main", description="revision of an hf:// model")
    served_name: str = Field("", description="name clients use; default: the last part of the model")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="auto: float32 for builtin://fable on a CPU, else the checkpoint's (fp16 becomes bf16 on a CPU)",
    )
    weights: Literal["full", "int8", "fp8", "w8a8"] = Field(
        "full",
        description="full: in dtype; int8, fp8: one byte a value, a scale for each output; w8a8: activations int8 too",
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    kernels: Literal["auto", "native", "torch", "triton"] = Field(
        "auto", description="auto: native on a CPU with a compiler or a built library, else torch; triton: GPU, opt-in"
    )
    graph_capture_s: float = Field(
        60.0, ge=0, description="with kernels: triton on a GPU, graphs are captured at start for this long; 0: none"
    )
    graph_memory_bytes: int = Field(2 << 30, ge=0, description="device memory that captured graphs may take")
    tensor_parallel: int = Field(
        1,
        ge=1,
        le=8,
        description="ranks that share the model: GPUs, or on a CPU processes with torch kernels",
    )
    threads: int = Field(0, ge=0, le=1024, description="compute threads; 0: one per core of `cores`")
    cores: tuple[int, ...] = Field((), description="CPU cores this worker owns; empty: all it may run on")
    max_context_tokens: int = Field(0, ge=0, description="prompt + output limit; 0: the model's own")
    kv_cache_bytes: int = Field(
        0, ge=0, description="KV pool size; 0: from device or cgroup memory (docs/design.md §3)"
    )
    sharing: int = Field(1, ge=1, description="workers that share this machine's memory, for the automatic pool size")
    page_tokens: Annotated[Literal[8, 16, 32, 64], BeforeValidator(_number)] = Field(
        16, description="tokens per KV page; divides 64"
    )
    batch_policy: str = Field("lanewise", description="batching policy by name, see policy/batching.py")
    max_batch_tokens: int = Field(
        2048, ge=16, description="most new tokens in one batch; policies plan shorter ones by cost and target"
    )
    max_running: int = Field(64, ge=1, description="sequences decoded together")
    run_ahead: Literal["auto", "always", "never"] = Field(
        "auto",
        description="decode workers launch a step before the tokens of the one before are known; auto: on a GPU",
    )
    ttft_target_s: float = Field(0.4, gt=0, description="soft target for requests that bring none")
    session_idle_s: float = Field(3.0, gt=0, description="a session with no ping for this long is lost")
    drain_timeout_s: float = Field(60.0, ge=0, description="a drain finishes its work in place for this long")
    drain_max_s: float = Field(600.0, ge=0, description="and hands over to another pair, or finishes, within this")
    metrics: str = Field("", description="HTTP address of /metrics; empty: none")
    encryption: Literal["None", "Authenticated", "Full"] = Field(
        "None", description="of the KV channel; with anything but None, gRPC takes only clients with a certificate"
    )
    secret_dir: str = Field("", description="folder with the keys of the service, from `lanewise keys make`")
    kv_data_listen: str = Field(
        "",
        description="endpoint for data beside control; default: any port; with Authenticated the one after kv_listen's",
    )
    kv_channel: Literal["Auto", "ZeroMQ", "NCCL", "IPC"] = Field(
        "Auto",
        description="how KV travels. Auto: where nothing is encrypted, what test blocks show to be best of: read from "
        "the prefill worker's memory by a decode worker of the same host, plain TCP connections, ZeroMQ; else ZeroMQ. "
        "IPC: the first of these or no link. NCCL: process groups (gloo on a CPU). IPC and NCCL have not been run on a "
        "GPU",
    )
    kv_encoding: Literal["Native", "Int8", "KIVI4", "KIVI2"] = Field(
        "Native", description="how KV is written on the wire; all but Native are lossy, KIVI4 and KIVI2 experimental"
    )
    health_listen: str = Field(
        "", description="a second gRPC address for health checks alone, without TLS, as a kubelet needs it; empty: none"
    )


class RouterConfig(_ProcessConfig):
    """A router."""

    http: str = Field("127.0.0.1:8000", description="OpenAI HTTP address")
    grpc: str = Field("127.0.0.1:50051", description="public gRPC address")
    discovery: Literal["static", "kubernetes"] = Field("static", description="where `workers` come from")
    workers: tuple[str, ...] = Field((), description="static: gRPC addresses of the workers, any role")
    worker_services: tuple[str, ...] = Field((), description="kubernetes: namespace/name of the workers' Services")
    kubernetes_api: str = Field("", description="URL of the API server; default: the one of this pod's cluster")
    kubernetes_account_dir: str = Field(
        "/var/run/secrets/kubernetes.io/serviceaccount", description="holds token and ca.crt"
    )
    served_name: str = Field("", description="name of the model, for what is asked before a worker has been seen")
    short_max_tokens: int = Field(0, ge=0, description="border of the short lane in reports; 0: learned")
    disaggregation: Literal["Auto", "Always", "Never"] = "Auto"
    instance_lanes: Literal["none", "learned"] = Field(
        "none", description="learned: prefill instances are split between short and long prompts (docs/scheduling.md)"
    )
    ttft_target_s: float = Field(0.4, gt=0)
    tpot_target_s: float = Field(0.05, gt=0)
    request_timeout_s: float = Field(600.0, gt=0, description="hard deadline where the client sets none")
    hold_timeout_s: float = Field(30.0, ge=0, description="how long an accepted request may wait for a worker pair")
    hold_max_requests: int = Field(1000, ge=1)
    hold_max_bytes: int = Field(64 * MIB, ge=1)
    max_queue_wait_s: float = Field(30.0, gt=0, description="predicted TTFT above which requests are shed")
    max_body_bytes: int = Field(8 * MIB, ge=1024, description="larger bodies get PAYLOAD_TOO_LARGE")
    client_stall_s: float = Field(60.0, gt=0, description="a client that takes nothing for this long is cancelled")
    retry_budget: int = Field(2, ge=0, description="lost workers one request survives")
    ping_interval_s: float = Field(1.0, gt=0)
    ping_misses: int = Field(3, ge=1)
    commit_to_token_s: float = Field(10.0, gt=0, description="committed without a token for this long: decode failed")
    drain_max_s: float = Field(600.0, ge=0, description="a drain finishes its requests in place for this long")
    peers: tuple[str, ...] = Field((), description="gRPC addresses of all routers of the service, for KEDA's metrics")
    peer_routers: str = Field("", description="namespace/name of the Service of all routers, instead of `peers`")
    api_keys_file: str = Field("", description="one API key per line; empty: no authentication")
    worker_tls_dir: str = Field("", description="folder with ca.crt, tls.crt, tls.key; empty: no TLS to the workers")


class OperatorConfig(_ProcessConfig):
    """The operator. The chart sets all of it from its values and the downward API."""

    namespaces: tuple[str, ...] = Field((), description="namespaces to work in; empty: the whole cluster")
    kubeconfig: str = Field("", description="outside a cluster; empty: the pod's own service account")
    http: str = Field("0.0.0.0:8080", description="address of /healthz, /readyz and /metrics")
    control_image: str = Field("", description="image of routers; required to apply anything")
    worker_image: str = Field("", description="image of prefill and decode workers; required to apply anything")
    image_pull_policy: Literal["", "Always", "IfNotPresent", "Never"] = ""
    router_cluster_role: str = Field("lanewise-router", description="ClusterRole that routers are bound to")
    lease_name: str = "lanewise"
    lease_namespace: str = Field("", description="default: pod_namespace")
    lease_duration_s: float = Field(10.0, gt=0)
    renew_deadline_s: float = Field(6.0, gt=0)
    retry_period_s: float = Field(1.0, gt=0)
    pod_name: str = Field("", description="this pod, in the lease and in events; default: the host's name")
    pod_namespace: str = Field("default", description="this pod's namespace")
    pod_uid: str = ""
    resync_s: float = Field(600.0, gt=0, description="every service is looked at this often, whatever happens")
    fleet_period_s: float = Field(30.0, gt=0, description="how often routers are asked for the state of the fleet")
    status_period_s: float = Field(30.0, ge=0, description="numbers in a status change at most this often")
    scaling_period_s: float = Field(15.0, gt=0, description="time between two decisions of a ScalingPolicy")
    concurrency: int = Field(4, ge=1, description="services reconciled at the same time")


C = TypeVar("C", bound=_ProcessConfig)


def parse_config(kind: type[C], argv: Sequence[str] | None = None) -> C:
    """Flags (default: of this process), then `LANEWISE_*`, then the file of `LANEWISE_CONFIG`, then the defaults.

    Raises ConfigError naming every field at fault; a flag that does not exist ends the process with status 2.
    """
    try:
        return CliApp.run(kind, cli_args=None if argv is None else list(argv))
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in item['loc']) or 'configuration'}: {item['msg']}"
            for item in error.errors()
        )
        raise ConfigError(problems) from error
