"""Ctrl-C and SIGTERM end a run the same way that an error does: everything is stopped, then the cause is said."""

import asyncio
import signal
from collections.abc import Awaitable, Callable
from typing import TypeVar

from megatron_vespo.errors import RunError

T = TypeVar("T")


class Interrupted(RunError):
    """A signal asked the run to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


def run_interruptible(main: Callable[[], Awaitable[T]]) -> T:
    """asyncio.run(main()), in which the first SIGINT or SIGTERM cancels `main`, whose cleanup is then left alone.

    Raises:
        Interrupted: after the cleanup.
    """
    received: list[int] = []

    async def guarded() -> T:
        loop, task = asyncio.get_running_loop(), asyncio.ensure_future(main())

        def stop(number: int) -> None:
            if not received:
                received.append(number)
                task.cancel()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop, number)
        return await task

    try:
        return asyncio.run(guarded())
    except asyncio.CancelledError:
        if not received:
            raise
        raise Interrupted(received[0]) from None
