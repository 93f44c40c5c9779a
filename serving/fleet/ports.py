"""Finds TCP ports for processes to come, and keeps others off them until they listen.

Owns: the choice of a free loopback port and its reservation; the check that an address is free.
Never: listens. Called by: `serving/fleet/local_platform.py` and `serving/fleet/doctor.py`.

A reservation is a bound socket that never listens. It binds alone, so nobody holds the port; then
it sets SO_REUSEADDR, which lets a server that sets it too (every server here does) bind and listen
on the port, and refuses everybody else's search for a free one (ip(7): a port may be bound twice
with SO_REUSEADDR unless one of the two listens already).
"""

from __future__ import annotations

import errno
import random
import socket
import sys
from typing import TYPE_CHECKING, Self

from serving.errors import ConfigError

if TYPE_CHECKING:
    from types import TracebackType

LOOPBACK = "127.0.0.1"
# Below Linux's range for outgoing connections (net.ipv4.ip_local_port_range, from 32768).
FIRST_PORT, LAST_PORT = 20_000, 32_000
MAX_TRIES = 200


class PortReservation:
    """A loopback port that is ours, for processes that we start on it again and again."""

    def __init__(self, port: int | None = None) -> None:
        """Reserve a port.

        Args:
            port: which; None takes a free one.

        Raises:
            ConfigError: if it is taken, or none is free.
        """
        self._socket = _bind(LOOPBACK, port, reuse=False) if port else _bind_any()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.port: int = self._socket.getsockname()[1]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def release(self) -> None:
        """Give the port up."""
        self._socket.close()


class AddressClaim:
    """The right to serve on a public address, from the check that it is free until `release`.

    Gateway workers share their port by SO_REUSEPORT, so a second platform that starts meanwhile
    could listen on it too, and each would get half of the requests. A claim is a name in Linux's
    abstract socket namespace, which is per network namespace, as ports are, and dies with us.
    """

    def __init__(self, host: str, port: int) -> None:
        """Claim an address.

        Raises:
            ConfigError: if something listens there, or another platform is about to.
        """
        self._name = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            check_free(host, port)
            if sys.platform == "linux":
                self._name.bind(f"\0headrace-listen-{port}")
        except OSError:
            self._name.close()
            msg = (
                f"{host}:{port} is taken by another headrace that is starting: choose another port"
            )
            raise ConfigError(msg) from None
        except ConfigError:
            self._name.close()
            raise

    def release(self) -> None:
        """Give the address up."""
        self._name.close()


def check_free(host: str, port: int) -> None:
    """Check that nothing listens on an address; connections that linger there do not count.

    Raises:
        ConfigError: if something does, or the host is not one of this machine's.
    """
    _bind(host, port, reuse=True).close()


def _bind_any() -> socket.socket:
    for _ in range(MAX_TRIES):
        # Not a secret: a start at random keeps two platforms from trying the same ports in turn.
        port = random.randint(FIRST_PORT, LAST_PORT)  # noqa: S311
        try:
            return _bind(LOOPBACK, port, reuse=False)
        except ConfigError:
            continue
    msg = f"no free port between {FIRST_PORT} and {LAST_PORT} on {LOOPBACK}: end what holds them"
    raise ConfigError(msg)


def _bind(host: str, port: int, *, reuse: bool) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(reuse))
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        reason = (
            "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
        )
        msg = f"{host}:{port} {reason}: end what listens there, or choose another address"
        raise ConfigError(msg) from None
    return bound
