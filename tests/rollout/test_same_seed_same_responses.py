import hashlib

import pytest
from rollouts import collect, random_prompts, sampled

from megatron_vespo.config import RolloutConfig
from megatron_vespo.rollout.seeds import sample_seed


@pytest.mark.engine
def test_bitwise_equal_whatever_is_sampled_beside_it(engine):
    prompts = random_prompts(16)
    rollout = RolloutConfig(group_size=4, max_response_tokens=24, deterministic=True)
    first = sampled(collect(engine, prompts, rollout))
    assert sampled(collect(engine, prompts, rollout)) == first
    assert sampled(collect(engine, prompts[::-1], rollout)) == first
    one_by_one = rollout.model_copy(update={"concurrent_groups": 1})
    assert sampled(collect(engine, prompts[::-1], one_by_one)) == first
    in_company = sampled(collect(engine, prompts[5:7] + random_prompts(20, seed=9), rollout))
    assert all(in_company[key] == first[key] for key in first if key in in_company)


@pytest.mark.engine
def test_bitwise_equal_when_more_prompts_wait_than_one_prefill_takes(engine):
    """SGLang would cut a prompt in two to fill its prefill batch, and which one depends on when requests arrive."""
    prompts = random_prompts(64)
    rollout = RolloutConfig(group_size=8, max_response_tokens=2, deterministic=True)
    at_once = sampled(collect(engine, prompts, rollout))
    one_by_one = sampled(collect(engine, prompts, rollout.model_copy(update={"concurrent_groups": 1})))
    assert at_once == one_by_one


@pytest.mark.engine
def test_samples_batches_and_runs_differ(engine):
    prompts = random_prompts(2)
    rollout = RolloutConfig(group_size=8, max_response_tokens=24, deterministic=True)
    responses = set()
    for changes in ({}, {"batch_index": 1}, {"run_seed": 6}):
        responses |= {tokens for tokens, _ in sampled(collect(engine, prompts, rollout, **changes)).values()}
    assert len(responses) == 3 * 2 * 8


def test_seeds_are_the_documented_hash():
    parts = [b"7", b"rollout/3", b"chain_sum/1/2", b"5"]
    text = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    expected = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") & (2**63 - 1)
    assert sample_seed(7, "rollout/3", "chain_sum/1/2", 5) == expected == 8883355591631338009
