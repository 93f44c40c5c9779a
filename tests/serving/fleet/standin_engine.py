"""A tiny engine for tests of supervision: vLLM's health and model list, and ways to misbehave."""

import argparse
import json
import os
import signal
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.pause()"


class Handler(BaseHTTPRequestHandler):
    gate: Path | None = None
    served_name = "m"

    def do_GET(self) -> None:
        if self.path == "/crash":
            os._exit(3)
        if self.path == "/v1/models":
            self.answer(200, {"object": "list", "data": [{"id": self.served_name}]})
        elif self.path != "/health":
            self.answer(404, {})
        else:
            self.answer(200 if self.gate is None or self.gate.exists() else 503, {})

    def do_POST(self) -> None:
        """A completion, for the gateway's canary."""
        self.rfile.read(int(self.headers["content-length"]))
        self.answer(200, {"choices": [{"index": 0, "text": "1", "finish_reason": "length"}]})

    def answer(self, status: int, body: dict) -> None:
        payload = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_: object) -> None:
        pass


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--pids", type=Path, help="append the pids of this process and its child")
    parser.add_argument("--exit-code", type=int, help="print a line and exit at once")
    parser.add_argument("--gate", type=Path, help="unhealthy until this file exists")
    parser.add_argument("--ignore-term", action="store_true")
    parser.add_argument("--stubborn-child", action="store_true", help="in a session of its own")
    parser.add_argument("--served-model-name", default="m")
    # Whatever else vLLM is told is not for us; more for us comes by the environment.
    argv = sys.argv[1:] + os.environ.get("STANDIN_ARGUMENTS", "").split()
    options, _ = parser.parse_known_args(argv)
    if options.exit_code is not None:
        say("no such model")
        sys.exit(options.exit_code)
    if options.ignore_term:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    pids = [os.getpid()]
    if options.stubborn_child:
        child = subprocess.Popen([sys.executable, "-c", STUBBORN], start_new_session=True)
        pids.append(child.pid)
    if options.pids:
        with options.pids.open("a") as stream:
            stream.write("".join(f"{pid}\n" for pid in pids))
    Handler.gate = options.gate
    Handler.served_name = options.served_model_name
    say(f"listening on {options.port}")
    ThreadingHTTPServer(("127.0.0.1", options.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
