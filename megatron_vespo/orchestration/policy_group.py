"""The trainer as the loops see it: all ranks as one."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import ray
from ray import ObjectRef

from megatron_vespo.architecture.hf_config import Architecture
from megatron_vespo.architecture.layout_fit import packing_rules
from megatron_vespo.config import ObjectiveConfig, SFTConfig, TrainConfig
from megatron_vespo.errors import RunError
from megatron_vespo.orchestration.hosts import Host
from megatron_vespo.orchestration.places import Places
from megatron_vespo.orchestration.policy_rank import PolicyRank
from megatron_vespo.orchestration.runtime import Runtime
from megatron_vespo.orchestration.supervision import Expired, RunFailed, from_part
from megatron_vespo.packing.batch import MicroBatch, TrainingSequence
from megatron_vespo.packing.steps import pack_step, report_packing
from megatron_vespo.policy.result import StepResult, TokenScores, merge
from megatron_vespo.routing.routes import Routes
from megatron_vespo.routing.slices import RankPlace, StepRoutes, assemble_routes, slice_routes

PART = "policy"
ANSWER_SECONDS = 20.0
"""How long a rank may take to answer whether it is there. It does so beside its work."""

T = TypeVar("T")


class PolicyLost(RunFailed):
    """Ranks died, or stand still: the model that they held together is gone."""


@dataclass(frozen=True)
class RecordedRoutes:
    """Of whole sequences, for one pass of the trainer."""

    of_sequences: Mapping[int, Routes]
    """By key; a sequence without any is routed natively."""
    replay: bool = True
    """False: routers choose by themselves and are only compared with these."""
    measure: bool = False
    """Tell how they agree with the routers' own choice (`StepResult.routing`)."""


@dataclass(frozen=True)
class _Sent:
    """References of what each rank gets, and how many bytes of routes these are; none where there are no routes."""

    shares: list[ObjectRef]
    routes: list[ObjectRef | None]
    route_bytes: list[int]

    def of_rank(self, rank: int) -> tuple[ObjectRef, ObjectRef | None]:
        return self.shares[rank], self.routes[rank]


def _name(rank: int) -> str:
    return f"{PART} rank {rank}"


def _in_order(sequences: list[TrainingSequence], parts: list[dict[int, TokenScores]]) -> list[TokenScores]:
    by_key = {key: scores for part in parts for key, scores in part.items()}
    return [by_key[sequence.key] for sequence in sequences]


class PolicyGroup:
    def __init__(self, runtime: Runtime, gpus_per_rank: int, places: Places) -> None:
        """Starts the processes; there is a model once `build` was awaited."""
        self._supervisor = runtime.supervisor
        self._placement = places
        self._hosts = places.ranks
        self._gpus_per_rank = gpus_per_rank
        self._recover: Callable[[PolicyLost], Awaitable[None]] | None = None
        self.starts = 0
        """How often processes were started: what was given to earlier ones is gone."""
        runtime.on_stop(PART, self.stop)
        self._processes: list[int] = []
        self._start()
        self._watch()

    @property
    def address(self) -> str:
        """Where rank 0 listens."""
        return self._hosts[0].interface.address

    def _start(self) -> None:
        self.ranks = [
            PolicyRank.options(**self._options(host)).remote(  # pyright: ignore[reportAttributeAccessIssue]
                rank, str(host.parts), self.address
            )
            for rank, host in enumerate(self._hosts)
        ]
        self.starts += 1
        self._holds = [actor.hold.remote() for actor in self.ranks]

    def _options(self, host: Host) -> dict[str, Any]:
        options = host.actor_options(self._gpus_per_rank)
        # What serves shared memory keeps a socket there.
        options["runtime_env"]["env_vars"] |= {"TMPDIR": str(host.scratch)}
        return options

    def _watch(self) -> None:
        for rank, hold in enumerate(self._holds):
            self._supervisor.watch(_name(rank), hold)

    async def build(
        self, config: TrainConfig | SFTConfig, architecture: Architecture, total_steps: int, temperature: float
    ) -> None:
        """Build the model of `config` (of as many ranks as were started) and load its weights: at first, and again
        whenever another run shall use these processes."""
        self._built_as = (config, architecture, total_steps, temperature)
        self._timeout_seconds = config.policy.step_timeout_seconds
        self._packing = packing_rules(architecture, config.policy)
        seconds = config.policy.startup_timeout_seconds
        port = await self.on_first("open the trainer's port", lambda actor: actor.listen_for_ranks.remote(), seconds)
        self._processes = await self.on_all("start policy", lambda actor, _: actor.process.remote(), seconds)
        self._shape = architecture.routing_shape
        self._places: list[RankPlace] = await self.on_all(
            "start policy",
            lambda actor, _: actor.build.remote(port, config, total_steps, temperature),
            seconds,
        )

    async def find_room(self) -> None:
        """For the next `restart`, on the hosts that are left. Raises RunFailed where there is not enough."""
        await self._placement.look()

    async def restart(self) -> None:
        """New processes in place of all that there were, alive or not, with the model as it was built at first.

        They come when Ray has freed the room of the old ones, which it ends by force where they stand still.
        """
        await self.stop()
        self._hosts = self._placement.ranks
        self._start()
        await self.build(*self._built_as)

    @contextmanager
    def recovering(self, recover: Callable[[PolicyLost], Awaitable[None]]) -> Iterator[None]:
        """Inside, a call that loses ranks calls `recover`, which brings the policy back to where it was before that call
        (or raises), and is then made again. A loss ends no wait for other parts: it is seen by the next call."""
        self._recover = recover
        self._supervisor.forget(PART)
        try:
            yield
        finally:
            self._recover = None
            self._watch()

    async def retried(self, unit: Callable[[], Awaitable[T]]) -> T:
        """The result of `unit`, some calls on the policy that are made again from the first where ranks are lost in them.

        `unit` must leave no trace when it fails. While the policy is being brought back, or where nobody would, it is
        called once.
        """
        while True:
            try:
                return await unit()
            except RunError as failure:
                if (recover := self._recover) is None or (lost := await self.lost(failure)) is None:
                    raise
            self._recover = None
            try:
                await recover(lost)
            finally:
                self._recover = recover

    async def lost(self, failure: RunError) -> PolicyLost | None:
        """What `failure` comes from: ranks that died or stand still; None if all are well, and it has another cause.

        Asked of the ranks themselves: peers of a dead rank, and engines that it sent weights to, often fail first.
        """
        causes = await asyncio.gather(*(self._ask(actor) for actor in self.ranks))
        for rank, cause in enumerate(causes):
            if cause is not None:
                return PolicyLost(_name(rank), cause, details=failure.details)
        return failure if isinstance(failure, PolicyLost) else None

    async def _ask(self, actor: Any) -> str | None:
        """Why this rank does not answer; None if it does."""
        try:
            await asyncio.wait_for(from_part(PART, actor.answer.remote()), ANSWER_SECONDS)
        except RunFailed as died:
            return died.cause
        except TimeoutError:
            return f"does not answer for {ANSWER_SECONDS:.0f} s (stopped, or it hangs)"
        return None

    async def train_step(
        self,
        sequences: list[TrainingSequence],
        objective: ObjectiveConfig | None,
        routes: RecordedRoutes | None = None,
    ) -> StepResult:
        """One optimizer step on `sequences`, whose keys are 0 .. n - 1; merged over ranks.

        `objective` None is supervised training.
        """
        step = pack_step(sequences, self._packing)
        sent = await self._send(step, routes)
        results = await self._tried_on_all(
            "train a step", lambda actor, rank: actor.train_step.remote(*sent.of_rank(rank), objective)
        )
        return replace(
            merge(results), packing=report_packing(step, self._packing), route_bytes_of_ranks=sent.route_bytes
        )

    async def gradient_norm(
        self, sequences: list[TrainingSequence], objective: ObjectiveConfig, routes: RecordedRoutes | None = None
    ) -> tuple[float, int]:
        """Norm of the gradient that a step on `sequences` alone would have, and the denominator of its loss."""
        sent = await self._send(pack_step(sequences, self._packing), routes)
        answers = await self._tried_on_all(
            "measure a gradient", lambda actor, rank: actor.gradient_norm.remote(*sent.of_rank(rank), objective)
        )
        return answers[0]

    async def score(
        self,
        sequences: list[TrainingSequence],
        *,
        with_entropy: bool = False,
        reference: bool = False,
        routes: RecordedRoutes | None = None,
    ) -> list[TokenScores]:
        """Of each sequence's labels, in the order of `sequences`, whose keys are 0 .. n - 1.

        `reference`: under the frozen weights of `policy.reference` instead of the current ones.
        """
        sent = await self._send(pack_step(sequences, self._packing), routes)
        parts = await self._tried_on_all(
            "score sequences", lambda actor, rank: actor.score.remote(*sent.of_rank(rank), with_entropy, reference)
        )
        return _in_order(sequences, parts)

    async def score_and_record(
        self, sequences: list[TrainingSequence], weight_version: int, routes: RecordedRoutes | None = None
    ) -> tuple[list[TokenScores], list[Routes]]:
        """As `score`, and the experts that were used. `weight_version`: what the current weights are called."""
        step = pack_step(sequences, self._packing)
        sent = await self._send(step, routes)
        answers = await self._tried_on_all(
            "score sequences and record their routes",
            lambda actor, rank: actor.score_and_record.remote(*sent.of_rank(rank)),
        )
        # A pipeline stage of dense layers alone has recorded nothing.
        slices = [(place, own) for place, (_, own) in zip(self._places, answers, strict=True) if place.moe_layers]
        recorded = await asyncio.to_thread(assemble_routes, step, slices, self._shape, weight_version)
        return _in_order(sequences, [scores for scores, _ in answers]), [recorded[s.key] for s in sequences]

    async def _send(self, step: list[list[MicroBatch]], routes: RecordedRoutes | None) -> "_Sent":
        """Each rank's share of a step, and of its routes what the rank needs, into Ray's object store."""
        if routes is None:
            return self._put(step, None)
        return await asyncio.to_thread(self._put, step, routes)  # large: requests to the engine go on meanwhile

    def _put(self, step: list[list[MicroBatch]], routes: RecordedRoutes | None) -> "_Sent":
        shares = [ray.put(share) for share in step]
        places = self._places
        if routes is None:
            return _Sent([shares[place.share] for place in places], [None] * len(places), [])
        slices = [slice_routes(step[place.share], routes.of_sequences, place, self._shape) for place in places]
        return _Sent(
            [shares[place.share] for place in places],
            [ray.put(StepRoutes(own, routes.replay, routes.measure)) for own in slices],
            [sum(one.num_bytes for one in own) for own in slices],
        )

    async def on_all(self, what: str, call: Callable[[Any, int], ObjectRef], seconds: float | None = None) -> list:
        """`call(actor, rank)` on every rank; all answers in their order.

        `seconds`: the deadline; None: `policy.step_timeout_seconds`.

        Raises:
            PolicyLost: the deadline passed.
            RunFailed: as `Supervisor.wait`.
        """
        calls = {_name(rank): call(actor, rank) for rank, actor in enumerate(self.ranks)}
        return await self._answers(what, calls, seconds)

    async def _tried_on_all(self, what: str, call: Callable[[Any, int], ObjectRef]) -> list:
        return await self.retried(lambda: self.on_all(what, call))

    async def on_first(self, what: str, call: Callable[[Any], ObjectRef], seconds: float | None = None) -> Any:
        """`call(actor)` on rank 0 alone. `seconds` and what is raised as in `on_all`."""
        (answer,) = await self._answers(what, {_name(0): call(self.ranks[0])}, seconds)
        return answer

    async def _answers(self, what: str, calls: dict[str, ObjectRef], seconds: float | None) -> list:
        try:
            return await self._supervisor.answers(what, calls, seconds or self._timeout_seconds)
        except Expired as expired:
            raise PolicyLost(what, expired.cause, expired.details) from None

    async def stop(self) -> None:
        """Of what ranks hold, only buckets of weights in shared memory would outlive them."""
        for actor in self.ranks:
            ray.kill(actor)
        for host in dict.fromkeys(self._hosts):
            host.remove_slots([pid for pid, its in zip(self._processes, self._hosts, strict=False) if its == host])
