"""A policy that lost a rank comes back to where it was, while the rest of the run goes on.

The driver is alive, so nothing of the run is lost but the trainer's state. That of the last complete checkpoint is loaded
into new processes, and the steps since are taken again on the same batches (`journal.py`). The trainer repeats itself bit
for bit on one machine, so what comes out is what was lost, and neither engines nor trajectories notice.
"""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from megatron_vespo.errors import RunError
from megatron_vespo.orchestration.checkpoints import complete_checkpoints, load_trainer, step_of
from megatron_vespo.orchestration.journal import FOLDER, StepJournal
from megatron_vespo.orchestration.policy_group import PolicyLost
from megatron_vespo.orchestration.session import Session
from megatron_vespo.orchestration.steps import take_step


@asynccontextmanager
async def restarting_policy(session: Session) -> AsyncIterator[None]:
    """Around the loop. Without checkpoints the journal would grow for the whole run, so then a lost policy ends it."""
    config = session.config
    if config.policy.max_restarts == 0 or config.checkpoint.save_every == 0:
        yield
        return
    async with StepJournal(session.folder / FOLDER) as session.journal:
        with session.policy.recovering(Recovery(session, session.journal).recover):
            yield


class Recovery:
    def __init__(self, session: Session, journal: StepJournal) -> None:
        self._session = session
        self._journal = journal
        self._base: Path | None = None
        """The checkpoint that was last started from; None: the initial weights."""
        self._losses: list[PolicyLost] = []
        """Since that checkpoint."""

    async def recover(self, lost: PolicyLost) -> None:
        """Bring the policy to where it was after `session.progress.step` steps.

        Raises:
            PolicyLost: it was lost more than `policy.max_restarts` times since the last complete checkpoint; the first
                cause of these.
            RunFailed: nodes were lost, and those that are left have no room for it.
        """
        while True:
            self._count(lost)
            await self._session.policy.find_room()
            try:
                return await self._start_again(lost)
            except RunError as failure:
                again = await self._session.policy.lost(failure)
                if again is None:
                    raise
                lost = again

    def _count(self, lost: PolicyLost) -> None:
        newest = next(reversed(complete_checkpoints(self._session.folder)), None)
        if newest != self._base:
            self._base, self._losses = newest, []
        self._losses.append(lost)
        allowed = self._session.config.policy.max_restarts
        if len(self._losses) > allowed:
            first = self._losses[0]
            times = f"started again {allowed} times since the last checkpoint (policy.max_restarts)"
            raise PolicyLost(first.part, f"{first.cause}; {times}", first.details)

    async def _start_again(self, lost: PolicyLost) -> None:
        session, started = self._session, time.monotonic()
        session.console.event(f"{lost}: the policy is started again")
        session.console.phase("starting the policy again")
        session.weights.abandon()
        await session.policy.restart()
        if self._base is not None:
            await load_trainer(session, self._base)
        first, done = 0 if self._base is None else step_of(self._base), session.progress.step
        await self._is_at(first)
        for step in range(first, done):
            session.console.phase(f"taking step {step + 1} again")
            await take_step(session, await self._journal.read(step))
            await self._is_at(step + 1)
        seconds = time.monotonic() - started
        session.tally.policy_restarts += 1
        session.record(
            "restart",
            done,
            {
                "part": lost.part,
                "cause": lost.cause,
                "checkpoint": first,
                "steps_again": done - first,
                "time/restart": seconds,
            },
        )
        session.console.phase(f"going on after step {done}")
        session.console.event(f"the policy is where it was, after {seconds:.1f} s and {done - first} steps taken again")

    async def _is_at(self, step: int) -> None:
        for writer in self._session.writers:
            await writer.begin_again(step)
