"""Figures of the routing probe are means over the tokens that the engine sampled, not over what an environment said."""

import asyncio
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_labels_and_advantages_meet_their_tokens import trajectory

from megatron_vespo.orchestration.routing_probe import probe_batch
from megatron_vespo.policy.result import TokenScores
from megatron_vespo.rollout.trajectory import Group
from megatron_vespo.routing.routes import RoutingShape, recorded_routes

SHAPE = RoutingShape(moe_layers=(True,), topk=1, num_experts=4)
NATIVE, REPLAYED = 0.25, -0.5
"""How much higher the trainer's log-prob of each token is than the engine's."""


def conversation():
    """Of two turns: five tokens between them are an environment's."""
    made = trajectory([7, 8], [20, 1, 50, 51, 52, 53, 54, 21, 1])
    made.sampled = np.array([True] * 2 + [False] * 5 + [True] * 2)
    made.behavior_log_probs = np.where(made.sampled, np.float32(-1.5), np.float32(0))
    made.engine_routes = recorded_routes(np.zeros((10, 1, 1), dtype=np.uint8), 0)
    return made


class Trainer:
    """Scores each position, also those of the prompt and of what was said."""

    def scores(self, sequences, difference):
        return [
            TokenScores(torch.full((len(s.token_ids) - 1,), -1.5 + difference), torch.zeros(len(s.token_ids) - 1))
            for s in sequences
        ]

    async def score_and_record(self, sequences, version):
        routes = [recorded_routes(np.zeros((len(s.token_ids) - 1, 1, 1), dtype=np.uint8), 0) for s in sequences]
        return self.scores(sequences, NATIVE), routes

    async def score(self, sequences, routes):
        return self.scores(sequences, REPLAYED)


def test_tokens_of_an_environment_count_in_no_mean(tmp_path):
    one = conversation()
    session = SimpleNamespace(
        routing_shape=SHAPE,
        config=SimpleNamespace(routing=SimpleNamespace(probe_trajectories=1)),
        console=SimpleNamespace(phase=lambda told: None),
        progress=SimpleNamespace(step=0),
        policy=Trainer(),
        folder=tmp_path,
    )
    figures = asyncio.run(probe_batch(session, [Group(one.prompt, [one])]))  # type: ignore[arg-type]
    for kind, difference in (("native", NATIVE), ("replayed", REPLAYED)):
        assert figures[f"routing_probe/{kind}/mean_abs"] == pytest.approx(abs(difference), rel=1e-6)
        k3 = math.exp(difference) - 1 - difference
        assert figures[f"routing_probe/{kind}/k3"] == pytest.approx(k3, rel=1e-5)
