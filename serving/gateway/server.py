"""The gateway as a whole: one port, one or more workers on it, restarted when one dies.

Called by `headrace gateway`. With one worker everything runs in this process; with more, each is a
process of its own that listens on the same port (SO_REUSEPORT) and ends when this one does.
"""

from __future__ import annotations

import signal
import socket
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import uvloop

from serving.errors import ConfigError
from serving.gateway.reload import Reloader
from serving.gateway.tls import replica_context, server_context
from serving.gateway.worker import Worker
from serving.gateway.worker_process import WorkerProcesses, bind_shared, raise_open_files
from serving.tracing import check_installed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from serving.config import GatewayConfig, Listen
    from serving.config_file import ConfigSource


def run(
    config: GatewayConfig, on_ready: Callable[[str], None], source: ConfigSource | None = None
) -> None:
    """Serves until SIGTERM or SIGINT; returns after the drain.

    Args:
        config: Of the gateway.
        on_ready: Called once with `http://HOST:PORT` when requests are accepted.
        source: Where the settings came from, to read them again on SIGHUP or a change; None keeps
            them.

    Raises:
        ConfigError: If the address is taken or does not exist on this machine, or a file that the
            settings name cannot be used.
    """
    check_startable(config)
    raise_open_files()
    with _metrics_dir(config) as metrics_dir:
        reserved = reserve(config.listen)
        host, port = reserved.getsockname()[:2]
        config = config.model_copy(
            update={"listen": config.listen.model_copy(update={"port": port})}
        )
        scheme = "http" if config.tls is None else "https"
        url = f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
        if config.workers == 1:
            uvloop.run(_serve(config, metrics_dir, reserved, lambda: on_ready(url), source))
        else:
            WorkerProcesses(config, metrics_dir, source).run(lambda: on_ready(url))
            reserved.close()


def check_startable(config: GatewayConfig) -> None:
    """Refuses settings whose files or packages are not there, before anything is started.

    Raises:
        ConfigError: One line that says which.
    """
    if config.tls is not None:
        server_context(config.tls)
    for replica in config.replicas:
        replica_context(replica)
    if config.tracing is not None:
        check_installed()


def reserve(listen: Listen) -> socket.socket:
    """Binds the address, so that others see it as taken; workers bind it again.

    The first bind goes without SO_REUSEPORT: with it, a second gateway would silently take half of
    the connections.

    Raises:
        ConfigError: If the address cannot be had.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            listen.host, listen.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, socket.SOCK_STREAM) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
            trial.listen(1)
            address = trial.getsockname()
        return bind_shared(family, address)
    except OSError as error:
        raise ConfigError(
            f"--listen {listen.host}:{listen.port}: {error.strerror or error}; choose another address"
        ) from None


async def _serve(
    config: GatewayConfig,
    metrics_dir: Path,
    listening: socket.socket,
    on_ready: Callable[[], None],
    source: ConfigSource | None,
) -> None:
    worker = Worker(config, 0, metrics_dir)
    worker.stop_on_signals()
    if source is not None:
        # Until the worker serves there is nothing to reload, and nothing to end for it.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        reloader = Reloader(source, config, worker.ledger.is_idle)
        worker.reload_by(reloader, source)
    await worker.serve(listening, on_ready)


@contextmanager
def _metrics_dir(config: GatewayConfig) -> Iterator[Path]:
    if config.metrics_dir is not None:
        config.metrics_dir.mkdir(parents=True, exist_ok=True)
        yield config.metrics_dir
        return
    with tempfile.TemporaryDirectory(prefix="headrace-") as folder:
        yield Path(folder)
