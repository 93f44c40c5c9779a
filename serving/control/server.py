"""Serves the control plane on one address until SIGTERM.

Owns uvicorn's settings. Called by `serving/cli/control.py`.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import uvicorn
from prometheus_client import disable_created_metrics

from serving.control.app import create_app
from serving.errors import ConfigError

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from fastapi import FastAPI

    from serving.control.context import Control
    from serving.control.settings import ControlSettings

DRAIN_S = 10
KEEP_ALIVE_S = 75
MAX_CONNECTIONS = 4096


class ControlServer(uvicorn.Server):
    """Uvicorn's server, which ends the long polls before it waits for requests to end."""

    def __init__(
        self, app: FastAPI, config: uvicorn.Config, on_ready: Callable[[str], None]
    ) -> None:
        """Serve an app.

        Args:
            app: Of `create_app`.
            config: With that app.
            on_ready: Called with the URL once it listens.
        """
        super().__init__(config)
        self._on_ready = on_ready
        self._app = app

    @property
    def parts(self) -> Control:
        """What the app is made of, once it has started."""
        control: Control = self._app.state.control
        return control

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the app, listen, and say so."""
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self._on_ready(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening, let requests end, and end the app."""
        self.parts.publisher.close()
        await super().shutdown(sockets)


def make_server(
    settings: ControlSettings,
    *,
    is_acting: bool = True,
    on_ready: Callable[[str], None] = lambda url: None,
) -> ControlServer:
    """Return a server that is not started.

    Args:
        settings: All of it.
        is_acting: As in `create_app`.
        on_ready: Called with the URL once it listens.

    Raises:
        ConfigError: If a setting cannot work, or others can reach the address.
    """
    if not settings.listen.is_loopback and not settings.insecure_listen:
        raise ConfigError(
            f"--listen {settings.listen.host}: the control plane speaks plain HTTP to its gateways: "
            "listen on loopback, or give --insecure-listen on a private network"
        )
    app = create_app(settings, is_acting=is_acting)
    config = uvicorn.Config(
        app,
        host=settings.listen.host,
        port=settings.listen.port,
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=DRAIN_S,
    )
    return ControlServer(app, config, on_ready)


def run(settings: ControlSettings, on_ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; requests in flight get some seconds.

    Args:
        settings: All of it.
        on_ready: Called with the URL once it listens.

    Raises:
        ConfigError: If a setting cannot work, or it cannot start.
    """
    server = make_server(settings, on_ready=on_ready)
    disable_created_metrics()  # type: ignore[no-untyped-call]
    for each in (signal.SIGTERM, signal.SIGINT):
        # Uvicorn raises the signal that ended it again, when everything has been done.
        signal.signal(each, signal.SIG_IGN)
    server.run()
    if not server.started:
        raise ConfigError("the control plane could not start; its log says why")
