"""What the simulation says, against formulas and against a simulation token by token."""

import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vespo.planning.clock import Clock
from megatron_vespo.planning.engine import Request, SimulatedEngine
from megatron_vespo.planning.rates import Cluster, DecodeSpeed, EngineRates, TrainerRates
from megatron_vespo.planning.simulation import simulate
from megatron_vespo.planning.workload import Workload, lognormal_lengths

SPEED = DecodeSpeed(((1, 0.010), (8, 0.016), (64, 0.050)))


def iteration_seconds(running: int) -> float:
    """`SPEED` at 1 to 64 requests."""
    return float(np.interp(running, [1, 8, 64], [0.010, 0.016, 0.050]))


def constant_work(steps=12, groups_per_step=2, sync_every=3, tokens=100, **changes) -> Workload:
    """Groups of 4; as many at once as a batch of `sync_every` steps has."""
    sizes = {"steps": steps, "groups_per_step": groups_per_step, "group_size": 4, "sync_every": sync_every}
    workload = Workload(
        **sizes,
        max_staleness=None,
        concurrent_groups=groups_per_step * sync_every,
        prompt_tokens=20,
        response_tokens=lambda group, sample: tokens,
        update="in_place",
    )
    return replace(workload, **changes)


def cluster(train_step_seconds: float, sync_seconds: float = 0.0) -> Cluster:
    """A trainer that takes so long for a step, whatever is in it."""
    return Cluster(1, EngineRates(SPEED, 64), TrainerRates(math.inf, train_step_seconds), sync_seconds)


def test_speed_is_interpolated_between_what_was_measured():
    for running in range(1, 65):
        assert SPEED.seconds(running) == pytest.approx(iteration_seconds(running))
    assert SPEED.seconds(120) == pytest.approx(0.050 + (120 - 64) * (0.050 - 0.016) / (64 - 8))


@pytest.mark.parametrize("seed", range(20))
def test_an_engine_gives_each_request_a_token_an_iteration(seed):
    random = Random(seed)
    lengths = [random.randint(1, 60) for _ in range(random.randint(1, 30))]
    most = random.choice([1, 3, 8, 64])

    waiting, running, now, expected = list(enumerate(lengths)), {}, 0.0, {}
    while waiting or running:
        while waiting and len(running) < most:
            number, tokens = waiting.pop(0)
            running[number] = tokens
        now += iteration_seconds(len(running))
        running = {number: tokens - 1 for number, tokens in running.items()}
        expected |= {number: now for number, tokens in running.items() if tokens == 0}
        running = {number: tokens for number, tokens in running.items() if tokens}

    clock, ended = Clock(), {}
    engine = SimulatedEngine(EngineRates(SPEED, most), clock, lambda r: ended.update({r.group: clock.now}))
    engine.submit([Request(number, 0, tokens, 0) for number, tokens in enumerate(lengths)])
    clock.run()
    assert ended == pytest.approx(expected)
    assert engine.tokens == pytest.approx(sum(lengths))


def test_prompts_and_weights_keep_an_engine_from_decoding():
    clock, ended = Clock(), []
    rates = EngineRates(SPEED, 64, prefill_tokens_per_second=100.0)
    engine = SimulatedEngine(rates, clock, lambda r: ended.append(clock.now))
    engine.submit([Request(0, 50, 100, 50)])  # 0.5 s of prefill, 1 s of decoding
    clock.at(1.0, engine.pause)  # 50 tokens are sampled
    clock.at(3.0, lambda: engine.resume(1, compute_again=True))  # 1 s for 50 + 50 tokens, 0.5 s of decoding
    clock.run()
    assert ended == [pytest.approx(4.5)]


@pytest.mark.parametrize("train", [0.1, 2.0])
@pytest.mark.parametrize("sync", [0.0, 0.7])
def test_in_turns_phases_add_up(train, sync):
    generate = 100 * iteration_seconds(3 * 2 * 4)
    expected = 4 * (generate + 3 * train) + 3 * sync
    for bound in (None, 2):  # both loops: with the smallest bound the asynchronous one takes turns
        outcome = simulate(cluster(train, sync), constant_work(max_staleness=bound))
        assert outcome.seconds == pytest.approx(expected)
        assert outcome.training == pytest.approx(12 * train / expected)
        assert outcome.generation == pytest.approx(4 * generate / expected)
        assert outcome.staleness == {0: 32, 1: 32, 2: 32}


@pytest.mark.parametrize("train", [0.1, 0.9, 2.0])
def test_one_batch_ahead_the_slower_phase_counts(train):
    generate = 100 * iteration_seconds(3 * 2 * 4)
    outcome = simulate(cluster(train), constant_work(max_staleness=5))
    assert outcome.seconds == pytest.approx(generate + 3 * max(generate, 3 * train) + 3 * train)


@pytest.mark.parametrize("train", [0.1, 0.9, 2.0])
def test_without_a_bound_the_slower_of_the_two_decides(train):
    """Steps of one group each, as many groups at once as a step has: one wave of the engine is one step."""
    work = constant_work(steps=200, groups_per_step=3, sync_every=1, max_staleness=10_000, concurrent_groups=3)
    wave = 100 * iteration_seconds(3 * 4)
    outcome = simulate(cluster(train), work)
    expected = 200 * wave + train if wave > train else wave + 200 * train
    assert outcome.seconds == pytest.approx(expected)
    assert outcome.trajectories_per_second == pytest.approx(12 / max(wave, train), rel=0.02)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(0, 9),
    st.integers(1, 30),
    st.integers(1, 3),
    st.sampled_from(["abort", "in_place", "wait"]),
    st.integers(0, 10**6),
)
def test_nothing_is_too_old_lost_or_faster_than_its_parts(
    groups_per_step, group_size, sync_every, slack, concurrent, engines, update, seed
):
    bound, steps = sync_every - 1 + slack, 12
    lengths = lognormal_lengths(60, 1.2, 800, seed)
    work = Workload(
        steps, groups_per_step, group_size, sync_every, bound, concurrent, 30, lengths, update
    )  # fmt: skip
    rates = EngineRates(SPEED, 8, prefill_tokens_per_second=5000.0, prefix_cache=bool(seed % 2))
    outcome = simulate(Cluster(engines, rates, TrainerRates(3000.0, 0.05), 0.1, 0.01), work)

    every = [[lengths(g, s) for s in range(group_size)] for g in range(steps * groups_per_step)]
    tokens = sum(map(sum, every))
    assert 0 <= min(outcome.staleness) <= max(outcome.staleness) <= bound
    assert outcome.trajectories == sum(outcome.staleness.values()) == steps * groups_per_step * group_size
    assert outcome.response_tokens == tokens
    assert len(outcome.step_ends) == steps and list(outcome.step_ends) == sorted(outcome.step_ends)
    fastest = max(b / iteration_seconds(b) for b in range(1, 9))
    trained = tokens + 30 * outcome.trajectories
    assert outcome.seconds >= max(tokens / (engines * fastest), trained / 3000.0 + steps * 0.05) - 1e-6
    assert outcome.seconds >= max(map(max, every)) * iteration_seconds(1)
    assert 0 < outcome.generation <= 1 and 0 < outcome.training <= 1
    assert simulate(Cluster(engines, rates, TrainerRates(3000.0, 0.05), 0.1, 0.01), work) == outcome


@pytest.mark.parametrize("bound", [None, 3, 7, 15])
def test_more_of_everything_is_not_slower(bound):
    """Of many short responses, where no single one decides."""
    work = Workload(24, 8, 8, 4, bound, 10_000, 50, lognormal_lengths(80, 0.5, 400, 1))
    seconds = []
    for size in (1, 2, 4, 8):
        hardware = Cluster(size, EngineRates(SPEED, 64, 50_000.0), TrainerRates(8000.0 * size, 0.02), 0.05)
        seconds.append(simulate(hardware, work).seconds)
    assert seconds == sorted(seconds, reverse=True)


def test_a_larger_bound_waits_less_for_long_responses():
    work = Workload(32, 4, 4, 2, None, 10_000, 50, lognormal_lengths(100, 1.2, 3000, 3))
    hardware = Cluster(1, EngineRates(SPEED, 64, 50_000.0), TrainerRates(4000.0, 0.1), 0.1)
    synchronous, *others = [
        simulate(hardware, replace(work, max_staleness=bound)).seconds for bound in (None, 1, 3, 7, 15)
    ]
    assert others[0] <= synchronous  # steps begin before the batch is complete
    assert all(later < 1.001 * earlier for earlier, later in pairwise(others))
    assert others[-1] < 0.7 * synchronous


def test_lengths_are_lognormal_and_cut():
    lengths = lognormal_lengths(1000, 0.8, 4000, seed=2)
    drawn = [lengths(group, sample) for group in range(500) for sample in range(8)]
    assert drawn == [lengths(group, sample) for group in range(500) for sample in range(8)]
    assert np.median(drawn) == pytest.approx(1000, rel=0.06) and max(drawn) == 4000
    share_cut = Counter(drawn)[4000] / len(drawn)
    assert share_cut == pytest.approx(0.5 * math.erfc(math.log(4) / 0.8 / math.sqrt(2)), abs=0.01)
