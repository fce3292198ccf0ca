"""One call of several engines side by side, while the trainer does its part: who failed at it, and who is not to blame."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from megatron_vespo.errors import RunError
from megatron_vespo.orchestration.supervision import Supervisor
from megatron_vespo.rollout.client import EngineClient
from megatron_vespo.rollout.engine_http import EngineError

PARTING_SECONDS = 10.0
"""What engines get to come out of a sync that was given up."""

Failures = dict[str, str]
"""Engine -> what is wrong with it."""


class EnginesFailed(RunError):
    """Engines that cannot be brought the weights. All others can: call `WeightUpdater.sync` again without these."""

    def __init__(self, engines: Failures) -> None:
        super().__init__("; ".join(f"{name}: {reason}" for name, reason in engines.items()))
        self.engines = engines

    def __reduce__(self):
        return type(self), (self.engines,)


async def ask_engines(
    supervisor: Supervisor,
    engines: Sequence[EngineClient],
    call: Callable[[EngineClient], Awaitable[Any]],
    seconds: float,
    trainer: asyncio.Future | None = None,
) -> Failures:
    """`call` for all engines side by side; those that raised, or did not return in time.

    After a first failure the others get PARTING_SECONDS at most, and are not blamed. Raises what `trainer` raised, should it
    fail meanwhile.
    """
    tasks = {asyncio.ensure_future(call(client)): client.name for client in engines}
    try:
        finishing = _finish(tasks, seconds, trainer)
        return await supervisor.wait(
            "let engines load weights", finishing, seconds + 2 * PARTING_SECONDS, owner="engines"
        )
    finally:
        for task in tasks:
            task.cancel()


async def _finish(tasks: dict[asyncio.Task, str], seconds: float, trainer: asyncio.Future | None) -> Failures:
    deadline = time.monotonic() + seconds
    failures: Failures = {}
    pending = set(tasks)
    while pending:
        others = {trainer} if trainer is not None and not trainer.done() else set()
        remaining = max(deadline - time.monotonic(), 0.0)
        done, _ = await asyncio.wait(pending | others, timeout=remaining, return_when=asyncio.FIRST_COMPLETED)
        if trainer is not None and trainer in done:
            trainer.result()
        for task in done & pending:
            if isinstance(error := task.exception(), EngineError):
                failures[tasks[task]] = str(error)
                deadline = min(deadline, time.monotonic() + PARTING_SECONDS)
            elif error is not None:
                raise error
        pending -= done
        if not done:
            late = f"did not answer within {seconds:.0f} s"
            return failures or {tasks[task]: late for task in pending}
    return failures
