"""What a person sees while a run goes on: one live view on a terminal, plain lines everywhere else."""

import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Literal, Self

from rich.console import Console
from rich.live import Live

from megatron_vespo.observability.console_state import RunState, clock_text
from megatron_vespo.observability.console_view import progress_text, render, row_text

REDRAWS_PER_SECOND = 4


class RunConsole:
    """Follows a run: what it is doing, how far it is, what was measured last.

    A context manager: on leaving, for whatever reason, the terminal is as it was (cursor, stdout, stderr) and the last
    view stays on the screen; the exception goes on to the caller, who prints it below. Methods may be called from any
    thread. In live mode what others print to `sys.stdout` or `sys.stderr` appears above the view; what child processes
    write straight to the terminal does not, so their output belongs in files.

    Args:
        title: name of the run.
        total_steps: optimizer steps of the run.
        steps_per_batch: optimizer steps between two weight syncs; time left is counted in such batches.
        mode: "live" redraws one view, "plain" prints lines, "auto" is live on a terminal.
        console: where to print; a new rich console on stdout by default.
        heartbeat_seconds: in plain mode a line is printed when none was for so long.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        title: str,
        total_steps: int,
        steps_per_batch: int = 1,
        mode: Literal["auto", "live", "plain"] = "auto",
        console: Console | None = None,
        heartbeat_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.console = console or Console(highlight=False)
        self.live_mode = mode == "live" or (
            mode == "auto" and self.console.is_terminal and not self.console.is_dumb_terminal
        )
        self.state = RunState(title, total_steps, steps_per_batch, clock)
        self.heartbeat_seconds = heartbeat_seconds
        self._lock = threading.RLock()
        self._live: Live | None = None
        self._stopped = threading.Event()
        self._heart: threading.Thread | None = None
        self._last_print = clock()

    def __enter__(self) -> Self:
        if self.live_mode:
            self._live = Live(
                console=self.console, get_renderable=self._view, refresh_per_second=REDRAWS_PER_SECOND, transient=False
            )
            self._live.__enter__()
        else:
            self._heart = threading.Thread(target=self._beat, name="console-heartbeat", daemon=True)
            self._heart.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._lock:
            self.state.finish("done" if kind is None else "interrupted" if kind is KeyboardInterrupt else "stopped")
        self._stopped.set()
        if self._live is not None:
            self._live.__exit__(None, None, None)
            self._live = None
        if self._heart is not None:
            self._heart.join()
            self._heart = None

    def phase(self, name: str) -> None:
        """What begins now ("generating", "training", "syncing weights", "evaluating", "starting the engine", ...)."""
        with self._lock:
            self.state.begin(name)
        if not self.live_mode:
            self._print(name)

    def progress(self, done: float, total: float | None, unit: str, note: str = "") -> None:
        """How far the phase is: `progress(37, 64, "groups", "4,210 tokens")`. Cheap; call it as often as you like."""
        with self._lock:
            self.state.advance(done, total, unit, note)

    def event(self, text: str) -> None:
        """Something worth a line that stays."""
        self._print(text)

    def update(self, row: dict[str, Any]) -> None:
        """Take over a metrics row (as `Metrics.write` returns it)."""
        with self._lock:
            self.state.take(row)
            line = row_text(row, self.state)
        if line and (not self.live_mode or row["kind"] == "evaluation"):
            self._print(line)

    def _view(self):
        with self._lock:
            return render(self.state, self.console.width)

    def _print(self, text: str) -> None:
        with self._lock:
            self._last_print = self.state.clock()
            elapsed = clock_text(self.state.elapsed)
        self.console.print(f"[{elapsed}] {text}", markup=False, highlight=False, soft_wrap=True)
        if not self.console.is_terminal:
            (self.console.file or sys.stdout).flush()

    def _beat(self) -> None:
        while not self._stopped.wait(min(1.0, self.heartbeat_seconds / 4)):
            with self._lock:
                quiet = self.state.clock() - self._last_print
                text = f"  ... {progress_text(self.state)}" if quiet >= self.heartbeat_seconds else ""
            if text:
                self._print(text)
