"""An SGLang server as a Ray actor: the actor owns the process, the driver talks to it over HTTP."""

import threading
import time
from pathlib import Path
from typing import Any

import ray

from megatron_vespo.presence import announce
from megatron_vespo.rollout.server import EngineServer

POLL_SECONDS = 0.5


@ray.remote(max_restarts=0, concurrency_groups={"sentinel": 1, "control": 1})  # pyright: ignore[reportCallIssue]
class EngineActor:
    """`settings` are `EngineServer`'s arguments."""

    def __init__(self, settings: dict[str, Any]) -> None:
        announce(Path(settings["parts"]), f"{settings['name']} actor")
        self._server = EngineServer(**{**settings, "log_path": Path(settings["log_path"])})
        self._stopping = threading.Event()

    def start(self) -> str:
        """Start the server; returns its URL once it is healthy."""
        self._server.start()
        return self._server.url

    @ray.method(concurrency_group="control")
    def stop(self) -> None:
        """May be called while `start` still waits for the server."""
        self._stopping.set()
        self._server.stop()

    @ray.method(concurrency_group="sentinel")
    def hold(self) -> None:
        """Returns when the server is stopped on purpose; raises when it ends by itself."""
        while not self._stopping.is_set():
            self._server.raise_if_dead()
            time.sleep(POLL_SECONDS)
