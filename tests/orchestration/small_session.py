"""A session whose engine and grader are played: requests are answered at once, and graded as the prompt's number says.

Sample s of each prompt has 1 + 2 s tokens. Its reward is s; 0 where the prompt's number is divisible by three, so that
each third group is without variance.
"""

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np

from megatron_vespo.config import AlgorithmConfig, CheckpointConfig, RolloutConfig, RoutingConfig
from megatron_vespo.data.prompt import Prompt
from megatron_vespo.orchestration.sampler import Sampler
from megatron_vespo.orchestration.session import Progress, Tally
from megatron_vespo.orchestration.supervision import Supervisor
from megatron_vespo.rollout.engine_output import EngineOutput, WeightSpan
from megatron_vespo.rollout.fleet import Fleet
from megatron_vespo.rollout.gate import Gate
from megatron_vespo.rollout.trajectory import Trajectory

GROUP_SIZE = 2


class Counting:
    """A stream of the natural numbers."""

    dropped_overlong = skipped_excluded = 0

    def __init__(self, position: int = 0):
        self.position = position

    def take(self, count: int) -> list[Prompt]:
        self.position += count
        numbers = range(self.position - count, self.position)
        return [Prompt(str(n), "", np.array([5], dtype=np.int32), 0, None) for n in numbers]

    def state_dict(self) -> dict:
        return {"position": self.position}


class Engine:
    """Answers as soon as `answering` lets it."""

    name, given_version, outstanding_tokens = "engine", 0, 0

    def __init__(self):
        self.gate = Gate()
        self.answering = asyncio.Event()
        self.answering.set()
        self.aborts = 0

    async def generate(self, input_ids, sampling_params, request_ids, **options):
        async with self.gate.through():
            await self.answering.wait()
        return [self._response(name, length=1 + 2 * int(name.split("/")[-1])) for name in request_ids]

    def _response(self, name: str, length: int) -> EngineOutput:
        return EngineOutput(
            request_id=name,
            token_ids=np.array([3] * (length - 1) + [2], dtype=np.int32),
            log_probs=np.full(length, -0.5, dtype=np.float32),
            finish_reason="stop",
            finish_detail="",
            weight_spans=(WeightSpan(str(self.given_version), 0, length),),
            cached_tokens=0,
            retractions=0,
        )

    async def abort_all(self):
        self.aborts += 1
        self.answering.set()


class Grader:
    async def grade(self, trajectories: list[Trajectory]) -> None:
        for trajectory in trajectories:
            trajectory.reward = float(trajectory.sample if int(trajectory.prompt.identity) % 3 else 0)
            trajectory.outcome = "graded"

    def replies_to(self, prompt: Prompt) -> bool:
        return False


async def never() -> None:
    await asyncio.Event().wait()


def session_of(engine: Engine, **algorithm) -> Any:
    """One before its first step. `algorithm`: settings. Rows that it records are in its `rows`."""
    settings = AlgorithmConfig.model_validate({"steps": 8, "prompts_per_step": 2} | algorithm)
    rollout = RolloutConfig(group_size=GROUP_SIZE, max_response_tokens=4, concurrent_groups=3)
    tokenizer = SimpleNamespace(stop_token_ids=[2], decode_response=str, ids_beyond=lambda ids: 0)
    console = SimpleNamespace(phase=lambda *told: None, progress=lambda *told: None, event=lambda told: None)
    played: Any = SimpleNamespace(engine=engine, grader=Grader(), tokenizer=tokenizer, console=console)
    sampler = Sampler(
        Fleet([played.engine]), played.grader, played.tokenizer, 10, rollout, Supervisor(), played.console
    )
    rows: list[dict] = []
    return SimpleNamespace(
        config=SimpleNamespace(
            algorithm=settings,
            rollout=rollout,
            routing=RoutingConfig(),
            policy=SimpleNamespace(reference=None),
            checkpoint=CheckpointConfig(export_every=3),
            seed=1,
        ),
        engines=SimpleNamespace(weight_version=0, waiting=[], came_back=never),
        sampler=sampler,
        progress=Progress(),
        prompts=Counting(),
        weights=SimpleNamespace(cache_version=None),
        console=console,
        routing_shape=None,
        tally=Tally(),
        writers=[],
        rows=rows,
        record=lambda kind, step, values: rows.append({"kind": kind, "step": step} | values),
    )
