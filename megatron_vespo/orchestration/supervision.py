"""Every wait has a name, an owner and a deadline, and ends at once when a part of the run dies. Failures have a first
cause."""

import asyncio
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ray import ObjectRef
from ray.exceptions import ActorUnschedulableError, RayActorError, RayTaskError

from megatron_vespo.errors import ConfigError, RunError

T = TypeVar("T")

SETTLING_SECONDS = 2.0
"""How long after a first error the parts are watched, so that a death is named rather than what it caused."""


class RunFailed(RunError):
    """A part of the run failed. The message is the first cause, in one line or a few."""

    def __init__(self, part: str, cause: str, details: str = "") -> None:
        super().__init__(f"{part}: {cause}")
        self.part = part
        self.cause = cause
        self.details = details
        """Stack traces, for the log."""


class Expired(RunFailed):
    """A deadline passed; nothing that is watched had died."""


@dataclass(eq=False)
class Wait:
    """One that is going on."""

    what: str
    owners: list[str]
    """Parts that are waited for; those that have answered are taken away."""
    seconds: float
    """The deadline, counted from `since`."""
    since: float = field(default_factory=time.time)
    """Unix seconds."""


Diagnose = Callable[[Wait], Awaitable[str]]
"""Given a wait whose deadline has passed: finds out what there is to find, and puts it in a few words."""


class Supervisor:
    """Watches the parts of a run while others are waited for.

    Attributes:
        waits: those that are going on, the oldest first. Other threads may copy it.
    """

    def __init__(self, diagnose: Diagnose | None = None) -> None:
        self._sentinels: dict[str, asyncio.Future] = {}
        self._diagnose = diagnose
        self.waits: list[Wait] = []

    def watch(self, part: str, sentinel: Awaitable) -> None:
        """`sentinel`: ends only when the part fails: a call into it (an `ObjectRef`), or a future of whoever looks after it."""
        self._sentinels[part] = asyncio.ensure_future(_resolve(sentinel))

    def forget(self, part: str = "") -> None:
        """Stop watching `part` (and its ranks), or all: they are about to be stopped on purpose."""
        for name in [name for name in self._sentinels if name.startswith(part)]:
            self._sentinels.pop(name).cancel()

    async def wait(self, what: str, work: Awaitable[T], seconds: float, owner: str = "") -> T:
        """The result of `work`. `owner`: the part, or parts, that are waited for.

        Raises:
            RunFailed: a watched part died, `work` raised, or `seconds` passed (`Expired`); with the first cause.
            ConfigError: `work` raised it: a mistake of the user's stays one.
        """
        return await self._wait(Wait(what, [owner] if owner else [], seconds), work)

    async def answers(self, what: str, calls: Mapping[str, ObjectRef], seconds: float) -> list[Any]:
        """The results of Ray calls, by the part that was called, in their order. Raises what `wait` raises."""
        wait = Wait(what, list(calls), seconds)

        async def answer(part: str, ref: ObjectRef) -> Any:
            result = await from_part(part, ref)
            wait.owners.remove(part)
            return result

        return await self._wait(wait, all_of(*(answer(part, ref) for part, ref in calls.items())))

    async def _wait(self, wait: Wait, work: Awaitable[T]) -> T:
        task = asyncio.ensure_future(work)
        self.waits.append(wait)
        try:
            if not await self._ends(task, wait.seconds):
                raise await self._expired(wait)
            if task.done() and task.exception() is None:
                return task.result()
            await self._settle()
            if (failure := self._dead_part()) is not None:
                raise failure
            if isinstance(error := task.exception(), ConfigError):
                raise error
            raise _named(wait.what, error)
        finally:
            self.waits.remove(wait)
            if not task.done():
                task.cancel()

    async def _ends(self, task: asyncio.Future, seconds: float) -> bool:
        """Whether `task` ended, or a watched part died, within `seconds`. That one is no longer watched is neither."""
        deadline = time.monotonic() + seconds
        while True:
            watched = [sentinel for sentinel in self._sentinels.values() if not sentinel.cancelled()]
            left = max(deadline - time.monotonic(), 0.0)
            done, _ = await asyncio.wait({task, *watched}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                return False
            if task.done() or self._dead_part() is not None:
                return True

    async def _expired(self, wait: Wait) -> Expired:
        cause = f"not finished after {wait.seconds:.0f} s"
        if self._diagnose is None:
            return Expired(wait.what, cause)
        return Expired(wait.what, f"{cause}: {await self._diagnose(wait)}", details=describe_waits(self.waits))

    async def _settle(self) -> None:
        if self._sentinels and self._dead_part() is None:
            await asyncio.wait(self._sentinels.values(), timeout=SETTLING_SECONDS, return_when=asyncio.FIRST_COMPLETED)

    def _dead_part(self) -> RunFailed | None:
        for part, sentinel in self._sentinels.items():
            if sentinel.done() and not sentinel.cancelled():
                return _named(part, sentinel.exception() or RuntimeError("ended by itself"))
        return None


def describe_waits(waits: list[Wait]) -> str:
    """A line for each, the oldest first."""
    now = time.time()
    return "".join(
        f"{wait.what}: for {now - wait.since:.1f} s of {wait.seconds:.0f} s"
        + (f", of {', '.join(wait.owners)}" if wait.owners else "")
        + "\n"
        for wait in waits
    )


async def _resolve(sentinel: Awaitable) -> Any:
    return await sentinel


async def from_part(part: str, ref: ObjectRef) -> Any:
    """Await a Ray call; an error carries the name of the part that raised it."""
    try:
        return await ref
    except (RayTaskError, RayActorError, ActorUnschedulableError) as error:
        raise _named(part, error) from None


async def all_of(*work: Awaitable[T]) -> list[T]:
    """Like asyncio.gather, but the first error cancels the rest."""
    tasks = [asyncio.ensure_future(w) for w in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _named(part: str, error: BaseException | None) -> RunFailed:
    if isinstance(error, RunFailed):
        return error
    if isinstance(error, RayTaskError):
        return RunFailed(part, _one_line(error.cause), details=str(error))
    if isinstance(error, RayActorError):
        return RunFailed(part, _death(error), details=str(error))
    if isinstance(error, ActorUnschedulableError):
        return RunFailed(part, "its node is gone", details=str(error))
    details = "" if error is None else "".join(traceback.format_exception(error))
    return RunFailed(part, _one_line(error), details)


def _death(error: RayActorError) -> str:
    """Ray tells an error in an actor's constructor with its trace, whose last line is the error."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    if any("Traceback" in line for line in lines) or "creation task" in str(error):
        return lines[-1].strip()
    return "its process died (killed, out of memory, or crashed)"


def _one_line(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {error}" if error is not None else "unknown error"
