"""What `megatron-vespo status` reads of a run that goes on: status.json in its folder.

A thread writes it, so that no wait for a disk holds up the event loop: within WRITE_SECONDS of a change, however many
there are, and every HEARTBEAT_SECONDS.
"""

import json
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vespo import presence
from megatron_vespo.observability.status import STATUS_FILE
from megatron_vespo.orchestration.supervision import Supervisor

WRITE_SECONDS = 0.5
HEARTBEAT_SECONDS = 5.0


@dataclass(frozen=True)
class Elsewhere:
    """A process on a host where the driver is not, as that host told it."""

    host: str
    name: str
    pid: int
    state: str


class StatusFile:
    """
    Attributes:
        elsewhere: set as a whole, by whoever asks the other hosts.
    """

    def __init__(self, folder: Path, parts: Path, supervisor: Supervisor) -> None:
        """`parts`: where processes make themselves known. Starts to write at once."""
        self.folder = folder
        self.elsewhere: list[Elsewhere] = []
        self._parts = parts
        self._supervisor = supervisor
        self._ending = threading.Event()
        self._lock = threading.Lock()  # of what is written where
        self._written: dict[str, Any] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self._write(self._running())
        self._thread = threading.Thread(target=self._follow_changes, name="status", daemon=True)
        self._thread.start()

    def follow(self, folder: Path) -> None:
        """Another run is the one that goes on; that in the former folder has finished."""
        if folder == self.folder:
            return
        with self._lock:
            former, self.folder = self.folder, folder
        self._write(self._ended("finished", None), former)

    def end(self, error: BaseException | None) -> None:
        """The last that is written."""
        self._ending.set()
        self._thread.join()
        self._write(self._ended("finished", None) if error is None else self._ended("failed", str(error) or "stopped"))

    def _follow_changes(self) -> None:
        while not self._ending.wait(WRITE_SECONDS):
            status = self._running()
            if status != self._written or time.time() - self._last > HEARTBEAT_SECONDS:
                self._write(status)

    def _running(self) -> dict[str, Any]:
        return {
            "state": "running",
            "cause": None,
            "host": socket.gethostname(),
            "parts_folder": str(self._parts),
            "parts": [
                {"name": process.name, "pid": process.pid, "created": process.created}
                for process in presence.processes(self._parts)
            ],
            "elsewhere": [vars(process) for process in self.elsewhere],
            "waits": [
                {"what": wait.what, "owners": list(wait.owners), "since": wait.since, "seconds": wait.seconds}
                for wait in list(self._supervisor.waits)
            ],
        }

    def _ended(self, state: str, cause: str | None) -> dict[str, Any]:
        return {"state": state, "cause": cause, "host": socket.gethostname(), "parts": [], "waits": []}

    def _write(self, status: dict[str, Any], folder: Path | None = None) -> None:
        """Whole or not at all, for whoever reads it."""
        with self._lock:
            self._written, self._last = status, time.time()
            file = (folder or self.folder) / STATUS_FILE
            unfinished = file.with_name(f".{file.name}.unfinished")
            unfinished.write_text(json.dumps(status | {"written": self._last}, indent=1) + "\n")
            unfinished.rename(file)
