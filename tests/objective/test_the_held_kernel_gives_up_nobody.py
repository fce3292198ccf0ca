"""examples/lab/held_vespo.py against its formula, in plain Python."""

import math

import pytest
from packed_batches import batch, loss_and_gradient

from megatron_vespo.config import ObjectiveConfig


def test_the_coefficient_is_that_of_the_weight_held_to_a_band():
    held = {"name": "custom", "function": "examples.lab.held_vespo:held", "options": {"low": -1.0, "high": 0.5}}
    data = batch(3, spread=1.5)
    _, gradient, _ = loss_and_gradient(ObjectiveConfig(kernel=held), data)
    tokens = int(data.response_mask.sum())
    outside = 0
    for index, (start, stop) in enumerate(data.bounds()):
        chosen = [t for t in range(start, stop) if data.response_mask[t]]
        log_weight = sum(float(data.log_probs[t] - data.old_log_probs[t]) for t in chosen)
        outside += not -1.0 <= log_weight <= 0.5
        weight, advantage = math.exp(min(max(log_weight, -1.0), 0.5)), float(data.advantages[index])
        c1, c2 = (2, 3) if advantage >= 0 else (3, 2)
        pull = weight**c1 * math.exp(c2 * (1 - weight)) * advantage / tokens
        for t in range(start, stop):
            assert float(gradient[t]) == pytest.approx(-pull if t in chosen else 0.0, rel=1e-9)
    assert 1 < outside < len(data.lengths)
