"""Responses from the engine, decoded and graded: what training batches and evaluations have in common."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_vespo.config import RolloutConfig
from megatron_vespo.data.prompt import Prompt
from megatron_vespo.data.tokenizer import ChatTokenizer
from megatron_vespo.objective.advantages import without_variance
from megatron_vespo.observability.console import RunConsole
from megatron_vespo.orchestration.mini_batches import rewards_of
from megatron_vespo.orchestration.supervision import Supervisor
from megatron_vespo.rewards.pool import OUTCOMES, RewardPool
from megatron_vespo.rollout.fleet import Fleet
from megatron_vespo.rollout.segments import Response
from megatron_vespo.rollout.trajectory import Group, Trajectory, fingerprint


@dataclass
class Sampler:
    fleet: Fleet
    grader: RewardPool
    tokenizer: ChatTokenizer
    vocab_size: int
    rollout: RolloutConfig
    supervisor: Supervisor
    console: RunConsole

    async def collect(self, stream: AsyncIterator[Group], prompts: list[Prompt]) -> tuple[list[Group], float, float]:
        """Grade each group of `stream` while others are still sampled.

        Returns:
            The groups in the order of `prompts` (never of completion, so that a run can be repeated), the seconds
            until the last was sampled, and the seconds that grading took beyond that.
        """
        groups: dict[str, Group] = {}
        grading: list[asyncio.Task] = []
        started = time.monotonic()

        async def receive() -> None:
            tokens = 0
            async for group in stream:
                tokens += sum(trajectory.sampled_tokens for trajectory in group.trajectories)
                groups[group.prompt.identity] = group
                grading.append(asyncio.create_task(self.grade(group)))
                self.console.progress(len(groups), len(prompts), "groups", f"{tokens:,} tokens")

        waves = -(-len(prompts) // self.rollout.concurrent_groups)
        timeout = waves * self.rollout.engine.request_timeout_seconds
        try:
            await self.supervisor.wait("generate responses", receive(), timeout, owner="engines")
            sampled = time.monotonic()
            await self.supervisor.wait("grade responses", asyncio.gather(*grading), timeout, owner="graders")
        finally:
            for task in grading:
                task.cancel()
        ordered = [groups[prompt.identity] for prompt in prompts]
        return ordered, sampled - started, time.monotonic() - sampled

    async def answer(self, response: Response) -> NDArray[np.int32] | None:
        """What the environment of its prompt says to a response so far, as token ids (`generation.Environment`)."""
        if not self.grader.replies_to(response.prompt) or response.turns >= self.rollout.max_turns:
            return None
        said = await self.grader.reply(response.prompt, self.tokenizer.decode_response(response.token_ids))
        return self.tokenizer.observation_ids(said) if said else None

    async def grade(self, group: Group) -> None:
        """Decode and grade its responses, in place."""
        for trajectory in group.trajectories:
            trajectory.text = self.tokenizer.decode_response(trajectory.response_ids)
        await self.grader.grade(group.trajectories)

    def describe(self, groups: list[Group]) -> dict[str, Any]:
        """Figures of rewards and responses. The rewards are to be the task's: describe them before they are shaped."""
        trajectories = [t for group in groups for t in group.trajectories]
        rewards = np.array([t.reward for t in trajectories])
        lengths = np.array([t.sampled_tokens for t in trajectories])
        outcomes = Counter(t.outcome for t in trajectories)
        return {
            "reward/mean": float(rewards.mean()),
            "reward/std": float(rewards.std()),
            "reward/groups_without_variance": float(np.mean(without_variance(rewards_of(groups)))),
            **{f"reward/outcome/{kind}": outcomes[kind] for kind in OUTCOMES},
            "response/length_mean": float(lengths.mean()),
            "response/length_p10": float(np.quantile(lengths, 0.1)),
            "response/length_p90": float(np.quantile(lengths, 0.9)),
            "response/length_max": int(lengths.max()),
            "response/truncated_share": float(np.mean([t.truncated for t in trajectories])),
            "response/tokens": int(lengths.sum()),
            **self._turns(trajectories),
            "response/fingerprint": fingerprint(groups),
            "response/ids_beyond_tokenizer": sum(self.tokenizer.ids_beyond(t.response_ids) for t in trajectories),
        }

    def _turns(self, trajectories: list[Trajectory]) -> dict[str, float]:
        """Figures of tasks with an environment."""
        if not any(self.grader.replies_to(t.prompt) for t in trajectories):
            return {}
        answers = [np.count_nonzero(np.diff(t.sampled.astype(np.int8)) == 1) for t in trajectories]
        return {
            "response/turns_mean": 1 + float(np.mean(answers)),
            "response/observed_tokens": sum(len(t.response_ids) - t.sampled_tokens for t in trajectories),
            "response/environment_failures": self.grader.failed_replies,
        }
