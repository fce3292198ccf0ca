"""Padding, fillers, fill and balance of a step are reported as they can be counted by hand."""

import policy_examples
import pytest

from megatron_vespo.packing.batch import pack
from megatron_vespo.packing.steps import FILLER_KEY, PackingRules, filler_of, pack_step, report_packing


def test_by_hand():
    sequences = policy_examples.sequences([6, 4, 9, 3])  # 5, 3, 8 and 2 positions
    rules = PackingRules(ranks=2, token_budget=16, segment_multiple=4, total_multiple=16, attention_cost=0.5)
    step = [
        [pack([*sequences[:2], filler_of(sequences[0], 4)], 4), pack(sequences[2:3], 4)],  # 5+3, 3+1, filler 4; 8
        [pack(sequences[3:4], 4), pack([filler_of(sequences[0], 8)], 4)],  # 2+2; filler 8
    ]
    report = report_packing(step, rules)
    assert report.micro_batches == 2
    assert report.positions == 16 + 8 + 4 + 8
    assert report.real_positions == 5 + 3 + 8 + 2
    assert report.padding_positions == 3 + 1 + 2
    assert report.filler_positions == 4 + 8
    assert report.fill == pytest.approx(18 / (4 * 16))
    cost = {4: 4 + 8.0, 8: 8 + 32.0}  # n + n^2 / 2
    one, other = [cost[8] + 2 * cost[4], cost[8]], [cost[4], cost[8]]
    mean = (sum(one) + sum(other)) / 2
    assert report.rank_balance == pytest.approx(mean / sum(one))
    assert report.step_balance == pytest.approx(mean / (one[0] + cost[8]))


def test_a_step_without_waste():
    step = pack_step(policy_examples.sequences([9] * 8), PackingRules(ranks=2, token_budget=16, attention_cost=0.1))
    report = report_packing(step, PackingRules(ranks=2, token_budget=16, attention_cost=0.1))
    assert (report.fill, report.rank_balance, report.step_balance) == (1.0, 1.0, 1.0)
    assert (report.padding_positions, report.filler_positions) == (0, 0)


def test_attention_is_part_of_the_cost():
    """Eight long sequences and short ones of as many tokens: balanced by tokens, a rank could get all the long ones."""
    sequences = policy_examples.sequences([129] * 8 + [17] * 80)
    rules = PackingRules(ranks=3, token_budget=256, attention_cost=0.05)
    assert report_packing(pack_step(sequences, rules), rules).rank_balance > 0.98


def test_a_micro_batch_is_filled_by_a_sequence_of_its_own():
    """Not by lengthening a real sequence, whose attention would cost more."""
    sequences = policy_examples.sequences([11, 6])
    rules = PackingRules(ranks=1, token_budget=40, segment_multiple=2, total_multiple=20)
    ((micro_batch,),) = pack_step(sequences, rules)
    assert micro_batch.keys == (0, 1, FILLER_KEY)
    assert micro_batch.lengths == (10, 5, 4)
    assert micro_batch.cu_seqlens.tolist() == [0, 10, 16, 20]
    assert micro_batch.max_seqlen == 10


def test_fillers_spread_over_the_experts():
    """Many copies of one token would all be routed to the same experts."""
    (sequence,) = policy_examples.sequences([50])
    filler = filler_of(sequence, 200)
    assert filler.positions == 200
    assert set(filler.token_ids.tolist()) == set(sequence.token_ids.tolist())
    assert not filler.label_mask.any() and filler.key == FILLER_KEY
