"""What a user sees while `headrace up` starts, serves and ends.

Owns: the progress bar of the model, the live table of processes, the lines after that. Never:
decides anything. Called by: `serving/cli/up.py`, as the observer of `LocalPlatform`.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from serving.fleet.process import ProcessStatus, State
from serving.fleet.processes import log_tail

if TYPE_CHECKING:
    from serving.fleet.model_source import ModelSource
    from serving.fleet.up_config import UpConfig

COLOURS = {
    State.STARTING: "yellow",
    State.READY: "green",
    State.WAITING: "red",
    State.FAILED: "red",
    State.STOPPING: "yellow",
    State.STOPPED: "dim",
}
FAILED_LOG_LINES = 12


class StartView:
    """Shows a platform on a terminal, or as plain lines where there is none."""

    def __init__(self, config: UpConfig, console: Console | None = None) -> None:
        self._config = config
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._live: Live | None = None
        self._last_stage = ""
        self._statuses: dict[str, ProcessStatus] = {}
        self._started_s: dict[str, float] = {}

    def preparing(self, stage: str, done: float) -> None:
        """Show how far the default model is."""
        if not self._console.is_terminal:
            if stage != self._last_stage:
                self._line(f"{stage} ...")
            self._last_stage = stage
            return
        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
                TimeElapsedColumn(), console=self._console,
            )  # fmt: skip
            self._progress.start()
        tasks = self._progress.tasks
        if not tasks or stage != self._last_stage:
            self._finish_tasks()
            self._progress.add_task(stage, total=1.0)
            self._last_stage = stage
        self._progress.update(self._progress.task_ids[-1], completed=done)

    def _finish_tasks(self) -> None:
        if self._progress is not None:
            for task_id in self._progress.task_ids:
                self._progress.update(task_id, completed=1.0)

    def changed(self, status: ProcessStatus) -> None:
        """Show a process's new state."""
        before = self._statuses.get(status.name)
        self._statuses[status.name] = status
        if status.state is State.STARTING:
            self._started_s[status.name] = time.monotonic()
        if self._console.is_terminal and self._live is None and status.state is State.STARTING:
            self._open_table()
        if self._live is None or status.state is State.WAITING:
            self._say_change(status, before)

    def _open_table(self) -> None:
        self._close_progress()
        self._live = Live(get_renderable=self._table, console=self._console, refresh_per_second=4)
        self._live.start()

    def _say_change(self, status: ProcessStatus, before: ProcessStatus | None) -> None:
        if before is not None and before.state is status.state and before.reason == status.reason:
            return
        took = ""
        if status.state is State.READY:
            took = f" after {time.monotonic() - self._started_s.get(status.name, 0.0):.0f} s"
        reason = f" ({status.reason})" if status.reason else ""
        self._line(f"{status.name}: {status.state}{took}{reason}")

    def _table(self) -> Table:
        table = Table(box=None, show_header=False, pad_edge=False)
        for name, status in self._statuses.items():
            elapsed_s = time.monotonic() - self._started_s.get(name, time.monotonic())
            is_starting = status.state is State.STARTING
            last = log_tail(Path(status.log), 1) if is_starting else [status.reason]
            table.add_row(
                name,
                Text(status.state, style=COLOURS[status.state]),
                f"{elapsed_s:.0f} s" if is_starting else "",
                Text("".join(last)[:100], style="dim", overflow="ellipsis", no_wrap=True),
            )
        return table

    def serving(self, model: ModelSource) -> None:
        """Print the address and a command that works."""
        self.close()
        host = self._config.reachable_host()
        scheme = "https" if self._config.is_tls else "http"
        base = f"{scheme}://{f'[{host}]' if ':' in host else host}:{self._config.listen.port}"
        body = json.dumps(
            {
                "model": model.served_name,
                "messages": [{"role": "user", "content": "What is the capital of France?"}],
                "max_tokens": 64,
                "temperature": 0,
            }
        )
        has_keys = self._config.api_key_file is not None
        key = ' -H "Authorization: Bearer $HEADRACE_API_KEY"' if has_keys else ""
        self._line(f"\nServing {model.served_name} on {base}/v1 (Ctrl-C ends it). Try:\n")
        self._line(f"  curl {base}/v1/chat/completions{key} -H 'Content-Type: application/json' \\")
        self._line(f"    -d '{body}'\n")
        self._line(f"Logs: {self._config.state_dir / 'logs'}")

    def stopping(self) -> None:
        """Say that everything is being taken down."""
        self.close()
        self._line("Taking everything down (Ctrl-C again: at once)")

    def failed(self, status: ProcessStatus) -> None:
        """Say which process does not come up, with the end of its log."""
        self.close()
        for line in log_tail(Path(status.log), FAILED_LOG_LINES):
            self._line(f"  {line[:300]}")
        self._line(
            f"headrace: {status.name} is down for good: {status.reason or 'no answer'};"
            f" its log: {status.log} (`headrace doctor` says what this host lacks)"
        )

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._close_progress()
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _close_progress(self) -> None:
        if self._progress is not None:
            self._finish_tasks()
            self._progress.stop()
            self._progress = None

    def _line(self, text: str) -> None:
        # Plain print: rich would wrap the command that the user is to copy.
        self._console.file.write(text + "\n")
        self._console.file.flush()
