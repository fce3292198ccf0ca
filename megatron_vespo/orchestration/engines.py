"""All engines of a run: those that serve, and those that failed, which are started again and wait for the weights."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Any

from megatron_vespo.config import EngineConfig
from megatron_vespo.errors import RunError
from megatron_vespo.orchestration.engine import Engine
from megatron_vespo.orchestration.hosts import Host
from megatron_vespo.orchestration.places import Places
from megatron_vespo.orchestration.runtime import Runtime
from megatron_vespo.orchestration.supervision import SETTLING_SECONDS, RunFailed, all_of
from megatron_vespo.rollout.client import EngineClient
from megatron_vespo.rollout.engine_http import EngineError
from megatron_vespo.rollout.fleet import Fleet

PART = "engines"
RESTART_WINDOW_SECONDS = 3600.0
HEALTH_CHECKS = 4
"""Within the time after which a silent engine is taken for hung."""


@dataclass
class Slot:
    """The place of one engine, whichever process fills it."""

    number: int
    engine: Engine
    failed_at: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"engine {self.number}"


class Engines:
    """
    Attributes:
        fleet: of the engines that serve.
        restarts: of engines, in this run.
        tell: what happens to engines, in a line each.
    """

    def __init__(
        self,
        runtime: Runtime,
        settings: dict[str, Any],
        gpus: int,
        weights_timeout_seconds: float | None,
        places: Places,
    ) -> None:
        """
        Args:
            settings: arguments of `EngineServer`.
            gpus: of each engine.
            weights_timeout_seconds: deadline of everything that moves weights. None: no weights are sent, and an engine
                that was started again serves at once.
            places: the host of each, and of one whose host is lost the next one.
        """
        self._runtime = runtime
        self._settings = settings
        self._config: EngineConfig = settings["engine"]
        self._gpus = gpus
        self._weights_timeout_seconds = weights_timeout_seconds
        self._places = places
        self.fleet = Fleet(on_failure=self._on_failure)
        self.restarts = 0
        self.tell: Callable[[str], None] = lambda line: None
        self._slots = [
            Slot(number, self._new_engine(number, host))
            for number, host in enumerate(places.engines)
            if host is not None
        ]
        self._waiting: list[EngineClient] = []
        self._came_back = asyncio.Event()
        self._given_up: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._tasks: set[asyncio.Task[None]] = set()
        runtime.on_stop(PART, self.stop)

    async def start(self) -> None:
        """All of them; they serve the weights of the model's folder.

        Raises:
            RunFailed: one did not start.
        """
        starting = all_of(*[slot.engine.start() for slot in self._slots])
        await self._runtime.supervisor.wait(
            "start the engines", starting, self._config.startup_timeout_seconds, owner="engines"
        )
        self._runtime.supervisor.watch(PART, self._given_up)
        for slot in self._slots:
            self._watch(slot)
            self.fleet.add(slot.engine.client)

    @property
    def present(self) -> list[EngineClient]:
        """Those that serve, and those that wait for the weights."""
        return [*self.fleet.clients, *self._waiting]

    @property
    def waiting(self) -> list[EngineClient]:
        """Started again, and without the run's weights."""
        return list(self._waiting)

    @property
    def weight_version(self) -> int | None:
        """The oldest that one of those that serve holds; None: none serves, or one was not told yet."""
        versions = [client.given_version for client in self.fleet.clients]
        return None if None in versions else min((v for v in versions if v is not None), default=None)

    def forget_weights(self) -> None:
        """Another run begins: what engines hold is another trainer's."""
        for client in self.present:
            client.given_version = None

    async def came_back(self) -> None:
        """Returns when an engine waits for the weights."""
        while not self._waiting:
            self._came_back.clear()
            await self._came_back.wait()

    def hold_weights(self, clients: Iterable[EngineClient], weight_version: int) -> None:
        """`clients` have the weights of this version now, and serve."""
        for client in clients:
            client.given_version = weight_version
            if client in self._waiting:
                self._waiting.remove(client)
                self.fleet.add(client)
                self.tell(f"{client.name} serves again, with the weights of step {weight_version}")

    def failed(self, client: EngineClient, error: RunError) -> None:
        """Take it out and start it again. An engine that was taken out before is left alone."""
        if client in self._waiting:
            self._waiting.remove(client)
            client.lose(str(error))
            self._on_failure(client, error)
        else:
            self.fleet.failed(client, error)

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*[slot.engine.stop() for slot in self._slots])

    def _new_engine(self, number: int, host: Host) -> Engine:
        return Engine(self._runtime, self._settings, number, self._gpus, self._weights_timeout_seconds, host)

    def _on_failure(self, client: EngineClient, error: RunError) -> None:
        (slot,) = [slot for slot in self._slots if slot.engine.is_of(client)]
        self._in_background(self._replace(slot, error))

    def _watch(self, slot: Slot) -> None:
        self._in_background(self._watch_process(slot.engine))
        self._in_background(self._watch_answers(slot.engine.client))

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        """What fails in it ends the run."""

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None and not self._given_up.done():
                self._given_up.set_exception(error)

        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(ended)

    async def _watch_process(self, engine: Engine) -> None:
        if (failure := await engine.death()) is not None:
            self.failed(engine.client, failure)

    async def _watch_answers(self, client: EngineClient) -> None:
        """An engine that should be at work and computes nothing is hung."""
        interval, healthy = self._config.hang_timeout_seconds / HEALTH_CHECKS, time.monotonic()
        while client in self.present:
            await asyncio.sleep(interval)
            if not self.fleet.answers_are_due(client):
                healthy = time.monotonic()
                continue
            try:
                await client.health(interval)
                healthy = time.monotonic()
            except EngineError as error:
                silent = time.monotonic() - healthy
                if silent > self._config.hang_timeout_seconds and self.fleet.answers_are_due(client):
                    self.failed(
                        client, RunFailed(client.name, f"hung: it computed nothing for {silent:.0f} s: {error}")
                    )

    async def _replace(self, slot: Slot, error: RunError) -> None:
        """By a new process, which waits for the weights; too many failures end the run. That its host is lost is no
        failure of an engine's."""
        error = await slot.engine.first_cause(SETTLING_SECONDS) or error
        await self._places.look()
        former, host = slot.engine.host, self._places.engines[slot.number]
        if host is None:
            await self._leave_out(slot)
            return
        now = time.monotonic()
        slot.failed_at = [at for at in slot.failed_at if now - at < RESTART_WINDOW_SECONDS]
        if host == former:
            slot.failed_at.append(now)
        if len(slot.failed_at) > self._config.max_restarts:
            self._give_up(slot, error)
            return
        where = "" if host == former else f" on {host.name}"
        self.tell(f"{slot.name} is taken out, and started again{where}: {error}")
        started = time.monotonic()
        try:
            await slot.engine.stop()
            slot.engine = self._new_engine(slot.number, host)
            await asyncio.wait_for(slot.engine.start(), self._config.startup_timeout_seconds)
        except (RunError, TimeoutError) as failure:
            self._in_background(self._replace(slot, RunFailed(slot.name, f"did not start again: {failure}")))
            return
        self.restarts += 1
        self._watch(slot)
        seconds = time.monotonic() - started
        if self._weights_timeout_seconds is None:
            self.fleet.add(slot.engine.client)
            self.tell(f"{slot.name} was started again in {seconds:.1f} s, and serves")
            return
        self._waiting.append(slot.engine.client)
        self._came_back.set()
        self.tell(f"{slot.name} was started again in {seconds:.1f} s, and waits for the weights")

    async def _leave_out(self, slot: Slot) -> None:
        """Its host is lost, and no other has room for it."""
        self._slots.remove(slot)
        cause = f"its node {slot.engine.host.name} is lost, and no other node has room for it"
        if not self._slots:
            raise RunFailed(slot.name, f"{cause}; no engine is left")
        self.tell(f"{slot.name}: {cause}: the run goes on with {len(self._slots)} of {self._config.count} engines")
        await slot.engine.stop()

    def _give_up(self, slot: Slot, error: RunError) -> None:
        if self._given_up.done():
            return
        limit = self._config.max_restarts
        often = (
            f" (failure {len(slot.failed_at)} within an hour, rollout.engine.max_restarts is {limit})" if limit else ""
        )
        cause = str(error).removeprefix(f"{slot.name}: ")
        self._given_up.set_exception(RunFailed(slot.name, f"{cause}{often}", details=getattr(error, "details", "")))
