"""Holds the requests to one engine while its weights change."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

POLL_SECONDS = 0.02
"""Between requests to abort what runs: one that was on its way when the engine was asked is not known to it yet."""


class Gate:
    """Counts the requests that pass, and stops new ones while it is closed.

    SGLang has such a gate of its own (/pause_generation, mode abort), which looks for running requests once a second.
    """

    def __init__(self) -> None:
        self._open = asyncio.Event()
        self._open.set()
        self._passing = 0
        self._left = asyncio.Event()

    @property
    def passing(self) -> int:
        """Requests that the engine has not answered."""
        return self._passing

    @asynccontextmanager
    async def through(self) -> AsyncIterator[None]:
        """Around one request."""
        await self._open.wait()
        self._passing += 1
        try:
            yield
        finally:
            self._passing -= 1
            self._left.set()

    async def close(self, end_running: Callable[[], Awaitable[None]] | None) -> int:
        """New requests wait from now on; returns when none runs. Gives how many ran before.

        Args:
            end_running: asks the engine to end what runs, again and again until nothing does; None: it is waited for.
        """
        self._open.clear()
        running = self._passing
        while self._passing:
            self._left.clear()
            if end_running is not None:
                await end_running()
                await asyncio.sleep(POLL_SECONDS)
            else:
                await self._left.wait()
        return running

    def open(self) -> None:
        self._open.set()
