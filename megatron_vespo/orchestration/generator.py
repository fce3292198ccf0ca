"""Keeps the engine busy: starts groups as admission allows, grades them, and keeps those that are complete."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from megatron_vespo.admission import Bound, Ledger
from megatron_vespo.data.prompt import Prompt
from megatron_vespo.orchestration.busy_time import BusyTime
from megatron_vespo.orchestration.drawn_prompts import DrawnPrompts
from megatron_vespo.orchestration.mini_batches import mark_trained, settle_truncated
from megatron_vespo.orchestration.session import Session
from megatron_vespo.rollout.generate import generate_group
from megatron_vespo.rollout.generation import Generation
from megatron_vespo.rollout.trajectory import Group


class Generator:
    """Of one run. Everything happens in the driver's event loop, between its other waits.

    Attributes:
        ledger: which groups were started and not yet used.
        complete: graded groups by their numbers.
        busy: when anything was being sampled.
    """

    def __init__(self, session: Session) -> None:
        algorithm = session.config.algorithm
        self._session = session
        self._needed = algorithm.steps * algorithm.prompts_per_step
        self._running: dict[int, asyncio.Task[None]] = {}
        self._failure: BaseException | None = None
        self._holding = False
        self._changed = asyncio.Event()
        self.ledger = Ledger(Bound(algorithm.max_staleness, algorithm.prompts_per_step), session.progress.step)
        self.complete: dict[int, Group] = {}
        for trajectories in session.progress.mini_batches:  # of the run that this one goes on with
            oldest = min(trajectory.oldest_weight_version for trajectory in trajectories)
            self.complete[self.ledger.restore(oldest)] = Group(trajectories[0].prompt, trajectories)
        self.busy = BusyTime()
        self._drawn = DrawnPrompts(session.prompts, session.progress.drawn)
        self._tokens = 0
        self._since = time.monotonic()

    def start(self) -> None:
        """As many groups as admission, the engine's settings and the rest of the run allow."""
        if self._holding:  # what starts now would count as sampled under the weights that are on their way out
            return
        version = self._session.engines.weight_version
        if version is None:  # no engine serves
            return
        used = self.ledger.step * self._session.config.algorithm.prompts_per_step
        room = min(
            self.ledger.room(version),
            self._session.config.rollout.concurrent_groups - len(self._running),
            self._needed - used - len(self.ledger.deadlines),
        )
        for _ in range(room):
            number = self.ledger.start(version)
            task = asyncio.create_task(self._sample(number, self._drawn.take(number)))
            self._running[number] = task
            task.add_done_callback(lambda done, number=number: self._ended(number, done))
        self.busy.set(bool(self._running), time.monotonic())

    async def next_step(self) -> list[Group]:
        """The groups of the next optimizer step, once they and all that could become too old are complete.

        Raises:
            RunFailed: a group could not be sampled or graded, or none came in time.
        """
        supervisor, timeout = self._session.sampler.supervisor, self._session.config.rollout.engine
        self.start()  # engines may have come back while nothing was being sampled
        while self._failure is not None or (chosen := self.ledger.choose(self.complete)) is None:
            self._changed.clear()
            missing = len(self.ledger.waited_for(self.complete))
            what = f"wait for {missing} of {len(self._running)} groups that are being sampled"
            await supervisor.wait(what, self._next_change(), timeout.request_timeout_seconds, owner="engines, graders")
        self.ledger.use(chosen)
        groups = [self.complete.pop(number) for number in chosen]
        self.start()
        return groups

    @asynccontextmanager
    async def held(self) -> AsyncIterator[float]:
        """Inside, the weights change; enter it for nothing else. What runs is treated as `asynchronous.update` says.
        Gives `time.monotonic()` of the moment from which requests were held."""
        session = self._session
        asynchronous = session.config.algorithm.asynchronous
        assert asynchronous is not None
        fleet, supervisor = session.sampler.fleet, session.sampler.supervisor
        seconds = session.config.rollout.engine.request_timeout_seconds
        self._holding, since = True, time.monotonic()
        holding = fleet.hold(asynchronous.update)
        running = await supervisor.wait("end, pause or finish what is being sampled", holding, seconds, owner="engines")
        try:
            yield since
        finally:
            await fleet.release()
            self._holding = False
        session.tally.updates_mid_generation += running > 0 and asynchronous.update != "wait"
        self.start()

    def note_progress(self) -> None:
        """Put what a checkpoint needs into the session's progress: what is complete, and which prompts are not."""
        progress = self._session.progress
        progress.mini_batches = [group.trajectories for group in self.complete.values()]
        # Not the tasks that run: one that has just kept its group is among them until its callback was called.
        progress.prompts, progress.drawn = self._drawn.state(self.ledger.deadlines.keys() - self.complete.keys())

    @property
    def running(self) -> int:
        """Groups that are being sampled or graded."""
        return len(self._running)

    def take_speed(self) -> float:
        """Tokens of complete responses a second, since this was last asked for."""
        tokens, now = self._tokens, time.monotonic()
        speed = tokens / (now - self._since)
        self._tokens, self._since = 0, now
        return speed

    async def stop(self) -> None:
        """Drop what is still being sampled."""
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _sample(self, number: int, prompt: Prompt) -> None:
        session = self._session
        group = await generate_group(session.sampler.fleet, prompt, self._generation())
        await session.sampler.grade(group)
        settle_truncated([group], session.config.rollout)
        tokens = sum(trajectory.sampled_tokens for trajectory in group.trajectories)
        self._tokens += tokens
        session.tally.generated_tokens += tokens
        session.tally.trajectories_generated += len(group.trajectories)
        mark_trained([group], session.config.algorithm.advantage)
        if not group.trained:
            self.ledger.leave_out(number)
            session.tally.trajectories_filtered += len(group.trajectories)
        else:
            self.complete[number] = group

    def _generation(self) -> Generation:
        session = self._session
        return Generation.of_rollout(
            session.config.rollout,
            stop_token_ids=session.sampler.tokenizer.stop_token_ids,
            vocab_size=session.sampler.vocab_size,
            run_seed=session.config.seed,
            stream="rollout",
            weight_version=None,
            cache_version=session.weights.cache_version,
            routes=session.routing_shape,
            environment=session.sampler.answer,
        )

    def _ended(self, number: int, task: asyncio.Task[None]) -> None:
        del self._running[number]
        if not task.cancelled():
            self._failure = self._failure or task.exception()
            if self._failure is None:
                try:
                    self.start()
                except Exception as error:
                    # Raised in a callback, it would be logged and forgotten: `next_step` tells it.
                    self._failure = error
        self.busy.set(bool(self._running), time.monotonic())
        self._changed.set()

    async def _next_change(self) -> None:
        if self._failure is None:
            await self._changed.wait()
        if self._failure is not None:
            raise self._failure
