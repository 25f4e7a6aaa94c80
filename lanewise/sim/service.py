"""From an LLMService file to a service that can be simulated.

Owns: the profile annotations and what of the resource matters to the simulator.
Must not: hold defaults of the resource (spec.py does) or of policies.

The file stays a plain LLMService that `kubectl apply` accepts. What the simulator needs beyond it is an annotation:
`lanewise.io/sim-profile: "{model: qwen2.5-32b, device: h200}"`, or the path of a profile file beside the service;
`lanewise.io/sim-decode-profile` where decode workers differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from lanewise.errors import ConfigError
from lanewise.policy.profile import Profile, parse_profile
from lanewise.spec_yaml import read_service

PROFILE_ANNOTATION = "lanewise.io/sim-profile"
DECODE_PROFILE_ANNOTATION = "lanewise.io/sim-decode-profile"


@dataclass(frozen=True, slots=True)
class Service:
    """What is simulated: counts, profiles and targets."""

    name: str
    prefill: int
    decode: int
    prefill_profile: Profile
    decode_profile: Profile
    ttft_s: float
    tpot_s: float
    disaggregation: Literal["Auto", "Always", "Never"]


def load_service(path: Path, profile: str | None = None) -> Service:
    """The service of the file; `profile` (a file, or a mapping in YAML) replaces its annotations."""
    service = read_service(path)
    spec, notes = service.spec, service.metadata.annotations
    text = profile or notes.get(PROFILE_ANNOTATION)
    if text is None:
        raise ConfigError(f"{path}: no annotation {PROFILE_ANNOTATION}; add one or give --profile")
    tensor_parallel = spec.prefill.tensor_parallel
    prefill = load_profile(text, path.parent, tensor_parallel)
    decode_text = None if profile else notes.get(DECODE_PROFILE_ANNOTATION)
    decode = load_profile(decode_text or text, path.parent, spec.decode.tensor_parallel)
    return Service(
        service.metadata.name,
        1 if spec.prefill.replicas is None else spec.prefill.replicas,
        1 if spec.decode.replicas is None else spec.decode.replicas,
        prefill,
        decode,
        spec.slo.ttft.seconds,
        spec.slo.tpot.seconds,
        "Never" if spec.prefill.replicas == 0 else spec.disaggregation,
    )


def load_profile(text: str, folder: Path, tensor_parallel: int = 1) -> Profile:
    """A profile from a mapping written in YAML, or from the file it names."""
    where = "profile"
    try:
        data = yaml.safe_load(text)
        if isinstance(data, str):
            file = Path(data) if Path(data).is_absolute() else folder / data
            where = str(file)
            data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{where}: {error.strerror or error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: expected a mapping such as {{model: qwen2.5-32b, device: h200}}")
    if "coefficients" not in data:
        data = {"tensorParallel": tensor_parallel} | data
    return parse_profile(data, where)
