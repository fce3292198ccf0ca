"""Ctrl-C and SIGTERM end a run the same way that an error does: everything is stopped, then the cause is said. SIGUSR2
asks it to save first."""

import asyncio
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from megatron_vespo.errors import RunError

T = TypeVar("T")


SAVE_SIGNAL = signal.SIGUSR2


class Interrupted(RunError):
    """A signal asked the run to stop."""

    def __init__(self, number: int, after: str = "") -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}{after}")
        self.exit_code = 128 + number


@dataclass
class StopRequest:
    """Whether the run was asked to save and stop, as soon as a step is done."""

    asked: bool = False

    def ask(self) -> None:
        self.asked = True


def run_interruptible(main: Callable[[], Awaitable[T]], save: Callable[[], None] | None = None) -> T:
    """asyncio.run(main()), in which the first SIGINT or SIGTERM cancels `main`, whose cleanup is then left alone.

    `save`: called on SIGUSR2.

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
        if save is not None:
            loop.add_signal_handler(SAVE_SIGNAL, save)
        return await task

    try:
        return asyncio.run(guarded())
    except asyncio.CancelledError:
        if not received:
            raise
        raise Interrupted(received[0]) from None
