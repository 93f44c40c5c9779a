"""Whether OpenTelemetry is there: the gateway installs and runs without it."""

from __future__ import annotations

from importlib.util import find_spec

from serving.errors import ConfigError

_NEEDED = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http.trace_exporter")


def check_installed() -> None:
    """Refuses tracing without its packages.

    Raises:
        ConfigError: If one is missing.
    """
    try:
        missing = [name for name in _NEEDED if find_spec(name) is None]
    except ModuleNotFoundError:
        missing = list(_NEEDED)
    if missing:
        raise ConfigError(
            "tracing: OpenTelemetry is not installed: pip install 'headrace[tracing]', "
            "or leave the section out"
        )
