"""The safetensors files of a checkpoint: mapped into memory, described, and digested.

Owns: the file format (header, offsets, dtypes), single and sharded checkpoints, and the weight digest.
Must not: know what the tensors mean or convert them (weights.py does). A tensor handed out here is a view of the page
cache, shared by all workers of the machine; writing to it would copy the page, not change the file.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lanewise.engine.model_config import read_json
from lanewise.errors import ConfigError

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
NUM_SAMPLES = 16
SAMPLE_BYTES = 4096
COSMETIC_KEYS = ("transformers_version", "_name_or_path")
MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor lies: `start` and `stop` are byte offsets in its file."""

    file: int
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Checkpoint:
    """All tensors of a directory, by name. The maps stay open as long as a tensor of them lives."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.paths = _files(directory)
        self.headers: list[bytes] = []
        self.entries: dict[str, Entry] = {}
        self._maps: list[mmap.mmap] = []
        for index, path in enumerate(self.paths):
            mapped, header = _map(path)
            self._maps.append(mapped)
            self.headers.append(header)
            for name, entry in _entries(path, index, header, len(mapped)):
                if name in self.entries:
                    raise ConfigError(f"{path}: tensor {name} is also in {self.paths[self.entries[name].file].name}")
                self.entries[name] = entry

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor in its own dtype, without a copy."""
        if name not in self.entries:
            raise ConfigError(f"{self.directory}: tensor {name} is missing")
        entry = self.entries[name]
        dtype = DTYPES.get(entry.dtype)
        if dtype is None:
            raise ConfigError(f"tensor {name} has dtype {entry.dtype}; supported are {', '.join(DTYPES)}")
        count = (entry.stop - entry.start) // dtype.itemsize
        return torch.frombuffer(self._maps[entry.file], dtype=dtype, count=count, offset=entry.start).view(entry.shape)

    @property
    def num_bytes(self) -> int:
        return sum(entry.stop - entry.start for entry in self.entries.values())

    def digest(self) -> str:
        """Config, every header, and 16 fixed samples of 4 KiB of each tensor: seconds even for a large model."""
        state = self._digest_of_headers()
        for name in sorted(self.entries):
            entry = self.entries[name]
            for offset in sample_offsets(entry.stop - entry.start):
                start = entry.start + offset
                state.update(self._maps[entry.file][start : min(start + SAMPLE_BYTES, entry.stop)])
        return state.hexdigest()

    def full_digest(self) -> str:
        """As `digest`, over every byte of every tensor: for `lanewise check --full`."""
        state = self._digest_of_headers()
        for name in sorted(self.entries):
            entry = self.entries[name]
            with memoryview(self._maps[entry.file]) as view, view[entry.start : entry.stop] as part:
                state.update(part)
        return state.hexdigest()

    def _digest_of_headers(self) -> hashlib.blake2b:
        config = {
            key: value for key, value in read_json(self.directory / "config.json").items() if key not in COSMETIC_KEYS
        }
        state = hashlib.blake2b(json.dumps(config, sort_keys=True).encode(), digest_size=32)
        for header in self.headers:
            state.update(len(header).to_bytes(8, "little") + header)
        return state


def sample_offsets(num_bytes: int) -> list[int]:
    """Start of each sample in a tensor: evenly spread, both ends included; a small tensor is covered whole."""
    if num_bytes <= NUM_SAMPLES * SAMPLE_BYTES:
        return list(range(0, num_bytes, SAMPLE_BYTES))
    return [sample * (num_bytes - SAMPLE_BYTES) // (NUM_SAMPLES - 1) for sample in range(NUM_SAMPLES)]


def _files(directory: Path) -> list[Path]:
    """The shards in name order. An index that lists shards must find each of them."""
    index_path = directory / "model.safetensors.index.json"
    if index_path.is_file():
        names = sorted(set(read_json(index_path).get("weight_map", {}).values()))
        if missing := [name for name in names if not (directory / name).is_file()]:
            raise ConfigError(f"{directory}: shards named by the index are missing: {', '.join(missing)}")
        if names:
            return [directory / name for name in names]
    if (directory / "model.safetensors").is_file():
        return [directory / "model.safetensors"]
    raise ConfigError(f"{directory} has neither model.safetensors nor a model.safetensors.index.json that names shards")


def _map(path: Path) -> tuple[mmap.mmap, bytes]:
    try:
        with path.open("rb") as file:
            # Copy-on-write, because torch refuses read-only buffers; nothing ever writes.
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot map {path}: {error}") from error
    header_bytes = int.from_bytes(mapped[:8], "little")
    if header_bytes > min(MAX_HEADER_BYTES, len(mapped) - 8):
        raise ConfigError(f"{path} is not a safetensors file, or cut short")
    return mapped, mapped[8 : 8 + header_bytes]


def _entries(path: Path, file: int, header: bytes, file_bytes: int) -> Iterator[tuple[str, Entry]]:
    try:
        described: dict[str, Any] = json.loads(header)
    except ValueError as error:
        raise ConfigError(f"{path}: the safetensors header is damaged: {error}") from error
    base = 8 + len(header)
    for name, fields in described.items():
        if name == "__metadata__":
            continue
        begin, end = fields["data_offsets"]
        if not 0 <= begin <= end <= file_bytes - base:
            raise ConfigError(f"{path} is cut short: tensor {name} ends at byte {base + end} of {file_bytes}")
        yield name, Entry(file, fields["dtype"], tuple(fields["shape"]), base + begin, base + end)
