"""Runs made of few numbers, whose collapse, or none, can be told by hand from the definition in collapse.py."""

import math
from pathlib import Path

import numpy as np
import pytest

from megatron_vespo.observability.collapse import (
    accuracy_before,
    batch_means,
    best_accuracy,
    collapse,
    final_accuracy,
    generated_tokens,
    smoothed,
    stalest_steps,
    status,
    trained_tokens,
    wall_seconds,
)
from megatron_vespo.observability.run_folder import RunFolder


def run_of(rewards=(), accuracy=(), entropy=(), std=0.5, cut=0.0, length=20.0, limit=64) -> RunFolder:
    """One value of `entropy` a rollout batch, of one optimizer step each."""
    rollouts = [
        {
            "step": step,
            "reward/mean": value,
            "reward/std": std,
            "response/truncated_share": cut,
            "response/length_mean": length,
        }
        for step, value in enumerate(rewards)
    ]
    evaluations = [{"step": step, "accuracy": value} for step, value in enumerate(accuracy)]
    steps = [
        {"step": batch + 1, "batch": batch, "mini_batch": 0, "entropy/old_policy": value}
        for batch, value in enumerate(entropy)
    ]
    config = {"rollout": {"max_response_tokens": limit}}
    return RunFolder(
        Path("run"), rows={"rollout": rollouts, "evaluation": evaluations, "step": steps}, config=config, missing=[]
    )


def levels(*parts: tuple[int, float]) -> list[float]:
    return [value for count, value in parts for _ in range(count)]


def test_smoothing_is_a_running_mean_of_at_most_eight_and_of_a_quarter_of_few():
    assert smoothed(range(40)) == [first + 3.5 for first in range(33)]
    assert smoothed([1.0, 3.0, 5.0, 7.0, 9.0, 11.0, 13.0, 15.0]) == [2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0]
    assert smoothed([1.0, 5.0]) == [1.0, 5.0]
    assert smoothed([]) == []


@pytest.mark.parametrize(("end", "collapsed"), [(0.9, False), (0.66, False), (0.64, True), (0.0, True)])
def test_a_run_that_lost_more_than_half_of_its_gain_collapsed(end, collapsed):
    """0.4 to 0.9 is a gain of 0.5: below 0.65 more than half of it is lost."""
    reason = collapse(run_of(levels((10, 0.4), (10, 0.9), (10, end))))
    assert (reason is not None) == collapsed
    if reason:
        assert reason == f"reward fell from 0.90 to {end:.2f}, having started at 0.40"


@pytest.mark.parametrize(("end", "collapsed"), [(0.45, False), (0.21, False), (0.19, True)])
def test_a_run_that_gained_nothing_collapsed_if_it_lost_a_fifth_of_the_scale(end, collapsed):
    assert (collapse(run_of(levels((20, 0.4), (20, end)))) is not None) == collapsed


@pytest.mark.parametrize(("end", "collapsed"), [(0.16, False), (0.14, True)])
def test_a_run_that_lost_more_than_half_of_its_best_collapsed_however_low_that_is(end, collapsed):
    """0.3 is the best: below 0.15 more than half of it is lost, although that is less than a fifth of the scale."""
    assert (collapse(run_of(levels((10, 0.1), (10, 0.3), (10, end)))) is not None) == collapsed


def test_half_of_next_to_nothing_is_noise_and_half_of_a_debt_means_nothing():
    assert collapse(run_of(levels((10, 0.02), (10, 0.06), (10, 0.02)))) is None
    assert collapse(run_of(levels((10, -0.9), (10, 0.1), (10, -0.05)))) is None


def test_a_run_that_came_back_did_not_collapse():
    assert collapse(run_of(levels((10, 0.4), (10, 0.9), (10, 0.0), (10, 0.9)))) is None


def test_one_bad_batch_is_no_collapse():
    assert collapse(run_of(levels((10, 0.4), (29, 0.9), (1, 0.0)))) is None


def test_held_out_accuracy_tells_it_too():
    assert collapse(run_of(levels((40, 0.9)), accuracy=[0.4, 0.9, 0.1])) is not None
    assert collapse(run_of(levels((40, 0.9)), accuracy=[0.4, 0.9, 0.9])) is None


def test_a_fall_at_the_very_start_is_not_smoothed_away():
    reason = collapse(
        run_of(levels((1, 0.4), (39, 0.05)), accuracy=[0.4, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05])
    )
    assert reason is not None and "from 0.40 to 0.05" in reason


def test_the_rule_has_the_scale_of_the_reward():
    """From 0 to -0.3: between -1 and 1 (standard deviation 1) a fall by 15% of the scale, between 0 and 1 by 30%."""
    rewards = levels((20, 0.0), (20, -0.3))
    assert collapse(run_of(rewards, std=1.0)) is None
    assert collapse(run_of(rewards, std=0.5)) is not None


def test_of_one_point_nothing_is_said_and_of_two_the_difference():
    assert collapse(run_of([0.0], accuracy=[0.4])) is None
    assert collapse(run_of(accuracy=[0.4, 0.1])) is not None
    assert collapse(run_of()) is None


def test_a_reward_that_is_not_finite_is_passed_over():
    assert collapse(run_of([*levels((10, 0.4), (10, 0.9)), math.nan, *levels((10, 0.9))])) is None


def test_noise_is_no_collapse():
    """300 runs without a trend: 60 batches of 16 prompts with 8 responses, prompts of very different difficulty."""
    random = np.random.default_rng(3)
    difficulty = random.beta(0.4, 0.6, (300, 60, 16))
    rewards = random.binomial(8, difficulty).mean(2) / 8
    assert sum(collapse(run_of(run.tolist(), std=0.49)) is not None for run in rewards) <= 2


@pytest.mark.parametrize(
    ("start", "end", "runaway"), [(0.2, 0.9, True), (0.2, 0.7, False), (0.02, 0.4, False), (0.5, 1.9, False)]
)
def test_entropy_that_rises_to_a_multiple_and_a_level_ran_away(start, end, runaway):
    reason = collapse(run_of(entropy=levels((20, start), (20, end))))
    assert reason == (f"entropy rose from {start:.2g} to {end:.2g} nats a token" if runaway else None)


def test_no_entropy_is_a_collapse_only_while_success_falls():
    sure = levels((10, 0.2), (30, 0.001))
    assert collapse(run_of(levels((10, 0.4), (30, 0.9)), entropy=sure)) is None
    falling = levels((10, 0.4), (10, 0.9), (20, 0.75))
    assert collapse(run_of(falling)) is None
    reason = collapse(run_of(falling, entropy=sure))
    assert reason == "entropy fell from 0.2 to 0.001 nats a token while success fell"


@pytest.mark.parametrize(
    ("cut", "length", "words"),
    [
        (0.6, 40.0, "60% of responses were cut at the length limit while success fell"),
        (0.4, 60.0, "responses grew to 60 of at most 64 tokens while success fell"),
        (0.4, 50.0, None),
    ],
)
def test_length_at_the_limit_is_a_collapse_only_while_success_falls(cut, length, words):
    falling, rising = levels((10, 0.4), (10, 0.9), (20, 0.75)), levels((10, 0.4), (30, 0.9))
    assert collapse(run_of(falling, cut=cut, length=length)) == words
    assert collapse(run_of(rising, cut=cut, length=length)) is None


def test_all_reasons_are_told():
    run = run_of(levels((10, 0.4), (10, 0.9), (20, 0.0)), entropy=levels((20, 0.2), (20, 3.0)), cut=0.9)
    assert (collapse(run) or "").count(";") == 2


def test_mini_batches_are_averaged_or_the_stalest_is_taken():
    """Two batches of two steps, and a third that ended after one step."""
    values = [1.0, 3.0, 5.0, 9.0, 100.0]
    steps = [
        {"step": index + 1, "batch": index // 2, "mini_batch": index % 2, "x": value}
        for index, value in enumerate(values)
    ]
    run = RunFolder(Path("run"), rows={"step": steps})
    assert batch_means(run, "x") == [(0.0, 2.0), (2.0, 7.0), (4.0, 100.0)]
    assert stalest_steps(run, "x") == [(2.0, 3.0), (4.0, 9.0)]


def test_results_are_the_summarys_or_else_what_the_metrics_say():
    rows = {
        "evaluation": [
            {"step": 0, "when": "before", "accuracy": 0.4, "timestamp": 100.0},
            {"step": 4, "when": "during", "accuracy": 0.8, "timestamp": 150.0},
        ],
        "rollout": [
            {"step": 0, "response/tokens": 30, "timestamp": 110.0},
            {"step": 4, "response/tokens": 50, "timestamp": 160.0},
        ],
        "step": [{"step": 1, "tokens/trained": 70, "timestamp": 163.0}],
    }
    unfinished = RunFolder(Path("run"), rows=rows, missing=["summary.json"])
    assert (status(unfinished), accuracy_before(unfinished), final_accuracy(unfinished)) == ("unfinished", 0.4, None)
    assert best_accuracy(unfinished) == 0.8
    assert wall_seconds(unfinished) == 63.0
    assert (generated_tokens(unfinished), trained_tokens(unfinished)) == (80, 70)

    summary = {
        "status": "failed: no memory",
        "eval_accuracy_before": None,
        "wall_seconds": 99.0,
        "generated_tokens": 81,
    }
    failed = RunFolder(Path("run"), rows=rows, summary=summary)
    assert (status(failed), accuracy_before(failed), final_accuracy(failed)) == ("failed: no memory", 0.4, None)
    assert (wall_seconds(failed), generated_tokens(failed)) == (99.0, 81)

    finished = RunFolder(Path("run"), summary={"status": "finished", "eval_accuracy_after": 0.7})
    assert (status(finished), final_accuracy(finished), best_accuracy(finished)) == ("finished", 0.7, 0.7)
    assert wall_seconds(finished) is None
