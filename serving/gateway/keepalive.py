"""TCP keepalive: finds out that a silent peer is gone, where no FIN or reset ever arrives."""

from __future__ import annotations

import socket

IDLE_S = 30
INTERVAL_S = 10
NUM_PROBES = 3
"""A peer whose machine vanished is noticed after 60 s of silence."""


def probe_when_silent(own: socket.socket | None) -> None:
    """Switches keepalive on; connections that a listening socket accepts inherit it.

    Args:
        own: None where the connection is already gone.
    """
    if own is None:
        return
    own.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    own.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, IDLE_S)
    own.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, INTERVAL_S)
    own.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, NUM_PROBES)
