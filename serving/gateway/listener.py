"""The listening socket of one worker, and the certificate that it serves with.

Owns accepting, and the change to a new certificate without a refused connection. Never reads from a
client: `client.py` does. Used by `worker.py`.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from serving.errors import ConfigError
from serving.gateway.keepalive import probe_when_silent
from serving.gateway.reload import FileWatch
from serving.gateway.tls import server_context, tls_files

if TYPE_CHECKING:
    import socket
    import ssl
    from collections.abc import Callable

    from serving.config import GatewayConfig

log = logging.getLogger(__name__)

_BACKLOG = 4096
_TLS_SHUTDOWN_S = 2.0
POLL_S = 1.0


class Listener:
    """Accepts connections from `open` to `close`."""

    def __init__(
        self,
        listening: socket.socket,
        config: GatewayConfig,
        make_protocol: Callable[[], asyncio.Protocol],
    ) -> None:
        """Accepts nothing yet.

        Args:
            listening: Bound socket; closed by `close`.
            config: Its `tls`, and the deadline of a head, which bounds a handshake too.
            make_protocol: Called for each connection.
        """
        self._listening = listening
        self._tls = config.tls
        self._handshake_s = config.timeouts.client_head_s
        self._make_protocol = make_protocol
        self._watch = FileWatch()
        self._server: asyncio.Server | None = None

    async def open(self) -> None:
        """Begins to accept.

        Raises:
            ConfigError: If the certificate cannot be used.
        """
        probe_when_silent(self._listening)
        context = None
        if self._tls is not None:
            self._watch.changed(tls_files(self._tls))
            context = server_context(self._tls)
        self._server = await self._serve(context)

    async def _serve(self, context: ssl.SSLContext | None) -> asyncio.Server:
        """A server on a descriptor of its own: it can be closed while another one takes over."""
        return await asyncio.get_running_loop().create_server(
            self._make_protocol,
            sock=self._listening.dup(),
            backlog=_BACKLOG,
            ssl=context,
            ssl_handshake_timeout=self._handshake_s if context else None,
            ssl_shutdown_timeout=_TLS_SHUTDOWN_S if context else None,
        )

    async def watch_certificate(self) -> None:
        """Serves new connections with a new certificate once its files change; until cancelled."""
        while self._tls is not None:
            await asyncio.sleep(POLL_S)
            if not self._watch.changed(tls_files(self._tls)):
                continue
            try:
                server = await self._serve(server_context(self._tls))
            except ConfigError as error:
                log.error("certificate refused, the one before stays in use: %s", error)
                continue
            # Both accept from the same queue: no connection is refused in between.
            before, self._server = self._server, server
            if before is not None:
                before.close()
            log.info("certificate reloaded: %s", self._tls.cert_file)

    def close(self) -> None:
        """Accepts no more; open connections go on."""
        if self._server is not None:
            self._server.close()
        self._listening.close()
