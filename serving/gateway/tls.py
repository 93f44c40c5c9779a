"""TLS contexts: towards clients by configuration, towards replicas by their URL.

Owns which versions and verifications are used; never opens a connection. Called by `server.py` for
a check before the start, by `worker.py` at the start and when a certificate changes, and by
`serving/fleet/registry.py`.
"""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

from serving.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from serving.config import ReplicaConfig, Tls

_ALPN = ["http/1.1"]


def server_context(tls: Tls) -> ssl.SSLContext:
    """What clients are served with: TLS 1.2 or newer, HTTP/1.1.

    Raises:
        ConfigError: If a file cannot be read, or the key does not belong to the certificate.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(_ALPN)
    for path in tls_files(tls):
        _check_readable(path)
    try:
        # A key with a passphrase would ask for it on the terminal: an empty one makes it fail.
        context.load_cert_chain(tls.cert_file, tls.key_file, password="")
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(
            f"tls: {tls.cert_file} and {tls.key_file} are not a certificate and its key: {error}"
        ) from None
    if tls.client_ca_file is not None:
        _trust(context, tls.client_ca_file, "tls.client_ca_file")
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def tls_files(tls: Tls) -> tuple[Path, ...]:
    """The files that a server context is made from."""
    files = (tls.cert_file, tls.key_file)
    return files if tls.client_ca_file is None else (*files, tls.client_ca_file)


def replica_context(replica: ReplicaConfig) -> ssl.SSLContext | None:
    """How a replica is verified; None for plain HTTP.

    Raises:
        ConfigError: If its `ca_file` cannot be read.
    """
    if not replica.is_tls:
        return None
    if replica.insecure:
        return unverified_context()
    context = _client_context()
    if replica.ca_file is None:
        context.load_default_certs()
    else:
        _check_readable(replica.ca_file)
        _trust(context, replica.ca_file, f"replica {replica.name}: ca_file")
    return context


def unverified_context() -> ssl.SSLContext:
    """Encrypts, but does not look who answers."""
    context = _client_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _client_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(_ALPN)
    return context


def _trust(context: ssl.SSLContext, path: Path, key: str) -> None:
    try:
        context.load_verify_locations(path)
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(f"{key}: {path} holds no certificates: {error}") from None


def _check_readable(path: Path) -> None:
    """OpenSSL does not say which file is at fault."""
    try:
        with path.open("rb"):
            return
    except OSError as error:
        raise ConfigError(f"tls: {path}: {error.strerror or error}") from None
