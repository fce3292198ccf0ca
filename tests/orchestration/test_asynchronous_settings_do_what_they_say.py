"""Other settings of the asynchronous loop, as a grid of short runs on one engine."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from test_a_run_from_start_to_report import rows

STEPS = 12
SHORT = {
    "algorithm.steps": STEPS,
    "algorithm.prompts_per_step": 4,
    "rollout.group_size": 4,
    "rollout.max_response_tokens": 300,
    "policy.ranks": 1,
    "policy.layout": {"ep": 1},
    "routing.record": True,
    "evaluation.prompts": 8,
    "evaluation.exclude": [],
    "evaluation.every_steps": 0,
    "observability.tensorboard": False,
    "algorithm.old_policy": "proximal",
}
VARIANTS = {
    "turns": {"algorithm.asynchronous": {"sync_every": 3, "max_staleness": 2}},
    "one batch ahead": {"algorithm.asynchronous": {"sync_every": 3, "max_staleness": 5, "update": "wait"}},
    "in place": {
        "algorithm.asynchronous": {"sync_every": 1, "max_staleness": 6, "update": "in_place"},
        "weight_sync.flush_cache": False,
        # One response in ten takes longer to sample than several steps take to train, which one process does: it slows
        # down as the engine does where the machine is busy, and has no peer to wait for.
        "rollout.response_length": {"median": 12, "sigma": 2.5},
    },
    "filtered": {
        "algorithm.asynchronous": {"sync_every": 2, "staleness_threshold": 1.0},
        "algorithm.advantage.zero_variance_groups": "filter",
    },
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("grid")
    text = {
        "title": "Asynchronous",
        "config": str(Path("examples/quickstart.yaml").resolve()),
        "set": SHORT,
        "variants": {name: {"set": values} for name, values in VARIANTS.items()},
        "seeds": [1],
    }
    (folder / "grid.yaml").write_text(yaml.safe_dump(text, sort_keys=False))
    command = [sys.executable, "-m", "megatron_vespo", "ablate", folder / "grid.yaml", "--out", folder / "runs"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return {name: folder / "runs" / name.replace(" ", "_") / "seed_1" for name in VARIANTS}


def summary_of(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


@pytest.mark.parametrize(("name", "bound"), [("turns", 2), ("one batch ahead", 5), ("in place", 6), ("filtered", 3)])
def test_every_trajectory_is_accounted_for_and_none_is_too_old(runs, name, bound):
    summary = summary_of(runs[name])
    assert summary["status"] == "finished" and summary["steps"] == STEPS
    assert summary["max_staleness"] == bound >= summary["max_staleness_seen"]
    assert summary["trajectories_used"] == STEPS * 16
    assert summary["dropped_for_age"] == 0 and summary["weight_sync_mismatches"] == 0
    assert summary["trajectories_generated"] == sum(
        summary[f"trajectories_{where}"] for where in ("used", "filtered", "left")
    )


def test_with_the_smallest_bound_they_take_turns(runs):
    steps = rows(runs["turns"], "step")
    assert [row["staleness"] for row in steps] == [0, 1, 2] * 4
    assert summary_of(runs["turns"])["updates_mid_generation"] == 0


def test_one_batch_ahead_trains_on_the_weights_before_the_last(runs):
    steps = rows(runs["one batch ahead"], "step")
    assert max(row["staleness"] for row in steps[3:]) > 2
    assert summary_of(runs["one batch ahead"])["updates_mid_generation"] == 0


def test_routes_of_responses_that_saw_two_weights_in_place_are_masked(runs):
    summary, batches = summary_of(runs["in place"]), rows(runs["in place"], "rollout")
    assert summary["updates_mid_generation"] > 0
    assert sum(row.get("routing/masked/mixed_versions", 0) for row in batches) > 0
    assert max(row["response/segments_mean"] for row in batches) > 1


def test_both_are_at_work_at_once(runs):
    assert summary_of(runs["in place"])["overlap"] > 0.05


def test_groups_without_variance_are_replaced(runs):
    assert summary_of(runs["filtered"])["trajectories_filtered"] > 0
    assert all(row["reward/groups_without_variance"] == 0 for row in rows(runs["filtered"], "rollout"))


def test_ages_are_written_of_each_trajectory(runs):
    for run in runs.values():
        for row, step in zip(map(json.loads, (run / "weights.jsonl").open()), rows(run, "step"), strict=True):
            assert max(row["age"]) == step["staleness"] and len(row["age"]) == len(row["log_weight"])
            assert np.mean(row["age"]) == pytest.approx(step["staleness/mean"])
