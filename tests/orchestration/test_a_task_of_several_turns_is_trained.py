"""examples/second_try.yaml, shortened, as a user runs it, with the engine's experts replayed."""

import json
from pathlib import Path

import pytest
from test_a_run_from_start_to_report import SHORT, command, rows


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "second_try"
    command("train", "examples/second_try.yaml", f"run_dir={folder}", *SHORT, "routing.replay=R3")
    return folder


def test_wrong_answers_get_a_second_turn(run):
    for row in rows(run, "rollout"):
        # The base is wrong more often than right, and what is asked again has about 27 tokens.
        assert 1.2 < row["response/turns_mean"] <= 2
        assert row["response/observed_tokens"] > 15 * (row["response/turns_mean"] - 1) * 16
        assert row["response/environment_failures"] == 0
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["generated_tokens"] == sum(row["response/tokens"] for row in rows(run, "rollout"))


def test_engine_and_trainer_agree_on_every_turn(run):
    """They would not, were a token of an environment a label, or a turn after it off by a position."""
    for row in rows(run, "step"):
        if row["mini_batch"] == 0:
            assert row["mismatch/mean_abs"] < 1e-4 and abs(row["log_weight/std"]) < 1e-3
        assert row["routing/missing_share"] == 0


def test_every_name_is_documented(run):
    text = Path("docs/metrics.md").read_text()
    missing = {name for row in rows(run) for name in row if f"`{name}`" not in text} - {"kind", "step", "timestamp"}
    assert not {name for name in missing if name.startswith("response/")}
