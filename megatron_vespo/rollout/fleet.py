"""The engines that take requests: which one gets the next, and where requests go whose engine fails."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Literal

from megatron_vespo.errors import RunError
from megatron_vespo.rollout.client import EngineClient
from megatron_vespo.rollout.engine_http import EngineError

OnFailure = Callable[[EngineClient, RunError], None]

MAX_FAILED_ENGINES = 3
"""Of one group: what brings down one engine after the other is the group."""


class Fleet:
    """Used in one event loop.

    Args:
        clients: of the engines that serve.
        on_failure: is told of an engine that failed, and sees to it that it, or another, comes back. None: there is
            nobody to do so, and its failure is the caller's.
    """

    def __init__(self, clients: Iterable[EngineClient] = (), on_failure: OnFailure | None = None) -> None:
        self.clients = list(clients)
        self._on_failure = on_failure
        self._changed = asyncio.Event()
        self._paused: list[EngineClient] = []

    def add(self, client: EngineClient) -> None:
        self.clients.append(client)
        self._changed.set()

    async def least_loaded(self) -> EngineClient:
        """The engine with the fewest outstanding tokens, waiting until there is one."""
        while not self.clients:
            self._changed.clear()
            await self._changed.wait()
        return min(self.clients, key=lambda client: client.outstanding_tokens)

    def failed(self, client: EngineClient, error: RunError) -> None:
        """Take the engine out; everything that waits for its answer ends with an error, and goes elsewhere.

        Raises:
            RunError: `error`, where nobody replaces engines.
        """
        if self._on_failure is None:
            raise error
        if client in self.clients:
            self.clients.remove(client)
            client.lose(str(error))
            self._on_failure(client, error)

    async def hold(self, mode: Literal["abort", "in_place", "wait"]) -> int:
        """Let no request run on, as `algorithm.asynchronous.update` says, until `release`.

        An engine that fails at it is taken out. Returns how many requests were running.
        """
        clients = list(self.clients)
        if mode == "in_place":
            self._paused = clients
            running = sum(client.gate.passing for client in clients)
            await self._each(clients, lambda client: client.pause_generation("in_place"))
            return running
        aborting = mode == "abort"
        closing = [client.gate.close(self._abort(client) if aborting else None) for client in clients]
        return sum(await asyncio.gather(*closing))

    async def release(self) -> None:
        paused, self._paused = self._paused, []
        await self._each(paused, lambda client: client.continue_generation())
        for client in self.clients:
            client.gate.open()

    def answers_are_due(self, client: EngineClient) -> bool:
        """Whether it should be at work on something."""
        return client.gate.passing > 0 and client not in self._paused

    def _abort(self, client: EngineClient) -> Callable[[], Awaitable[None]]:
        async def abort() -> None:
            await self._each([client], lambda client: client.abort_all())

        return abort

    async def _each(self, clients: list[EngineClient], call: Callable[[EngineClient], Awaitable[None]]) -> None:
        async def one(client: EngineClient) -> None:
            try:
                await call(client)
            except EngineError as error:
                self.failed(client, error)

        await asyncio.gather(*[one(client) for client in clients if client in self.clients])


class Place:
    """Of one group: all its requests go to one engine, for the prefix that they share, until that engine fails."""

    def __init__(self, fleet: Fleet, group: str) -> None:
        """`group`: what messages call it."""
        self._fleet = fleet
        self._group = group
        self._client: EngineClient | None = None
        self._failed: list[EngineClient] = []

    async def client(self) -> EngineClient:
        while self._client not in self._fleet.clients:
            found = await self._fleet.least_loaded()
            if self._client not in self._fleet.clients:  # no other request of the group was faster
                self._client = found
        assert self._client is not None
        return self._client

    def answered(self) -> None:
        """A request of the group was answered well."""
        self._failed = []

    def failed(self, client: EngineClient, error: RunError) -> None:
        """The next request goes elsewhere.

        Raises:
            RunError: nobody replaces engines, or too many have failed with this group.
        """
        self._fleet.failed(client, error)
        if client not in self._failed:
            self._failed.append(client)
        if len(self._failed) >= MAX_FAILED_ENGINES:
            raise RunError(
                f"{self._group}: {len(self._failed)} engines failed one after the other with requests of it, "
                f"the last: {error}"
            )
