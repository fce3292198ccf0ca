"""Bring the trainer's weights to the engines, and prove that they arrived."""

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_vespo.config import WeightSyncConfig
from megatron_vespo.orchestration.engine_calls import PARTING_SECONDS, EnginesFailed, Failures, ask_engines
from megatron_vespo.orchestration.policy_group import PolicyGroup
from megatron_vespo.orchestration.supervision import RunFailed, Supervisor
from megatron_vespo.orchestration.weight_receivers import CollectiveReceivers, Receivers, choose_transport, receivers
from megatron_vespo.rollout.client import EngineClient
from megatron_vespo.rollout.engine_http import EngineError
from megatron_vespo.rollout.fused_checksums import compare_ranks
from megatron_vespo.weights.buckets import Bucket
from megatron_vespo.weights.sender import SendTimes

TENSORS_NAMED = 3
"""How many wrong tensors a message names."""


@dataclass(frozen=True)
class SyncReport:
    weight_version: int
    transport: str
    engines: int
    bytes: int
    """Sent to each engine, if nothing is left out (`weight_sync.disk.changed_only`)."""
    buckets: int
    verified: bool
    seconds: dict[str, float]
    """connect (where the engines were not those of the last sync), send, flush, verify: one after the other. Within send,
    side by side: gather (the trainer's rank 0 fills buckets), load (engines receive them and put them in place)."""

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds[name] for name in ("connect", "send", "flush", "verify"))


class WeightUpdater:
    """Of one model in the trainer's processes, as `PolicyGroup.build` made it. After a `sync` that returned, all engines that
    it was given hold those weights.

    Failures of engines are told by EnginesFailed, all others by RunFailed.
    """

    def __init__(
        self,
        policy: PolicyGroup,
        supervisor: Supervisor,
        config: WeightSyncConfig,
        *,
        engine_dtype: str,
        backend: str,
    ) -> None:
        self._policy = policy
        self._supervisor = supervisor
        self._config = config
        self._engine_dtype = engine_dtype
        self._backend = backend
        self.buckets: list[Bucket] = []
        """The plan, made at the first connection."""
        self._engines: list[EngineClient] = []
        """Those that are connected."""
        self._receivers: Receivers | None = None
        self._transport = ""
        self._held: dict[EngineClient, int] = {}
        """The weight version of each engine that a sync brought one; all others are new."""
        self._flushed: set[EngineClient] = set()
        """Engines whose caches hold nothing of before this object's first sync of them."""
        self._abandoned: tuple[list[EngineClient], Receivers] | None = None
        """Engines that are connected to trainer processes that are gone."""
        self.cache_version: int | None = None
        """Oldest weights that may have computed what an engine's prefix cache holds; None: none but the current."""
        self.syncs = 0
        self.mismatches = 0
        """Tensors found different on engines, over all verifications."""

    async def connect(self, engines: Sequence[EngineClient]) -> None:
        """Plan the buckets, and build the groups of trainer and engines.

        Raises:
            EnginesFailed: these engines did not come; nobody is connected then.
        """
        if not self.buckets:
            size = int(self._config.bucket_mb * 2**20)
            plans = await self._policy.on_all("plan the sync", lambda actor, _: actor.plan_sync.remote(size))
            self.buckets = plans[0]
        self._engines = list(engines)
        self._transport = choose_transport(self._config.transport, engines, self._backend, self._policy.address)
        self._receivers = receivers(self._transport, engines, self._backend, self._policy.address)
        transport, names, disk = self._transport, list(self._receivers.names), self._config.disk
        ports = await self._policy.on_first(
            "open the weight transport", lambda actor: actor.open_sender.remote(transport, names, disk)
        )
        if isinstance(self._receivers, CollectiveReceivers):
            await self._join(self._receivers, ports)

    async def _join(self, members: CollectiveReceivers, ports: list[int]) -> None:
        timeout = self._config.timeout_seconds
        sizes, backend = members.world_sizes, self._backend
        trainer = asyncio.ensure_future(
            self._policy.on_first(
                "connect trainer and engines for weights",
                lambda actor: actor.connect_groups.remote(sizes, backend, timeout + PARTING_SECONDS),
                timeout + 2 * PARTING_SECONDS,
            )
        )
        try:
            if failures := await self._each(lambda client: members.join(client, ports), timeout, trainer=trainer):
                await self._give_up(failures, trainer)
            apart: dict[str, str] = await trainer
            if apart:
                failed = {client.name: why for name, why in apart.items() for client in members.of_group(name)}
                await self._give_up(failed, trainer)
        finally:
            trainer.cancel()

    async def disconnect(self) -> None:
        """Take the groups apart, so that others can be built with the same engines and the same trainer processes.

        Engines that do not answer are left as they are.
        """
        if self._receivers is not None:
            await self._part(self._engines, self._receivers)

    def abandon(self) -> None:
        """The trainer's processes are gone, and others in their place: the next `sync` plans and connects anew."""
        if self._receivers is not None:
            self._abandoned = self._engines, self._receivers
        self.buckets, self._engines, self._receivers, self._held = [], [], None, {}

    async def sync(self, weight_version: int, engines: Sequence[EngineClient]) -> SyncReport:
        """Send all weights to `engines` as `weight_version`, empty their prefix caches, and verify when it is due.

        Engines that are not those of the last sync are connected first, and new ones are always verified. With
        `flush_cache` off, an engine's cache is emptied at its first sync: before it the engine may have served another run
        of a grid, whose weights have the same versions.

        Raises:
            EnginesFailed: these engines died, did not answer in time, refused, or hold other weights than were sent. The
                others may hold either weights: call it again for them.
            RunFailed: the trainer failed, or no engine holds what was sent, or there is none.
        """
        if not engines:
            raise RunFailed("weight sync", "there is no engine to bring weights to")
        clock = time.monotonic
        started = clock()
        if self._abandoned is not None:
            (left, members), self._abandoned = self._abandoned, None
            await self._leave([client for client in left if client in engines], members, in_update=True)
        if self._engines != list(engines) or self._receivers is None:
            await self.disconnect()
            await self.connect(engines)
        connected = clock()
        held, self._held = self._held, {}  # after a failure on the way none is known to hold anything
        within = await self._send(
            weight_version, None if set(engines) - set(held) else min(held[client] for client in engines)
        )
        sent = clock()
        new = [client for client in engines if client not in held]
        served = [client for client in engines if client not in self._flushed]
        await self._flush(list(engines) if self._config.flush_cache else served, weight_version)
        self._flushed |= set(engines)
        flushed = clock()
        due = self.syncs % self._config.verify_every == 0
        checked = list(engines) if due else new
        if checked:
            await self._verify(checked, held_elsewhere=bool(set(held) - set(engines)))
        # Last: a sync that failed is made again from its start.
        self.syncs += 1
        self._held = held | dict.fromkeys(engines, weight_version)
        return SyncReport(
            weight_version=weight_version,
            transport=self._transport,
            engines=len(engines),
            bytes=sum(bucket.num_bytes for bucket in self.buckets),
            buckets=len(self.buckets),
            verified=bool(checked),
            seconds={
                "connect": connected - started,
                "send": sent - connected,
                "flush": flushed - sent,
                "verify": clock() - flushed,
                **within,
            },
        )

    async def _send(self, weight_version: int, since: int | None) -> dict[str, float]:
        """`since`: the version that all engines have, if it is known. Returns seconds of gathering and loading."""
        timeout = self._config.timeout_seconds
        trainer = asyncio.ensure_future(
            self._policy.on_all(
                "gather and send weights",
                lambda actor, _: actor.send_weights.remote(weight_version, since),
                timeout + 2 * PARTING_SECONDS,
            )
        )
        try:
            failures, seconds = await self._load(weight_version, trainer)
            if failures:
                await self._give_up(failures, trainer)
            times: list[SendTimes] = await trainer
            return {"gather": times[0].gather, "load": seconds}
        finally:
            trainer.cancel()

    async def _load(self, weight_version: int, trainer: asyncio.Future) -> tuple[Failures, float]:
        """Let engines load bucket after bucket, until the first failure. Returns failures, and the seconds it took."""
        members = self._receivers
        assert members is not None
        deadline, seconds, count = time.monotonic() + self._config.timeout_seconds, 0.0, len(self.buckets)
        taking = asyncio.ensure_future(self._take(0, 0, deadline))
        try:
            failures = await self._each(members.begin, deadline - time.monotonic(), trainer=trainer)
            for index in range(count):
                if failures:
                    return failures, seconds
                described = await taking
                taking = asyncio.ensure_future(self._take(index + 1, index, deadline))  # ready when engines are
                if described is None:
                    continue
                started = time.monotonic()
                version = weight_version if index == count - 1 else None
                load = self._loader(members, self.buckets[index], described, version)
                failures = await self._each(load, deadline - started, trainer=trainer)
                seconds += time.monotonic() - started
            if not failures:
                await taking  # else it might be told last that less was released
                await self._take(count, count, deadline)
        finally:
            taking.cancel()
        return failures or await self._each(members.end, deadline - time.monotonic()), seconds

    async def _take(self, index: int, released: int, deadline: float) -> Any:
        copies = sum(client.ranks for client in self._engines)
        return await self._policy.on_first(
            f"gather bucket {min(index + 1, len(self.buckets))} of {len(self.buckets)}",
            lambda actor: actor.take_bucket.remote(index, copies, released),
            max(deadline - time.monotonic(), 1.0),
        )

    def _loader(
        self, members: Receivers, bucket: Bucket, described: Any, weight_version: int | None
    ) -> Callable[[EngineClient], Awaitable[None]]:
        ends = list(itertools.accumulate(client.ranks for client in self._engines))
        uses = {client: slice(end - client.ranks, end) for client, end in zip(self._engines, ends, strict=True)}
        return lambda client: members.load(client, bucket, described, uses[client], weight_version)

    async def _flush(self, engines: Sequence[EngineClient], weight_version: int) -> None:
        timeout = self._config.timeout_seconds
        if failures := await self._each(lambda client: client.flush_cache(), timeout, engines=engines):
            raise EnginesFailed(failures)
        if self._config.flush_cache:
            self.cache_version = None
        elif self.cache_version is None:
            self.cache_version = weight_version

    async def _verify(self, engines: Sequence[EngineClient], held_elsewhere: bool) -> None:
        """Raises EnginesFailed for engines that hold other weights than the trainer; RunFailed if that is all of them.

        `held_elsewhere`: there are further engines, which got weights before.
        """
        found: dict[EngineClient, list[dict[str, str]]] = {}

        async def ask(client: EngineClient) -> None:
            found[client] = await client.weights_checksum()

        timeout, sizes = self._config.timeout_seconds, {client.ranks for client in engines}
        asking = asyncio.ensure_future(self._each(ask, timeout, engines=engines))  # both sides compute side by side
        try:
            of_size = {ranks: await self._expected_checksums(ranks) for ranks in sizes}
            failures = await asking
        finally:
            asking.cancel()
        wrong = {client.name: compare_ranks(of_size[client.ranks], ranks) for client, ranks in found.items()}
        wrong = {name: differences for name, differences in wrong.items() if differences}
        self.mismatches += sum(len(differences) for differences in wrong.values())
        told = {
            name: f"{len(differences)} tensors are not the trainer's, the first: "
            + "; ".join(differences[:TENSORS_NAMED])
            for name, differences in wrong.items()
        }
        if len(wrong) == len(self._engines) and not held_elsewhere:
            details = "\n".join(f"{name}: {line}" for name, differences in wrong.items() for line in differences)
            raise RunFailed("weight sync", str(EnginesFailed(told)), details=details)
        if failures | told:
            raise EnginesFailed(failures | told)

    async def _expected_checksums(self, ranks: int) -> list[dict[str, str]]:
        dtype = self._engine_dtype
        answers = await self._policy.on_all(
            "checksum the trainer's weights", lambda actor, _: actor.engine_checksums.remote(dtype, ranks)
        )
        return answers[0]

    async def _each(
        self,
        call: Callable[[EngineClient], Awaitable[Any]],
        seconds: float,
        *,
        engines: Sequence[EngineClient] | None = None,
        trainer: asyncio.Future | None = None,
    ) -> Failures:
        asked = self._engines if engines is None else engines
        return await ask_engines(self._supervisor, asked, call, seconds, trainer)

    async def _give_up(self, failures: Failures, trainer: asyncio.Future) -> None:
        """End a sync, or a connection, on both sides, as far as engines answer. Raises EnginesFailed."""
        members = self._receivers
        assert members is not None
        await self._policy.on_first("give up a weight sync", lambda actor: actor.abandon_sync.remote())
        await self._supervisor.wait("come out of a weight sync", trainer, self._config.timeout_seconds, owner="policy")
        others = [client for client in self._engines if client.name not in failures]
        raise EnginesFailed(await self._part(others, members, in_update=True) | failures)

    async def _part(self, engines: Sequence[EngineClient], members: Receivers, *, in_update: bool = False) -> Failures:
        """Let go of the sender, and of `engines`; returns those that do not answer."""
        self._engines, self._receivers = [], None
        await self._policy.on_first("close the weight transport", lambda actor: actor.close_sender.remote())
        return await self._leave(engines, members, in_update=in_update)

    async def _leave(self, engines: Sequence[EngineClient], members: Receivers, *, in_update: bool) -> Failures:
        async def leave(client: EngineClient) -> None:
            for step in (members.end, members.leave) if in_update else (members.leave,):
                try:
                    await step(client)
                except EngineError as error:
                    if error.status is None:
                        raise
                    # It answers, and is in no update or no group: which one, depends on how far it had come.

        return await self._each(leave, PARTING_SECONDS, engines=engines)
