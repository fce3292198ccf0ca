"""Sampling and training side by side on the real parts: every trajectory once, none too old, weights in mid-response."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from test_a_run_from_start_to_report import SHORT, rows

from megatron_vespo.config import ConfigError, TrainConfig, load_config
from megatron_vespo.observability.console import RunConsole
from megatron_vespo.orchestration import asynchronous
from megatron_vespo.orchestration.busy_time import BusyTime, seconds_of_both
from megatron_vespo.orchestration.training_run import Resume, run_training_loop

STEPS, SYNC_EVERY, BOUND = 24, 2, 5
STANDS_STILL = 8
"""First steps during which the engine is paused: what is being sampled when they begin is so when weights change, however
long the steps take."""
SETTINGS = (
    *SHORT,
    f"algorithm.steps={STEPS}",
    f"algorithm.asynchronous={{sync_every: {SYNC_EVERY}, max_staleness: {BOUND}, mismatch_every: 4}}",
    "routing.replay=R3",
    "checkpoint.save_every=0",
    "evaluation.every_steps=9",
    "evaluation.prompts=8",
    "observability.tensorboard=false",
    "rollout.max_response_tokens=300",
    "rollout.response_length={median: 12, sigma: 2.5}",  # one in ten has 300 tokens
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The run's folder, and the trajectories of each step."""
    folder = tmp_path_factory.mktemp("runs") / "asynchronous"
    config = load_config(TrainConfig, "examples/quickstart.yaml", [f"run_dir={folder}", *SETTINGS])
    used = []
    train_step = asynchronous.train_step

    async def remembered(session, trajectories):
        used.append((session.progress.step, trajectories))
        if session.progress.step >= STANDS_STILL:
            await train_step(session, trajectories)
            return
        (client,) = session.sampler.fleet.clients
        await client.pause_generation("in_place")
        await train_step(session, trajectories)
        await client.continue_generation()

    asynchronous.train_step = remembered
    try:
        with RunConsole("test", STEPS, SYNC_EVERY, "plain") as console:
            run_training_loop(config, console, asynchronous.train, Resume())
    finally:
        asynchronous.train_step = train_step
    return folder, used


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def test_every_trajectory_is_used_once_and_none_is_dropped(run):
    folder, used = run
    names = Counter((t.prompt.identity, t.sample) for _, step in used for t in step)
    summary = summary_of(folder)
    assert len(used) == STEPS and all(len(step) == 16 for _, step in used)
    assert set(names.values()) == {1} and len(names) == STEPS * 16
    assert summary["trajectories_generated"] == summary["trajectories_used"] == len(names)
    assert summary["trajectories_left"] == summary["trajectories_filtered"] == summary["dropped_for_age"] == 0
    assert summary["status"] == "finished" and summary["weight_sync_mismatches"] == 0


def test_nothing_is_older_than_the_bound_and_much_is_older_than_a_synchronous_run_allows(run):
    folder, used = run
    ages = [step - min(s.weight_version for s in t.segments) for step, trajectories in used for t in trajectories]
    assert min(ages) >= 0 and max(ages) <= BOUND
    assert max(ages) > SYNC_EVERY - 1
    assert summary_of(folder)["max_staleness_seen"] == max(ages)
    for row, (step, trajectories) in zip(rows(folder, "step"), used, strict=True):
        assert row["staleness"] == max(step - t.oldest_weight_version for t in trajectories)


def test_responses_go_on_under_new_weights_and_every_token_knows_its_version(run):
    folder, used = run
    trajectories = [t for _, step in used for t in step]
    for t in trajectories:
        assert [s.start for s in t.segments] == [0, *(s.end for s in t.segments[:-1])]
        assert t.segments[-1].end == len(t.response_ids) == len(t.behavior_log_probs)
        versions = [s.weight_version for s in t.segments]
        assert versions == sorted(versions)
    interrupted = [t for t in trajectories if len(t.segments) > 1]
    assert interrupted and summary_of(folder)["updates_mid_generation"] >= STANDS_STILL // SYNC_EVERY - 1
    assert {s.weight_version for t in trajectories for s in t.segments} <= {
        row["weight_version"] for row in rows(folder, "sync")
    }


def test_each_position_has_the_route_of_the_segment_that_sampled_its_token(run):
    for t in (t for _, step in run[1] for t in step):
        of_token = np.concatenate([np.full(s.end - s.start, s.weight_version) for s in t.segments])
        prompt = np.full(len(t.prompt.token_ids) - 1, t.segments[0].weight_version)
        assert t.engine_routes.recorded.all()
        assert t.engine_routes.weight_versions.tolist() == [*prompt, *of_token]


def test_drawn_lengths_are_those_of_training_and_not_of_evaluations(run):
    """The model itself ends its responses after 10 tokens or so."""
    assert max(row["response/length_max"] for row in rows(run[0], "rollout")) == 300
    assert all(row["response/length_max"] < 200 for row in rows(run[0], "evaluation"))


def test_engine_and_trainer_are_compared_at_equal_weights(run):
    measured = rows(run[0], "mismatch")
    assert len(measured) >= 2
    for row in measured:
        assert 0 < row["mismatch/mean_abs"] < 1e-5 and row["routing_probe/same_set"] == 1
    assert 0 < summary_of(run[0])["mean_abs_logprob_diff"] < 1e-5


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("{sync_every: 4, max_staleness: 2}", "less than sync_every - 1"),
        ("{sync_every: 4}", "name either this or staleness_threshold"),
        ("{sync_every: 4, max_staleness: 8, staleness_threshold: 1.0}", "name either"),
    ],
)
def test_bounds_that_cannot_be_kept_are_refused(setting, complaint):
    with pytest.raises(ConfigError, match=complaint):
        load_config(TrainConfig, "examples/quickstart_async.yaml", [f"algorithm.asynchronous={setting}"])


@pytest.mark.parametrize(("threshold", "sync_every", "bound"), [(0.0, 4, 3), (0.5, 4, 5), (1.0, 4, 7), (0.1, 1, 1)])
def test_the_papers_threshold_is_a_bound_in_steps(threshold, sync_every, bound):
    setting = f"algorithm.asynchronous={{sync_every: {sync_every}, staleness_threshold: {threshold}}}"
    config = load_config(TrainConfig, "examples/quickstart.yaml", [setting, "checkpoint.save_every=0"])
    assert config.algorithm.max_staleness == bound


def test_overlap_is_the_time_of_both():
    one, other = BusyTime(), BusyTime()
    for busy, now in ((True, 0.0), (True, 1.0), (False, 2.0), (True, 5.0)):
        one.set(busy, now)
    for busy, now in ((True, 1.0), (False, 6.0), (True, 9.0), (False, 9.5)):
        other.set(busy, now)
    assert one.until(10.0) == [(0.0, 2.0), (5.0, 10.0)]
    assert seconds_of_both(one.until(10.0), other.until(10.0)) == pytest.approx(1.0 + 1.0 + 0.5)
