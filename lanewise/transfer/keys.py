"""The Secret of a service, as a folder of small files: CURVE keys of the KV channel, certificates of Worker gRPC.

Owns: the names of the files, and reading them anew each time they are needed: a mounted Secret changes under a running
process, and that is how keys are rotated. Must not: make keys (`lanewise keys` does) or know sockets.

    kv-server.public kv-server.secret        of decode workers
    kv-client.public kv-client.secret        of prefill workers
    kv-client-next.public, kv-client-previous.public     accepted too, during a rotation
    ca.crt tls.crt tls.key                   of Worker gRPC, both ends
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from zmq.utils import z85

from lanewise.errors import ConfigError

SERVER, CLIENT = "kv-server", "kv-client"
ACCEPTED = (CLIENT, f"{CLIENT}-next", f"{CLIENT}-previous")
_KEY_BYTES = 32


class Encryption(StrEnum):
    NONE = "None"
    AUTHENTICATED = "Authenticated"  # control under CURVE, data in the clear under a MAC per transfer
    FULL = "Full"  # everything under CURVE


@dataclass(frozen=True, slots=True)
class KeyPair:
    public: bytes  # Z85, as ZeroMQ takes it
    secret: bytes


@dataclass(frozen=True, slots=True)
class Security:
    """How this process speaks, and where its keys are. Each method raises ConfigError naming the file at fault."""

    encryption: Encryption = Encryption.NONE
    directory: Path = Path()

    @classmethod
    def of(cls, encryption: str, directory: str) -> Security:
        """Checks that every key is there, so that a process without them does not start."""
        found = cls(Encryption(encryption), Path(directory))
        if found.on:
            if not directory:
                raise ConfigError(f"encryption {encryption} needs secret_dir, the folder with the keys of the service")
            found.server(), found.client(), found.accepted()
        return found

    @property
    def on(self) -> bool:
        return self.encryption is not Encryption.NONE

    @property
    def macs(self) -> bool:
        """Whether data is sent beside the encrypted connection, each chunk under a MAC."""
        return self.encryption is Encryption.AUTHENTICATED

    def server(self) -> KeyPair:
        return KeyPair(self._key(f"{SERVER}.public"), self._key(f"{SERVER}.secret"))

    def server_public(self) -> bytes:
        return self._key(f"{SERVER}.public")

    def client(self) -> KeyPair:
        return KeyPair(self._key(f"{CLIENT}.public"), self._key(f"{CLIENT}.secret"))

    def accepted(self) -> frozenset[bytes]:
        """Public keys of clients that may connect, as Z85."""
        names = [f"{name}.public" for name in ACCEPTED]
        return frozenset(self._key(name) for name in names if name == names[0] or (self.directory / name).exists())

    def _key(self, name: str) -> bytes:
        path = self.directory / name
        try:
            text = path.read_text().strip()
        except (OSError, UnicodeError) as error:
            raise ConfigError(f"cannot read the key {path}: {error}") from None
        try:
            if len(z85.decode(text)) == _KEY_BYTES:
                return text.encode()
        except Exception:  # the decoder has no error of its own
            pass
        raise ConfigError(f"{path}: expected a CURVE key, 40 characters of Z85, got {len(text)} characters")
