"""Every sequence has one place, micro-batches keep the budget, ranks get as many of them, and tokens are recoverable."""

import math
from dataclasses import replace

import numpy as np
import policy_examples
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vespo.packing.steps import FILLER_KEY, PackingRules, pack_step

RULES = st.builds(
    PackingRules,
    ranks=st.integers(1, 5),
    token_budget=st.integers(24, 100),
    segment_multiple=st.sampled_from([1, 2, 4, 8]),
    total_multiple=st.sampled_from([1, 2, 3, 4, 12]),
    count_multiple=st.integers(1, 4),
    minimum_count=st.integers(1, 3),
    equal_totals=st.booleans(),
    attention_cost=st.sampled_from([0.0, 0.01, 1.0]),
)
LENGTHS = st.one_of(
    st.lists(st.integers(2, 120), min_size=1, max_size=20),
    st.lists(st.integers(2, 60), min_size=20, max_size=60),
    st.lists(st.sampled_from([2, 31, 49, 50, 120]), min_size=20, max_size=40),
)
"""Tokens of each sequence: one position more than it has."""


@settings(max_examples=150, deadline=None)
@given(tokens=LENGTHS, rules=RULES)
def test_step(tokens, rules):
    sequences = [
        replace(sequence, old_log_probs=-np.arange(1, sequence.positions + 1, dtype=np.float32))
        for sequence in policy_examples.sequences(tokens)
    ]
    step = pack_step(sequences, rules)
    assert len(step) == rules.ranks
    (count,) = {len(per_rank) for per_rank in step}
    assert count >= rules.minimum_count and count % rules.count_multiple == 0
    micro_batches = [micro_batch for per_rank in step for micro_batch in per_rank]
    found = [key for micro_batch in micro_batches for key in micro_batch.keys if key != FILLER_KEY]
    assert sorted(found) == list(range(len(tokens)))
    for micro_batch in micro_batches:
        assert_recoverable(micro_batch, sequences)
        assert_shape(micro_batch, rules, longest=max(tokens) - 1)
    if rules.equal_totals:
        assert len({len(micro_batch.input_ids) for micro_batch in micro_batches}) == 1
    only_fillers = sum(set(micro_batch.keys) == {FILLER_KEY} for micro_batch in micro_batches)
    assert only_fillers == max(0, rules.ranks * count - len(tokens)), "fillers alone only where sequences are too few"


def assert_recoverable(micro_batch, sequences):
    """Real positions are those of the sequence; padding and fillers count nothing."""
    counted = 0
    bounds = micro_batch.cu_seqlens.tolist()
    for number, (key, length) in enumerate(zip(micro_batch.keys, micro_batch.lengths, strict=True)):
        start, end = bounds[number], bounds[number + 1]
        assert micro_batch.position_ids[start:end].tolist() == list(range(end - start))
        if key == FILLER_KEY:
            assert length == end - start
            assert micro_batch.advantages[number] == 0
            continue
        sequence, real = sequences[key], slice(start, start + length)
        assert micro_batch.input_ids[real].tolist() == sequence.token_ids[:-1].tolist()
        assert micro_batch.labels[real].tolist() == sequence.token_ids[1:].tolist()
        assert micro_batch.label_mask[real].tolist() == sequence.label_mask.tolist()
        assert micro_batch.old_log_probs[real].tolist() == sequence.old_log_probs.tolist()
        assert micro_batch.advantages[number].item() == pytest.approx(sequence.advantage)
        assert not micro_batch.old_log_probs[start + length : end].any()
        counted += sequence.label_mask.sum()
    assert micro_batch.label_mask.sum() == counted, "nothing else is in the loss"
    for ids in (micro_batch.input_ids, micro_batch.labels):
        assert ids.min() >= 0 and ids.max() < policy_examples.VOCABULARY


def assert_shape(micro_batch, rules, longest):
    bounds = micro_batch.cu_seqlens
    assert bounds[0] == 0 and bounds[-1] == len(micro_batch.input_ids)
    assert (bounds.diff() % rules.segment_multiple == 0).all()
    assert bounds[-1] % rules.total_multiple == 0
    real = [length for key, length in zip(micro_batch.keys, micro_batch.lengths, strict=True) if key != FILLER_KEY]
    padded = sum(math.ceil(length / rules.segment_multiple) * rules.segment_multiple for length in real)
    assert bounds[-1] <= rules.token_budget or len(real) == 1 or rules.equal_totals
    assert padded <= rules.token_budget or len(real) == 1
    multiple = math.lcm(rules.segment_multiple, rules.total_multiple)
    if rules.equal_totals:
        assert bounds[-1] <= max(rules.token_budget, math.ceil(longest / multiple) * multiple)
    else:
        assert bounds[-1] == max(math.ceil(padded / multiple), 1) * multiple, "no more positions than needed"


def test_same_sequences_are_packed_the_same():
    sequences = policy_examples.sequences([20 + 7 * i % 61 for i in range(100)])
    rules = PackingRules(ranks=3, token_budget=200, attention_cost=0.01)
    keys = [[[m.keys for m in rank] for rank in pack_step(sequences, rules)] for _ in range(2)]
    assert keys[0] == keys[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"ranks": 0},
        {"token_budget": 0},
        {"segment_multiple": 0},
        {"total_multiple": 0},
        {"count_multiple": 0},
        {"minimum_count": 0},
        {"attention_cost": -1.0},
        {"segment_multiple": 8, "total_multiple": 12, "token_budget": 23},
    ],
)
def test_senseless_rules_are_refused(changes):
    with pytest.raises(ValueError, match=next(reversed(changes))):
        PackingRules(**({"ranks": 2, "token_budget": 100} | changes))


def test_a_step_without_sequences_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        pack_step([], PackingRules(ranks=1, token_budget=10))
