"""One short run with all that a rollout batch can be scored for: proximal and reference log-probs, entropy."""

import json
from pathlib import Path

import pytest
from test_a_run_from_start_to_report import SHORT, command, rows

SETTINGS = (
    "algorithm.old_policy=proximal",
    "algorithm.objective.engine_correction=tis",
    "algorithm.objective.kl={coefficient: 0.01}",
    "algorithm.objective.entropy_coefficient=0.001",
    "algorithm.advantage.zero_variance_groups=filter",
    "algorithm.over_sampling=1.5",
    "policy.reference={}",
    "algorithm.gradient_variance_every=4",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs") / "proximal"


@pytest.fixture(scope="module")
def steps(folder) -> list[dict]:
    command("train", "examples/quickstart.yaml", f"run_dir={folder}", *SHORT, *SETTINGS)
    assert json.loads((folder / "summary.json").read_text())["weight_sync_mismatches"] == 0
    return rows(folder, "step")


def test_weights_against_the_proximal_policy_start_at_one_in_each_rollout_batch(steps):
    assert [row["mini_batch"] for row in steps] == [0, 1, 2, 3] * 2
    for first, fourth in ((steps[0], steps[3]), (steps[4], steps[7])):
        assert first["log_weight/std"] < 1e-5
        assert abs(first["log_weight/mean"]) < 1e-5
        assert fourth["log_weight/std"] > 1e-3


def test_the_mismatch_is_the_engines_though_weights_are_against_the_trainer(steps):
    assert 1e-8 < steps[0]["mismatch/mean_abs"] < 1e-5
    assert "mismatch/mean_abs" not in steps[1] and steps[1]["drift/mean_abs"] > 1e-5
    assert steps[0]["alarm/mismatch"] is False


def test_the_variance_of_the_gradient_is_measured_when_it_is_due(steps):
    assert [row["step"] for row in steps if "gradient/variance" in row] == [4, 8]
    for row in (steps[3], steps[7]):
        assert 0 < row["gradient/variance"] < 1e3 * row["grad_norm"] ** 2
        assert row["gradient/noise_share"] == pytest.approx(row["gradient/variance"] / row["grad_norm"] ** 2)


def test_groups_with_variance_fill_the_batches_where_enough_were_sampled(folder, steps):
    for row in rows(folder, "rollout"):
        assert row["advantage/groups_over_sampled"] == 8  # 24 were sampled for 4 steps of 4
        assert row["reward/groups_without_variance"] == row["advantage/groups_left_out"] / 16


def test_the_reference_is_where_the_run_started(steps):
    assert abs(steps[0]["kl_reference/k3"]) < 1e-9
    assert steps[-1]["kl_reference/k3"] > 1e-7


def test_entropy_and_the_engine_correction_are_measured(steps):
    for row in steps:
        assert 0.05 < row["entropy/current"] < 5.8  # nats; at most log of the vocabulary's 320 rows
        assert row["engine_correction/mean_weight"] == pytest.approx(1.0, abs=1e-3)  # matched engines in float32
        assert row["engine_correction/masked_share"] == 0
