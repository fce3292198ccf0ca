"""A bar with rate and time left on a terminal; a line now and then elsewhere."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

LINE_SECONDS = 30.0
"""Between lines where there is no terminal."""


class Bar:
    """Bytes of `total` that are done. As a context manager; `advance` counts up."""

    def __init__(self, what: str, total: int, shown: bool = True):
        console = Console(stderr=True)
        self._what, self._total, self._done = what, total, 0
        self._lines = shown and not console.is_terminal
        columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, disable=not shown or self._lines)
        self._task = self._bar.add_task(what, total=total)

    def advance(self, count: int) -> None:
        self._done += count
        self._bar.advance(self._task, count)
        if self._lines and time.monotonic() - self._last > LINE_SECONDS:
            self._print_line()

    def _print_line(self) -> None:
        self._last = time.monotonic()
        rate = self._done / (self._last - self._start)
        left = f"{(self._total - self._done) / rate:.0f} s left" if rate else "time left unknown"
        print(f"{self._what}: {self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB, {rate / 1e6:.0f} MB/s, {left}",
              file=sys.stderr, flush=True)  # fmt: skip

    def __enter__(self) -> "Bar":
        self._start = self._last = time.monotonic()
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._lines and self._done:
            self._print_line()
        self._bar.stop()
