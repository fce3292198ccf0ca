"""Prompts, and groups collected from an engine."""

from typing import Any

import numpy as np

from megatron_vespo.config import RolloutConfig
from megatron_vespo.data.prompt import Prompt
from megatron_vespo.rollout.generate import generate_groups
from megatron_vespo.rollout.trajectory import Group


def random_prompts(count: int, seed: int = 0, low: int = 4, high: int = 299) -> list[Prompt]:
    rng = np.random.default_rng(seed)
    return [
        Prompt(
            identity=f"random/{seed}/{i}",
            text="",
            token_ids=rng.integers(low, high, size=rng.integers(3, 40), dtype=np.int32),
            source=0,
            reference=None,
        )
        for i in range(count)
    ]


def settings_of(engine) -> dict[str, Any]:
    """Arguments of `generate_groups`, of an engine that holds weights 0."""
    common = {"stop_token_ids": [2], "run_seed": 5, "batch_index": 0, "weight_version": 0}
    return common | {"vocab_size": engine.vocab_size}


def collect(engine, prompts: list[Prompt], rollout: RolloutConfig, **changes) -> dict[str, Group]:
    """Groups by the identity of their prompt."""
    settings = settings_of(engine) | changes

    async def gather() -> dict[str, Group]:
        stream = generate_groups(engine.fleet, prompts, rollout, **settings)
        return {group.prompt.identity: group async for group in stream}

    return engine.run(gather())


def sampled(groups: dict[str, Group]) -> dict[tuple[str, int], tuple[bytes, bytes]]:
    """Bit patterns of tokens and log-probs of each sample."""
    return {
        (identity, t.sample): (t.response_ids.tobytes(), t.behavior_log_probs.tobytes())
        for identity, group in groups.items()
        for t in group.trajectories
    }
