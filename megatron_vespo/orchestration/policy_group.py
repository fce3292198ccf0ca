"""The trainer as the loops see it: all ranks as one."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray import ObjectRef

from megatron_vespo.checkpoint.hf_config import Architecture
from megatron_vespo.config import ObjectiveConfig, SFTConfig, TrainConfig
from megatron_vespo.orchestration.cluster import actor_options
from megatron_vespo.orchestration.policy_rank import PolicyRank
from megatron_vespo.orchestration.runtime import Runtime
from megatron_vespo.orchestration.supervision import all_of, from_part
from megatron_vespo.policy.batch import MicroBatch, TrainingSequence
from megatron_vespo.policy.layout_fit import packing_rules
from megatron_vespo.policy.packing import pack_step, report_packing
from megatron_vespo.policy.result import StepResult, TokenScores, merge
from megatron_vespo.routing.routes import Routes
from megatron_vespo.routing.slices import RankPlace, StepRoutes, assemble_routes, slice_routes
from megatron_vespo.weights.slots import remove_slots

PART = "policy"


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


def _in_order(sequences: list[TrainingSequence], parts: list[dict[int, TokenScores]]) -> list[TokenScores]:
    by_key = {key: scores for part in parts for key, scores in part.items()}
    return [by_key[sequence.key] for sequence in sequences]


class PolicyGroup:
    def __init__(self, ranks: int, runtime: Runtime, gpus_per_rank: int) -> None:
        """Starts the processes; there is a model once `build` was awaited."""
        self._supervisor = runtime.supervisor
        runtime.on_stop(PART, self.stop)
        options = actor_options(gpus_per_rank)
        # What serves shared memory keeps a socket there.
        options["runtime_env"] = {"env_vars": options["runtime_env"]["env_vars"] | {"TMPDIR": str(runtime.scratch)}}
        self.ranks = [
            PolicyRank.options(**options).remote(rank)  # pyright: ignore[reportAttributeAccessIssue]
            for rank in range(ranks)
        ]
        self._processes: list[int] = []
        for rank, actor in enumerate(self.ranks):
            runtime.supervisor.watch(f"{PART} rank {rank}", actor.hold.remote())

    async def build(
        self, config: TrainConfig | SFTConfig, architecture: Architecture, total_steps: int, temperature: float
    ) -> None:
        """Build the model of `config` (of as many ranks as were started) and load its weights: at first, and again
        whenever another run shall use these processes."""
        self._timeout_seconds = config.policy.step_timeout_seconds
        self._packing = packing_rules(architecture, config.policy)
        port = await self.on_first("open the trainer's port", lambda actor: actor.listen_for_ranks.remote())
        self._processes = await self.on_all("start policy", lambda actor, _: actor.process.remote())
        self._shape = architecture.routing_shape
        self._places: list[RankPlace] = await self.on_all(
            "start policy", lambda actor, _: actor.build.remote(port, config, total_steps, temperature)
        )

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
        results = await self.on_all(
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
        answers = await self.on_all(
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
        parts = await self.on_all(
            "score sequences", lambda actor, rank: actor.score.remote(*sent.of_rank(rank), with_entropy, reference)
        )
        return _in_order(sequences, parts)

    async def score_and_record(
        self, sequences: list[TrainingSequence], weight_version: int, routes: RecordedRoutes | None = None
    ) -> tuple[list[TokenScores], list[Routes]]:
        """As `score`, and the experts that were used. `weight_version`: what the current weights are called."""
        step = pack_step(sequences, self._packing)
        sent = await self._send(step, routes)
        answers = await self.on_all(
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
        """
        calls = [from_part(f"{PART} rank {rank}", call(actor, rank)) for rank, actor in enumerate(self.ranks)]
        return await self._supervisor.wait(what, all_of(*calls), seconds or self._timeout_seconds)

    async def on_first(self, what: str, call: Callable[[Any], ObjectRef], seconds: float | None = None) -> Any:
        """`call(actor)` on rank 0 alone; `seconds` as in `on_all`."""
        answer = from_part(f"{PART} rank 0", call(self.ranks[0]))
        return await self._supervisor.wait(what, answer, seconds or self._timeout_seconds)

    async def stop(self) -> None:
        """Of what ranks hold, only buckets of weights in shared memory would outlive them."""
        for actor in self.ranks:
            ray.kill(actor)
        for process in self._processes:
            remove_slots(process)
