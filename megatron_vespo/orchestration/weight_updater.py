"""Bring the trainer's weights to the engine, and prove that they arrived."""

import time
from collections.abc import Awaitable
from dataclasses import dataclass

from megatron_vespo.config import WeightSyncConfig
from megatron_vespo.orchestration.cluster import LOOPBACK
from megatron_vespo.orchestration.policy_group import PolicyGroup
from megatron_vespo.orchestration.policy_rank import WEIGHT_GROUP
from megatron_vespo.orchestration.supervision import RunFailed, Supervisor, all_of
from megatron_vespo.rollout.client import EngineClient, EngineError
from megatron_vespo.rollout.fused_checksums import compare_checksums
from megatron_vespo.weights.buckets import Bucket, plan_buckets


@dataclass(frozen=True)
class SyncReport:
    weight_version: int
    bytes: int
    buckets: int
    verified: bool
    seconds: dict[str, float]
    """send (with gathering), flush, verify."""


class WeightUpdater:
    def __init__(
        self,
        policy: PolicyGroup,
        client: EngineClient,
        supervisor: Supervisor,
        config: WeightSyncConfig,
        *,
        engine_ranks: int,
        engine_dtype: str,
        backend: str,
    ) -> None:
        self._policy = policy
        self._client = client
        self._supervisor = supervisor
        self._config = config
        self._engine_ranks = engine_ranks
        self._engine_dtype = engine_dtype
        self._backend = backend
        self._buckets: list[Bucket] = []
        self.weight_version: int | None = None
        """That the engine holds, as far as this object brought it there."""
        self.cache_version: int | None = None
        """Oldest weights that may have computed what the engine's prefix cache holds; None: none but the current."""
        self._abandoned = False
        self._updating = False
        """An update was begun on the engine and not ended."""
        self._verified_once = False
        """Of this engine; a resumed run counts on where it was, but meets a new one."""
        self.syncs = 0
        self.mismatches = 0
        """Tensors found different on the engine, over all verifications."""

    async def connect(self) -> None:
        """Build the group of trainer and engine, and plan the buckets."""
        port = await self._policy.on_first("open the weight group", lambda actor: actor.listen_for_engines.remote())
        world_size, timeout = self._engine_ranks + 1, self._config.timeout_seconds
        joining = all_of(
            self._policy.on_first(
                "connect the weight group",
                lambda actor: actor.connect_engines.remote(world_size, self._backend, timeout),
            ),
            self._client.init_weights_update_group(
                master_address=LOOPBACK,
                master_port=port,
                rank_offset=1,
                world_size=world_size,
                group_name=WEIGHT_GROUP,
                backend=self._backend,
            ),
        )
        await self._supervisor.wait("connect trainer and engine for weights", joining, timeout)
        specs = await self._policy.on_all("list the tensors", lambda actor, _: actor.tensor_specs.remote())
        self._buckets = plan_buckets(specs[0], int(self._config.bucket_mb * 2**20))
        self._abandoned = False

    def abandon(self) -> None:
        """The trainer's processes are gone. Their group is taken apart on the engine, and another one built, by the next
        `sync`."""
        self._abandoned = True

    async def _reconnect(self) -> None:
        await self._supervisor.wait(
            "take the old weight group apart", self._leave_on_engine(), self._config.timeout_seconds
        )
        await self.connect()

    async def _leave_on_engine(self) -> None:
        if self._updating:
            await _whether_or_not(self._client.end_weight_update())
            self._updating = False
        await _whether_or_not(self._client.destroy_weights_update_group(WEIGHT_GROUP))

    async def disconnect(self) -> None:
        """Take the group apart, so that another can be built with the same engine and the same trainer processes."""
        leaving = [self._leave_on_engine()]
        if not self._abandoned:
            calling = self._policy.on_first("leave the weight group", lambda actor: actor.disconnect_engines.remote())
            leaving.append(calling)
        await self._supervisor.wait("part trainer and engine", all_of(*leaving), self._config.timeout_seconds)

    async def sync(self, weight_version: int) -> SyncReport:
        """Send all weights as `weight_version`, empty the engine's prefix cache, and verify when it is due.

        With `flush_cache` off the cache is emptied once, at the first sync: before it the engine may have served another
        run of a grid, whose weights have the same versions.

        Raises:
            RunFailed: a tensor on the engine is not the trainer's; the message names the first of them.
        """
        clock, timeout = time.monotonic, self._config.timeout_seconds
        started = clock()
        if self._abandoned:
            await self._reconnect()
        await self._supervisor.wait("send weights", self._send(weight_version), timeout)
        sent = clock()
        if self._config.flush_cache or self.weight_version is None:
            await self._supervisor.wait("flush the engine's caches", self._client.flush_cache(), timeout)
            self.cache_version = None if self._config.flush_cache else weight_version
        flushed = clock()
        due = self.syncs % self._config.verify_every == 0
        if due or not self._verified_once:
            await self.verify()
            self._verified_once = True
        # Last: a sync that failed is made again from its start where it was the trainer that was lost.
        self.syncs += 1
        self.weight_version = weight_version
        return SyncReport(
            weight_version=weight_version,
            bytes=sum(bucket.num_bytes for bucket in self._buckets),
            buckets=len(self._buckets),
            verified=due,
            seconds={"send": sent - started, "flush": flushed - sent, "verify": clock() - flushed},
        )

    async def _send(self, weight_version: int) -> None:
        self._updating = True
        await self._client.begin_weight_update()
        await all_of(
            self._policy.on_all("gather weights", lambda actor, _: actor.send_weights.remote(self._buckets)),
            self._receive(weight_version),
        )
        await self._client.end_weight_update()
        self._updating = False

    async def _receive(self, weight_version: int) -> None:
        for bucket in self._buckets:
            await self._client.update_weights_from_distributed(
                names=[spec.name for spec in bucket.specs],
                dtypes=[spec.dtype for spec in bucket.specs],
                shapes=[list(spec.shape) for spec in bucket.specs],
                group_name=WEIGHT_GROUP,
                weight_version=str(weight_version),
            )

    async def verify(self) -> None:
        expected = await self._policy.on_all(
            "checksum the trainer's weights", lambda actor, _: actor.engine_checksums.remote(self._engine_dtype)
        )
        found = await self._supervisor.wait(
            "checksum the engine's weights", self._client.weights_checksum(), self._config.timeout_seconds
        )
        differences = compare_checksums(expected[0], found)
        self.mismatches += len(differences)
        if differences:
            raise RunFailed(
                "weight sync",
                f"{len(differences)} tensors on the engine are not the trainer's, the first: {differences[0]}",
                details="\n".join(differences),
            )


async def _whether_or_not(taking_apart: Awaitable[None]) -> None:
    """What an update that broke off had not begun yet cannot be ended, and the engine says so."""
    try:
        await taking_apart
    except EngineError as error:
        if error.status != 200:
            raise
