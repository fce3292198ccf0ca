"""Ranks finish together, after the step and after each micro-batch, with as few micro-batches as the budget allows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vespo.packing.balance import largest_differencing, plan_micro_batches

ATTENTION = 6.5e-5
"""Of Qwen3-30B-A3B: at 16k positions attention costs as much as everything else."""


def cost_of(length):
    return length + ATTENTION * length**2


def costs_in(plan, lengths):
    """[rank, micro-batch]"""
    return np.array([[sum(cost_of(lengths[i]) for i in group) for group in groups] for groups in plan])


def planned(lengths, ranks, token_budget, **rules):
    return plan_micro_batches(
        lengths, [cost_of(length) for length in lengths], ranks=ranks, token_budget=token_budget, **rules
    )


def differencing(costs, ranks):
    """Karmarkar and Karp's method with equal counts, as it is written down; the largest sum of a rank."""
    ordered = sorted(costs)
    states = [sorted(ordered[i : i + ranks], reverse=True) for i in range(0, len(ordered), ranks)]
    while len(states) > 1:
        states.sort(key=lambda sums: sums[0] - sums[-1])
        one, other = states.pop(), states.pop()
        states.append(sorted((a + b for a, b in zip(one, reversed(other), strict=True)), reverse=True))
    return states[0][0]


def long_tail(count, longest, seed):
    random = np.random.default_rng(seed)
    return np.minimum(np.exp(random.normal(np.log(longest / 10), 1.0, count)).astype(int) + 1, longest).tolist()


@pytest.mark.parametrize("ranks", [4, 16])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["uniform", "long tail", "one giant", "all equal"])
def test_no_rank_has_more_to_do_than_under_karmarkar_karp(kind, seed, ranks):
    lengths = {
        "uniform": np.random.default_rng(seed).integers(1, 16385, 256).tolist(),
        "long tail": long_tail(256, 16384, seed),
        "one giant": [16384, *np.random.default_rng(seed).integers(400, 800, 255).tolist()],
        "all equal": [1000 + seed] * 256,
    }[kind]
    plan = planned(lengths, ranks, token_budget=32768)
    assert costs_in(plan, lengths).sum(1).max() <= differencing([cost_of(x) for x in lengths], ranks) * (1 + 1e-9)


def test_ranks_walk_in_step():
    lengths = long_tail(1024, 16384, seed=0)
    costs = costs_in(planned(lengths, 8, token_budget=32768), lengths)
    mean = costs.sum() / 8
    assert mean / costs.sum(1).max() > 0.999
    assert mean / costs.max(0).sum() > 0.98


def test_attention_is_part_of_the_balance():
    """Eight long sequences and the short ones of as many tokens: by tokens alone one rank could get only long ones."""
    lengths = [8192] * 8 + [512] * 128
    costs = costs_in(planned(lengths, 2, token_budget=16384), lengths)
    assert costs.sum(1)[0] == pytest.approx(costs.sum(1)[1], rel=1e-9)


def test_others_do_more_while_one_rank_has_a_giant():
    """The giant costs 30k, so the other rank fills its 16k tokens then, and both have as much to do in the rest."""
    lengths = [15000] + [500] * 120
    plan = planned(lengths, 2, token_budget=16000)
    costs = costs_in(plan, lengths)
    with_giant = next(number for groups in plan for number, group in enumerate(groups) if 0 in group)
    (other,) = (costs[r, with_giant] for r in range(2) if 0 not in plan[r][with_giant])
    assert other == pytest.approx(32 * cost_of(500))
    assert costs.sum(1).max() / costs.sum(1).min() < 1.04  # half a sequence of 500 in 25,000, twice


@pytest.mark.parametrize(
    ("lengths", "ranks", "budget", "count"),
    [
        ([1000] * 256, 8, 8000, 4),  # eights fit exactly
        ([6000, 4000] * 32, 4, 10000, 8),  # only pairs of a long and a short one do
        ([5001] * 16, 4, 10000, 4),  # no two fit
        ([30000, 100, 100], 2, 10000, 1),  # one alone exceeds the budget
        ([7, 5, 5, 4, 4, 3, 2], 1, 10, 3),
    ],
)
def test_as_few_micro_batches_as_the_budget_allows(lengths, ranks, budget, count):
    assert len(planned(lengths, ranks, budget)[0]) == count


@pytest.mark.parametrize(
    ("rules", "count"), [({}, 2), ({"minimum_count": 3}, 3), ({"count_multiple": 4}, 4), ({"count_multiple": 2}, 2)]
)
def test_counts_are_what_the_schedule_needs(rules, count):
    plan = planned([1000] * 16, 2, 4000, **rules)
    assert [len(groups) for groups in plan] == [count, count]
    assert costs_in(plan, [1000] * 16).sum(1).tolist() == [8 * cost_of(1000)] * 2


@pytest.mark.parametrize("seed", range(10))
def test_the_budget_is_kept_where_it_is_tight(seed):
    lengths = np.random.default_rng(seed).integers(1, 1000, 200).tolist()
    plan = planned(lengths, 4, 1000)
    assert max(sum(lengths[i] for i in group) for groups in plan for group in groups) <= 1000


def test_small_micro_batches_come_first_and_last():
    lengths = [16000, 15000, 14000, 13000, 12000, 11000]
    (groups,) = planned(lengths, 1, token_budget=16384)
    ordered = [lengths[i] for (i,) in groups]
    assert ordered[:3] == sorted(ordered[:3]) and ordered[3:] == sorted(ordered[3:], reverse=True)
    assert {ordered[0], ordered[-1]} == {11000, 12000}


def test_a_rank_with_one_long_sequence_gets_others_rather_than_a_filler():
    plan = planned([16000] + [300] * 31, 4, token_budget=16000, minimum_count=4)
    assert all(group for groups in plan for group in groups)


@settings(max_examples=100, deadline=None)
@given(costs=st.lists(st.integers(1, 1000), min_size=1, max_size=60), ranks=st.integers(1, 8))
def test_differencing_gives_equal_counts_and_never_spreads_more_than_one_row(costs, ranks):
    groups = largest_differencing(costs, ranks)
    assert sorted(i for group in groups for i in group) == list(range(len(costs)))
    assert max(map(len, groups)) - min(map(len, groups)) <= 1
    sums = [sum(costs[i] for i in group) for group in groups]
    descending = sorted(costs, reverse=True) + [0] * (-len(costs) % ranks)
    rows = [descending[i : i + ranks] for i in range(0, len(descending), ranks)]
    assert max(sums) - min(sums) <= max(row[0] - row[-1] for row in rows)
