"""Channels to workers, and their mutual TLS: both ends show a certificate of the service's own authority.

Owns: the options of such a channel, the names of the files and of the host that certificates are for.
Must not: know what is said over the channel.
Workers are reached by address, so the name is a fixed one, and the authority, which signs for one service only, is what
is trusted. Files are read when a server starts or a channel opens: a router picks new ones up by itself.
"""

from __future__ import annotations

from pathlib import Path

import grpc
import grpc.aio

from lanewise.errors import ConfigError

AUTHORITY, CERTIFICATE, KEY = "ca.crt", "tls.crt", "tls.key"
HOST_NAME = "lanewise-worker"
MESSAGE_BYTES = 256 * 1024 * 1024  # a tokenizer, or the cache snapshot of a large worker
CHANNEL_OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    # Each session connects afresh: gRPC's shared subchannels would make a restarted worker wait out their back-off.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
)


def server_credentials(directory: str) -> grpc.ServerCredentials:
    """Of a worker: a client without a certificate of the authority is refused. Raises ConfigError."""
    authority, certificate, key = _read(directory)
    return grpc.ssl_server_credentials([(key, certificate)], root_certificates=authority, require_client_auth=True)


def open_channel(address: str, directory: str) -> grpc.aio.Channel:
    """To a worker; `directory` empty: without TLS. Raises ConfigError."""
    if not directory:
        return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
    authority, certificate, key = _read(directory)
    credentials = grpc.ssl_channel_credentials(authority, key, certificate)
    named = (*CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", HOST_NAME))
    return grpc.aio.secure_channel(address, credentials, options=named)


def _read(directory: str) -> tuple[bytes, bytes, bytes]:
    def one(name: str) -> bytes:
        path = Path(directory) / name
        try:
            return path.read_bytes()
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from None

    return one(AUTHORITY), one(CERTIFICATE), one(KEY)
