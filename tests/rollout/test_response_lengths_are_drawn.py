"""`rollout.response_length`: every response is as long as its draw, whatever happens on the way."""

import hashlib
import math

import numpy as np
import pytest
from rollouts import collect, random_prompts
from scipy import stats
from test_responses_go_on_under_new_weights import generate_and_interrupt, sampled_tokens
from tiny_engine import ROUTE_SHAPE

from megatron_vespo.config import ConfigError, ResponseLengthConfig, RolloutConfig, TrainConfig, load_config
from megatron_vespo.rollout.response_lengths import drawn_length

RUN_SEED = 5
"""Of `settings_of`."""
LENGTHS = ResponseLengthConfig(median=30, sigma=1.2)
ROLLOUT = RolloutConfig(group_size=4, max_response_tokens=120, deterministic=True, response_length=LENGTHS)


def expected_draw(identity: str, sample: int, median: float, sigma: float) -> float:
    """scipy's lognormal quantile at the hash that the docstring of `sample_seed` describes."""
    parts = [str(part).encode() for part in (RUN_SEED, "response_length", identity, sample)]
    digest = hashlib.blake2b(b"".join(len(p).to_bytes(4, "big") + p for p in parts), digest_size=8).digest()
    share = (int.from_bytes(digest, "big") % 2**63) / 2**63
    return stats.lognorm.ppf(share, s=sigma, scale=median)


def test_lengths_are_lognormal_and_those_of_their_hash():
    lengths = [drawn_length(LENGTHS, RUN_SEED, f"prompt/{i}", s) for i in range(500) for s in range(8)]
    expected = [expected_draw(f"prompt/{i}", s, 30, 1.2) for i in range(500) for s in range(8)]
    np.testing.assert_allclose(lengths, np.maximum(1, expected), atol=0.5 + 1e-6)
    assert min(lengths) >= 1
    logarithms = np.log(lengths)
    assert np.mean(logarithms) == pytest.approx(math.log(30), abs=0.06)
    assert np.std(logarithms) == pytest.approx(1.2, abs=0.05)


def test_without_spread_all_are_of_one_length():
    constant = ResponseLengthConfig(median=17, sigma=0)
    assert {drawn_length(constant, seed, "p", 0) for seed in range(50)} == {17}


@pytest.mark.engine
def test_each_response_has_its_length_and_only_those_above_the_limit_are_truncated(engine):
    found = collect(engine, random_prompts(12), ROLLOUT)
    cut = stopped_on_the_way = 0
    for identity, group in found.items():
        for t in group.trajectories:
            drawn = max(1, round(expected_draw(identity, t.sample, 30, 1.2)))
            assert len(t.response_ids) == min(drawn, 120)
            assert t.truncated == (drawn > 120)
            cut += t.truncated
            stopped_on_the_way += 2 in t.response_ids[:-1]
    assert 0 < cut < 24 and stopped_on_the_way > 0


@pytest.mark.engine
def test_what_is_aborted_goes_on_to_its_length(engine):
    """And through the stop token at which it was aborted."""
    prompts = random_prompts(6, seed=21)
    whole = collect(engine, prompts, ROLLOUT, routes=ROUTE_SHAPE)

    async def interruption():
        for _ in range(4):
            await sampled_tokens(engine, 8)
            await engine.client.pause_generation("abort")
            await engine.client.continue_generation()

    found = generate_and_interrupt(engine, prompts, ROLLOUT, interruption)
    assert max(len(t.segments) for t in found) >= 3
    for t in found:
        expected = whole[t.prompt.identity].trajectories[t.sample]
        np.testing.assert_array_equal(t.response_ids, expected.response_ids)
        assert t.finish_reason == expected.finish_reason


def test_a_distribution_that_the_limit_cuts_in_half_is_refused():
    settings = ["rollout.max_response_tokens=64", "rollout.response_length={median: 65}"]
    with pytest.raises(ConfigError, match=r"rollout\.response_length\.median: 65 is above max_response_tokens"):
        load_config(TrainConfig, "examples/quickstart.yaml", settings)
