"""`lanewise keys`: makes the Secret of a service, a folder of files, and rotates the client keys in it.

Owns: making keys and certificates. Their names and who reads them: `transfer/keys.py` and `rpc/tls.py`.
Must not: print a secret, or overwrite one that is in use.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Sequence
from pathlib import Path

import zmq

from lanewise.cli import CommandFailed, command_parser
from lanewise.errors import ConfigError
from lanewise.rpc.tls import AUTHORITY, CERTIFICATE, HOST_NAME, KEY
from lanewise.transfer.keys import CLIENT, SERVER

VALID = datetime.timedelta(days=825)
NEXT, PREVIOUS = f"{CLIENT}-next", f"{CLIENT}-previous"


def keys(argv: Sequence[str]) -> int:
    parser = command_parser(
        "keys",
        "Make the keys of a service: CURVE keys of the KV channel, certificates of Worker gRPC.\n"
        "make: a new folder. next: a second client key, which decode workers then accept beside the first.\n"
        "rotate: prefill workers use the second, both are accepted. retire: only the second is.\n"
        "Bring the folder to all pods (kubectl create secret generic NAME --from-file DIR) after each step.",
        "lanewise keys make ./secret",
    )
    parser.add_argument("step", choices=list(_STEPS))
    parser.add_argument("directory", metavar="DIR", type=Path)
    parser.add_argument("--json", action="store_true", help="the names of the files that changed")
    options = parser.parse_args(argv)
    try:
        changed = _STEPS[options.step](options.directory)
    except OSError as error:
        raise CommandFailed(f"{error.filename}: {error.strerror}") from error
    if options.json:
        print(json.dumps({"directory": str(options.directory), "changed": changed}))
    else:
        print("\n".join(str(options.directory / name) for name in changed))
    return 0


def make_keys(directory: Path) -> list[str]:
    """The names of the files of a new Secret; CommandFailed where the folder is not empty."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    if found := sorted(path.name for path in directory.iterdir()):
        raise CommandFailed(f"{directory} is not empty ({', '.join(found[:3])}); keys in use are never overwritten")
    return [*_pair(directory, SERVER), *_pair(directory, CLIENT), *_certificates(directory)]


def _next(directory: Path) -> list[str]:
    _need(directory, CLIENT)
    if (directory / f"{NEXT}.public").exists():
        raise CommandFailed(f"{directory} has a next key already; `rotate` puts it to use")
    return _pair(directory, NEXT)


def _rotate(directory: Path) -> list[str]:
    _need(directory, CLIENT, NEXT)
    (directory / f"{CLIENT}.public").replace(directory / f"{PREVIOUS}.public")
    for end in ("public", "secret"):
        (directory / f"{NEXT}.{end}").replace(directory / f"{CLIENT}.{end}")
    return [f"{CLIENT}.public", f"{CLIENT}.secret", f"{PREVIOUS}.public"]


def _retire(directory: Path) -> list[str]:
    _need(directory, PREVIOUS)
    (directory / f"{PREVIOUS}.public").unlink()
    return [f"{PREVIOUS}.public"]


_STEPS = {"make": make_keys, "next": _next, "rotate": _rotate, "retire": _retire}


def _need(directory: Path, *names: str) -> None:
    for name in names:
        if not (directory / f"{name}.public").exists():
            raise ConfigError(f"{directory} has no {name}.public; expected a folder from `lanewise keys make`")


def _pair(directory: Path, name: str) -> list[str]:
    public, secret = zmq.curve_keypair()
    _write(directory / f"{name}.secret", secret)
    _write(directory / f"{name}.public", public)
    return [f"{name}.public", f"{name}.secret"]


def _write(path: Path, data: bytes) -> None:
    """Readable by its owner alone from the first moment."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)


def _certificates(directory: Path) -> list[str]:
    """An authority of this service alone, whose key is thrown away, and the one certificate it signs."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    def name(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    authority_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    now = datetime.datetime.now(datetime.UTC)

    def start(subject: str, public: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        builder = x509.CertificateBuilder().subject_name(name(subject)).issuer_name(name("lanewise service"))
        builder = builder.public_key(public).serial_number(x509.random_serial_number())
        return builder.not_valid_before(now - datetime.timedelta(hours=1)).not_valid_after(now + VALID)

    authority = (
        start("lanewise service", authority_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(authority_key, hashes.SHA256())
    )
    usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    certificate = (
        start(HOST_NAME, key.public_key())
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(HOST_NAME)]), critical=False)
        .add_extension(usage, critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    _write(directory / AUTHORITY, authority.public_bytes(pem))
    _write(directory / CERTIFICATE, certificate.public_bytes(pem))
    _write(directory / KEY, private)
    return [AUTHORITY, CERTIFICATE, KEY]
