"""OpenTelemetry spans of requests; `tracer.py` is imported only where tracing is configured."""

from __future__ import annotations

from serving.tracing.installed import check_installed

__all__ = ["check_installed"]
