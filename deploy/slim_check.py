"""Checks that the gateway lives without torch: `make check` runs this in an environment without it.

Owns: the check that `serving` and `adapters` import, module by module, and that the gateway starts
and answers. Never: installs anything. Called by: `make slim`, with the Python of `.venv/slim`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import pkgutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

HEAVY = ("torch", "transformers", "vllm", "peft", "trl", "ray", "numpy")
PACKAGES = ("serving", "adapters")
LEAKS = ("tests", "deploy", "helm", "docs")
DEADLINE_S = 60.0
# Imported only where its extra is configured.
OF_AN_EXTRA = ("serving.tracing.tracer", "serving.tracing.export_queue", "serving.control.")


class SlimError(Exception):
    """What does not work without torch."""


def check_nothing_heavy_is_installed() -> None:
    """Make sure that this environment proves anything.

    Raises:
        SlimError: if a heavy package is importable.
    """
    present = [name for name in HEAVY if importlib.util.find_spec(name) is not None]
    if present:
        msg = f"this environment has {', '.join(present)}: run `make slim`"
        raise SlimError(msg)


def check_nothing_leaks() -> None:
    """Make sure that the editable install exposes the named packages and nothing else.

    Raises:
        SlimError: if another folder of the project is importable, or its root is on the path.
    """
    leaked = [name for name in LEAKS if importlib.util.find_spec(name) is not None]
    root = str(Path(__file__).resolve().parent.parent)
    if leaked or root in sys.path:
        msg = f"the install leaks {', '.join(leaked) or root} onto the import path"
        raise SlimError(msg)


def import_everything() -> int:
    """Import every module of the slim packages.

    Returns:
        How many there are.

    Raises:
        SlimError: if one of them pulls something heavy in.
    """
    num_modules = 0
    for package in PACKAGES:
        module = importlib.import_module(package)
        for info in pkgutil.walk_packages(module.__path__, f"{package}."):
            if not info.name.startswith(OF_AN_EXTRA):
                importlib.import_module(info.name)
                num_modules += 1
    pulled = [name for name in HEAVY if name in sys.modules]
    if pulled:
        msg = f"importing serving and adapters pulls in {', '.join(pulled)}"
        raise SlimError(msg)
    return num_modules


def start_gateway() -> None:
    """Start the gateway on a free port, wait until it answers, end it.

    Raises:
        SlimError: if it does not start, or does not end with exit code 0.
    """
    port = free_port()
    argv = [sys.executable, "-m", "serving.cli.main", "gateway", "--listen", f"127.0.0.1:{port}"]
    argv += ["--replica", f"vllm=http://127.0.0.1:{free_port()}"]
    with subprocess.Popen(argv) as gateway:  # noqa: S603 - argv from here
        try:
            wait_for_200(f"http://127.0.0.1:{port}/healthz", gateway)
            gateway.terminate()
            code = gateway.wait(DEADLINE_S)
        finally:
            gateway.kill()
    if code != 0:
        msg = f"the gateway ended with exit code {code} after SIGTERM"
        raise SlimError(msg)


def free_port() -> int:
    """Return a loopback port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_200(url: str, process: subprocess.Popen[bytes]) -> None:
    """Wait until a URL answers 200.

    Raises:
        SlimError: if the process ends first, or the deadline passes.
    """
    end_s = time.monotonic() + DEADLINE_S
    while process.poll() is None and time.monotonic() < end_s:
        try:
            with urllib.request.urlopen(url, timeout=5.0) as answer:  # noqa: S310 - loopback
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
    msg = f"{url} did not answer 200 (gateway's exit code: {process.poll()})"
    raise SlimError(msg)


def main() -> int:
    """Run every check; return the exit code."""
    try:
        check_nothing_heavy_is_installed()
        check_nothing_leaks()
        num_modules = import_everything()
        start_gateway()
    except (SlimError, ImportError) as error:
        sys.stderr.write(f"slim check: {error}\n")
        return 1
    sys.stdout.write(f"slim check: {num_modules} modules import and the gateway starts, no torch\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
