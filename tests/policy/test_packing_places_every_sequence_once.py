"""Packing loses nothing, keeps the budget, gives every rank as many micro-batches, and fills them well."""

import policy_examples
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vespo.policy.packing import FILLER_KEY, pack_step, plan_micro_batches

BUDGET = 100


@settings(max_examples=150, deadline=None)
@given(lengths=st.lists(st.integers(1, 130), min_size=1, max_size=60), ranks=st.integers(1, 5))
def test_plan(lengths, ranks):
    plan = plan_micro_batches(lengths, ranks, BUDGET)
    assert sorted(i for rank in plan for micro_batch in rank for i in micro_batch) == list(range(len(lengths)))
    assert len(plan) == ranks
    assert len({len(rank) for rank in plan}) == 1
    for micro_batch in (micro_batch for rank in plan for micro_batch in rank):
        assert sum(lengths[i] for i in micro_batch) <= BUDGET or len(micro_batch) == 1
    for rank in plan:
        sequences = sum(len(micro_batch) for micro_batch in rank)
        assert rank.count([]) == max(0, len(rank) - sequences), "a filler only where sequences are too few"
    assert plan == plan_micro_batches(lengths, ranks, BUDGET)


def test_ranks_get_nearly_equal_tokens_and_few_micro_batches():
    lengths = [20 + 7 * i % 61 for i in range(256)]
    plan = plan_micro_batches(lengths, 4, 500)
    tokens = [sum(lengths[i] for micro_batch in rank for i in micro_batch) for rank in plan]
    assert max(tokens) - min(tokens) <= max(lengths)
    assert max(tokens) / min(tokens) < 1.01
    assert len(plan[0]) <= -(-max(tokens) // 500) + 1


def test_packed_step_has_every_key_and_masked_fillers():
    sequences = policy_examples.sequences([60, 5, 5, 5])
    step = pack_step(sequences, ranks=3, token_budget=6)
    micro_batches = [micro_batch for rank in step for micro_batch in rank]
    keys = [key for micro_batch in micro_batches for key in micro_batch.keys]
    assert sorted(key for key in keys if key != FILLER_KEY) == [0, 1, 2, 3]
    fillers = [micro_batch for micro_batch in micro_batches if micro_batch.keys == (FILLER_KEY,)]
    assert fillers
    assert all(len(filler.input_ids) == 1 and not filler.label_mask.any() for filler in fillers)
    for micro_batch in micro_batches:
        if micro_batch.keys != (FILLER_KEY,):
            bounds = micro_batch.cu_seqlens.tolist()
            for key, start, end in zip(micro_batch.keys, bounds, bounds[1:], strict=False):
                assert micro_batch.input_ids[start:end].tolist() == sequences[key].token_ids[:-1].tolist()
                assert micro_batch.labels[start:end].tolist() == sequences[key].token_ids[1:].tolist()


@pytest.mark.parametrize(("lengths", "ranks", "budget"), [([], 1, 10), ([0], 1, 10), ([3], 0, 10), ([3], 1, 0)])
def test_senseless_requests_are_refused(lengths, ranks, budget):
    with pytest.raises(ValueError):
        plan_micro_batches(lengths, ranks, budget)
