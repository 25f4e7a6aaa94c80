"""Profiles: a model on a device as cost coefficients, from facts and efficiencies or from measured numbers.

Owns: the records, their YAML form, the shipped models and devices (`profiles/*.yaml`), and the derivation of a
`CostModel` from them. Must not: measure anything (`lanewise profile` does) or know service resources.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from lanewise.errors import ConfigError
from lanewise.policy.cost import CostModel

BYTES_PER_WEIGHT = 2
ELEMENTWISE_BYTES = 28  # of activation traffic per hidden element and layer
ELEMENTWISE_BW = 1.1  # and its effective fraction of memory bandwidth, from the same fit


@dataclass(frozen=True, slots=True)
class Model:
    """What a transformer costs, in counts."""

    name: str
    linear_params: float  # weights in linear layers, embeddings and head excluded
    layers: int
    hidden: int
    query_dim: int  # query heads × head dimension
    kv_bytes_per_token: int
    vocab: int


@dataclass(frozen=True, slots=True)
class Device:
    """What a GPU gives, and costs."""

    name: str
    tflops: float
    bandwidth_tb_s: float
    memory_gb: float
    compute_efficiency: float  # ηc
    memory_efficiency: float  # ηm
    attention_efficiency: float = 0.45  # ηa, assumed
    nvlink_gb_s: float = 280.0  # effective, one direction
    allreduce_us: float = 15.0
    launch_ms: float = 1.0  # with a captured graph
    prefill_request_ms: float = 0.1
    decode_request_ms: float = 0.02
    watts: float = 0.0
    price_per_hour: float = 0.0


@dataclass(frozen=True, slots=True)
class Profile:
    """One worker: its cost model, the KV it can hold, and what its devices cost."""

    name: str
    cost: CostModel
    kv_bytes_per_token: int
    kv_capacity_tokens: int
    gpus: int = 1
    watts: float = 0.0  # of all its GPUs
    price_per_hour: float = 0.0
    kv_link_gbps: float = 100.0
    kv_link_latency_us: float = 100.0
    model: str = ""  # of a shipped profile
    device: str = ""
    notes: Mapping[str, Any] = field(default_factory=dict)


def derive(model: Model, device: Device, tp: int, **overrides: float) -> CostModel:
    """reference formula in seconds; `overrides` replace fields of the device (e.g. compute_efficiency)."""
    get = {name: getattr(device, name) for name in device.__dataclass_fields__} | overrides
    flops = get["tflops"] * 1e12
    bandwidth = get["bandwidth_tb_s"] * 1e12
    compute = tp * get["compute_efficiency"] * flops
    memory = tp * get["memory_efficiency"] * bandwidth
    attention = tp * get["attention_efficiency"] * flops
    head = model.vocab * model.hidden
    split = 4 * (tp - 1) / tp * model.hidden / (get["nvlink_gb_s"] * 1e9)
    return CostModel(
        compute_s=2 * model.linear_params / compute,
        weights_s=BYTES_PER_WEIGHT * model.linear_params / memory,
        elementwise_s=ELEMENTWISE_BYTES * model.hidden * model.layers / (ELEMENTWISE_BW * bandwidth),
        attention_s=4 * model.layers * model.query_dim / attention,
        kv_read_s=model.kv_bytes_per_token / memory,
        head_compute_s=2 * head / compute,
        head_weights_s=BYTES_PER_WEIGHT * head / memory,
        comm_s=2 * model.layers * get["allreduce_us"] * 1e-6 if tp > 1 else 0.0,
        comm_token_s=2 * model.layers * split if tp > 1 else 0.0,
        launch_s=get["launch_ms"] * 1e-3,
        request_s=get["prefill_request_ms"] * 1e-3,
        decode_request_s=get["decode_request_ms"] * 1e-3,
    )


@cache
def shipped_models() -> Mapping[str, Model]:
    return {name: Model(name, **entry) for name, entry in _shipped("models.yaml").items()}


@cache
def shipped_devices() -> Mapping[str, Device]:
    table = _shipped("devices.yaml")
    return {name: Device(name, **{k: v for k, v in entry.items() if k != "sources"}) for name, entry in table.items()}


def _shipped(name: str) -> dict[str, Any]:
    table = yaml.safe_load((files("lanewise.policy") / "profiles" / name).read_text(encoding="utf-8"))
    assert isinstance(table, dict)  # a file of this package
    return table


def make_profile(model: str, device: str, tensor_parallel: int = 0, **overrides: float) -> Profile:
    """A shipped model on a shipped device. `tensor_parallel` 0: the least power of two whose memory holds the model."""
    try:
        m, d = shipped_models()[model], shipped_devices()[device]
    except KeyError as error:
        known = f"models: {', '.join(shipped_models())}; devices: {', '.join(shipped_devices())}"
        raise ConfigError(f"no shipped profile for {error}; {known}") from error
    weights = BYTES_PER_WEIGHT * (m.linear_params + 2 * m.vocab * m.hidden)
    tp = tensor_parallel or next(n for n in (1, 2, 4, 8, 16) if n * d.memory_gb * 1e9 * 0.8 > 1.1 * weights)
    capacity = int((tp * d.memory_gb * 1e9 * 0.9 - weights) / m.kv_bytes_per_token)
    if capacity < 1:
        raise ConfigError(f"{model} does not fit on {tp} × {device}")
    return Profile(
        name=f"{model}@{device}" + (f"x{tp}" if tp > 1 else ""),
        cost=derive(m, d, tp, **overrides),
        kv_bytes_per_token=m.kv_bytes_per_token,
        kv_capacity_tokens=capacity,
        gpus=tp,
        model=model,
        device=device,
        watts=tp * d.watts,
        price_per_hour=tp * d.price_per_hour,
    )


PROFILE_FIELDS = ("kv_link_gbps", "kv_link_latency_us", "kv_capacity_tokens", "price_per_hour", "watts", "gpus")


def parse_profile(data: Mapping[str, Any], where: str = "profile") -> Profile:
    """A profile from YAML, in one of two forms.

    Shipped: `{model: qwen2.5-32b, device: h200, tensorParallel: 1, overrides: {compute_efficiency: 0.55}}`.
    Measured (by `lanewise profile`): `{name, coefficients: {compute_s: …}, kv_bytes_per_token, kv_capacity_tokens}`.
    Either may set kv_link_gbps, kv_link_latency_us, kv_capacity_tokens, price_per_hour, watts and gpus.
    """
    allowed = {"name", "model", "device", "tensorParallel", "overrides", "coefficients", "kv_bytes_per_token", "notes"}
    unknown = set(data) - allowed - set(PROFILE_FIELDS)
    if unknown:
        raise ConfigError(f"{where}: unknown field {sorted(unknown)[0]!r}")
    try:
        if "coefficients" in data:
            profile = Profile(
                name=str(data.get("name", where)),
                cost=CostModel.from_mapping(data["coefficients"]),
                kv_bytes_per_token=int(data["kv_bytes_per_token"]),
                kv_capacity_tokens=int(data["kv_capacity_tokens"]),
            )
        else:
            overrides = {str(k): float(v) for k, v in data.get("overrides", {}).items()}
            bad = set(overrides) - set(Device.__dataclass_fields__)
            if bad:
                raise ConfigError(f"{where}: overrides: unknown field {sorted(bad)[0]!r}")
            profile = make_profile(data["model"], data["device"], int(data.get("tensorParallel", 0)), **overrides)
        changes = {name: type(getattr(profile, name))(data[name]) for name in PROFILE_FIELDS if name in data}
    except KeyError as error:
        raise ConfigError(f"{where}: missing field {error}") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from error
    return replace(profile, **changes, notes=dict(data.get("notes", {})))
