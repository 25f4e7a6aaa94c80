"""Certificates and kubeconfigs of one cluster, made by openssl in a fraction of a second.

Owns: ROOT/pki. Must not: be used for anything that outlives a test.
"""

from __future__ import annotations

import secrets
import subprocess
from pathlib import Path

from tests.cluster.kube.slots import Slot

DEADLINE_S = 30
DAYS = "3650"
USERS = {
    "admin": "/O=system:masters/CN=admin",
    "controller-manager": "/CN=system:kube-controller-manager",
    "scheduler": "/CN=system:kube-scheduler",
    "proxy": "/CN=system:kube-proxy",
    "kubelet-client": "/O=system:masters/CN=apiserver-kubelet-client",
    "front-proxy": "/CN=front-proxy-client",
}


def make(slot: Slot) -> Path:
    """All keys, certificates and one kubeconfig per user; returns the folder."""
    folder = slot.root / "pki"
    folder.mkdir(mode=0o700)
    _key(folder / "ca.key")
    _openssl(
        *("req", "-x509", "-new", "-key", f"{folder}/ca.key", "-subj", "/CN=lanewise-test", "-days", DAYS),
        *("-out", f"{folder}/ca.crt", "-addext", "keyUsage=critical,keyCertSign,cRLSign,digitalSignature"),
    )
    names = ["localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"]
    names.append("kubernetes.default.svc.cluster.local")
    addresses = ["127.0.0.1", slot.api_ip, slot.node_ip]
    certificate(folder, "apiserver", "/CN=kube-apiserver", "serverAuth", names, addresses)
    certificate(folder, "kubelet", f"/CN={slot.node}", "serverAuth", [slot.node], [slot.node_ip, "127.0.0.1"])
    for user, subject in {**USERS, "node": f"/O=system:nodes/CN=system:node:{slot.node}"}.items():
        certificate(folder, user, subject, "clientAuth", [], [])
        _kubeconfig(folder, user, slot)
    _openssl("genrsa", "-out", f"{folder}/sa.key", "2048")
    _openssl("rsa", "-in", f"{folder}/sa.key", "-pubout", "-out", f"{folder}/sa.pub")
    return folder


def _openssl(*args: str) -> None:
    done = subprocess.run(["openssl", *args], capture_output=True, text=True, timeout=DEADLINE_S)
    if done.returncode != 0:
        raise RuntimeError(f"openssl {' '.join(args)}: {done.stderr.strip()}")


def _key(path: Path) -> None:
    _openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(path))


def certificate(folder: Path, name: str, subject: str, usage: str, names: list[str], addresses: list[str]) -> None:
    """FOLDER/NAME.key and .crt, signed by the folder's authority. `usage`: extended key usages, with commas between."""
    base = folder / name
    _key(Path(f"{base}.key"))
    alternatives = ",".join([f"DNS:{host}" for host in names] + [f"IP:{address}" for address in addresses])
    lines = ["keyUsage=critical,digitalSignature", f"extendedKeyUsage={usage}"]
    lines += [f"subjectAltName={alternatives}"] * bool(alternatives)
    Path(f"{base}.ext").write_text("\n".join(lines) + "\n")
    _openssl("req", "-new", "-key", f"{base}.key", "-subj", subject, "-out", f"{base}.csr")
    _openssl(
        *("x509", "-req", "-in", f"{base}.csr", "-CA", f"{folder}/ca.crt", "-CAkey", f"{folder}/ca.key", "-days", DAYS),
        *("-set_serial", f"0x{secrets.token_hex(8)}", "-extfile", f"{base}.ext", "-out", f"{base}.crt"),
    )


def _kubeconfig(folder: Path, user: str, slot: Slot) -> None:
    (folder / f"{user}.kubeconfig").write_text(
        f"""apiVersion: v1
kind: Config
clusters:
- {{name: lanewise, cluster: {{server: "https://{slot.node_ip}:443", certificate-authority: {folder}/ca.crt}}}}
users:
- {{name: {user}, user: {{client-certificate: {folder}/{user}.crt, client-key: {folder}/{user}.key}}}}
contexts:
- {{name: lanewise, context: {{cluster: lanewise, user: {user}}}}}
current-context: lanewise
"""
    )
