"""Trainer processes are killed and stopped at every kind of call: the run is the undisturbed one, bit for bit."""

import json
import signal
from pathlib import Path

import pytest
from lost_ranks import Faults
from test_a_run_from_start_to_report import SHORT, rows, without_times

from megatron_vespo.config import TrainConfig, load_config
from megatron_vespo.observability.console import RunConsole
from megatron_vespo.orchestration.training import loop_of
from megatron_vespo.orchestration.training_run import Resume, run_training_loop

pytestmark = pytest.mark.timeout(1800)  # processes are started again and again

STEPS = 8
SETTINGS = (
    *SHORT,
    f"algorithm.steps={STEPS}",
    "algorithm.asynchronous={sync_every: 1, max_staleness: 0}",  # a step's groups do not depend on time
    "algorithm.old_policy=proximal",
    "routing.replay=R3",
    "checkpoint.save_every=3",
    "checkpoint.export_every=6",
    "evaluation.prompts=4",
    "evaluation.every_steps=0",  # one on the way would interrupt responses wherever they are
    "observability.tensorboard=false",
)
KILL, STOP = signal.SIGKILL, signal.SIGSTOP
FAULTS = {
    ("train a step", 2): (1, KILL),  # before there is a checkpoint
    ("gather and send weights", 4): (0, KILL),  # which sends them
    ("finish the save", 1): (1, KILL),  # of step 3
    ("score sequences", 7): (0, STOP),
}
OTHER_FAULTS = {
    ("copy the state to be saved", 1): (0, KILL),
    ("copy the model to be exported", 1): (1, KILL),
    ("finish the save", 2): (0, KILL),
    ("checksum the trainer's weights", 5): (1, KILL),
    ("export the checkpoint", 1): (1, KILL),
}


def train(folder: Path, *settings: str) -> Path:
    config = load_config(TrainConfig, "examples/quickstart.yaml", [f"run_dir={folder}", *SETTINGS, *settings])
    with RunConsole("test", STEPS, 1, "plain") as console:
        run_training_loop(config, console, loop_of(config), Resume())
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("runs") / "whole")


def train_with(faults: dict, folder: Path, *settings: str) -> Path:
    planned = Faults(dict(faults))
    with pytest.MonkeyPatch.context() as patch:
        planned.install(patch)
        train(folder, *settings)
    assert not planned.planned  # all of them happened
    return folder


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory) -> Path:
    return train_with(FAULTS, tmp_path_factory.mktemp("runs") / "disturbed")


def require_same(whole: Path, disturbed: Path) -> None:
    """Every figure and every bit of weights, but what tells of files and restarts; after these more syncs are verified."""
    beside = ("phase", "checkpoint", "restart")
    first, second = (
        [without_times(row) | {"verified": None} for row in rows(run) if row["kind"] not in beside]
        for run in (whole, disturbed)
    )
    assert [row["step"] for row in first if row["kind"] == "step"] == list(range(1, STEPS + 1))
    assert first == second
    models = [f"{name}/model.safetensors" for name in ("checkpoint", "exports/step_00000006")]
    for name in ("weights.jsonl", "routing.jsonl", *models):
        assert (whole / name).read_bytes() == (disturbed / name).read_bytes()


def test_weights_and_metrics_are_those_of_the_undisturbed_run(whole, disturbed):
    require_same(whole, disturbed)


def test_the_summary_counts_restarts_and_nothing_twice(whole, disturbed):
    first, second = (json.loads((run / "summary.json").read_text()) for run in (whole, disturbed))
    assert first["policy_restarts"] == 0 and second["policy_restarts"] == len(FAULTS)
    apart = {"wall_seconds": 0, "overlap": 0, "policy_restarts": 0}
    assert first | apart == second | apart


def test_a_row_tells_each_restart(disturbed):
    told = rows(disturbed, "restart")
    places = [(row["step"], row["checkpoint"], row["steps_again"]) for row in told]
    assert places[:2] == [(1, 0, 1), (3, 0, 3)]
    # When a checkpoint is complete depends on time.
    assert all(step == checkpoint + again and checkpoint in (0, 3, 6) for step, checkpoint, again in places)
    assert [row["part"] for row in told] == [f"policy rank {rank}" for rank, _ in FAULTS.values()]
    assert "its process died" in told[0]["cause"] and "does not answer" in told[3]["cause"]
    text = Path("docs/metrics.md").read_text()
    assert all(f"`{name}`" in text for row in told for name in row.keys() - {"kind", "step", "timestamp"})


def test_the_last_checkpoint_is_whole_and_nothing_else_is_left(whole, disturbed):
    for run in (whole, disturbed):
        assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step_00000003", "step_00000006"]
        assert not (run / "journal").exists()


@pytest.mark.slow
def test_other_moments_change_nothing_either(whole, tmp_path):
    require_same(whole, train_with(OTHER_FAULTS, tmp_path / "disturbed"))


@pytest.mark.slow
def test_a_synchronous_run_comes_back_within_a_rollout_batch(tmp_path):
    settings, faults = "algorithm.asynchronous=null", {("train a step", 3): (1, KILL), ("gather weights", 3): (0, KILL)}
    require_same(train(tmp_path / "whole", settings), train_with(faults, tmp_path / "disturbed", settings))
