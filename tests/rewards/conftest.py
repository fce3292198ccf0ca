"""Trajectories to grade, and pools that grade them."""

from collections.abc import Callable

import numpy as np
import pytest

from megatron_vespo.config import DataConfig, FileSource, RewardConfig
from megatron_vespo.data.prompt import Prompt
from megatron_vespo.rewards.pool import RewardPool
from megatron_vespo.rollout.trajectory import Trajectory


@pytest.fixture(scope="session")
def trajectory() -> Callable[..., Trajectory]:
    def make(text: str, reference: object = None, source: int = 0, sample: int = 0) -> Trajectory:
        prompt = Prompt("prompt", "question", np.zeros(1, np.int32), source, reference or {"answer": "yes"})
        empty = np.zeros(0, np.float32)
        return Trajectory(prompt, sample, np.zeros(0, np.int32), empty, [], "stop", text=text)

    return make


@pytest.fixture(scope="session")
def misbehaving() -> DataConfig:
    return DataConfig(sources=(FileSource(type="file", path="unused.jsonl", scorer="graders:misbehave"),))


@pytest.fixture(scope="module")
def pool(misbehaving):
    with RewardPool(RewardConfig(timeout_seconds=1.0, memory_limit_mb=1024, on_failure=-0.5), misbehaving) as running:
        yield running
