"""A run that was killed inside a rollout batch goes on as if nothing had happened."""

import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from test_a_run_from_start_to_report import SHORT, rows, without_times

from megatron_vespo.orchestration.checkpoints import complete_checkpoints, step_of

SETTINGS = (
    *SHORT,
    "algorithm.steps=12",
    "checkpoint.save_every=3",
    "checkpoint.keep_last=1",
    "checkpoint.export_every=6",
    "routing.replay=R3",  # routes are a part of what a checkpoint has of the rollout batch
)


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "megatron_vespo", "train", "examples/quickstart.yaml", f"run_dir={folder}"]
    return subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def end(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]
    return output


def kill_when(process: subprocess.Popen, ready) -> None:
    """SIGKILL for the command and everything that it started, as when a machine goes down."""
    deadline = time.monotonic() + 200
    while not ready():
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        member.kill()
    psutil.wait_procs(family, timeout=10)
    process.communicate()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path, str]:
    """An uninterrupted run; one that was killed at step 7 or a little later; what the second said when it went on."""
    folder = tmp_path_factory.mktemp("runs")
    whole, killed = folder / "whole", folder / "killed"
    end(start(whole, *SETTINGS))
    process = start(killed, *SETTINGS)
    metrics = killed / "metrics.jsonl"
    complete = killed / "checkpoints" / "step_00000006" / "complete.json"
    kill_when(process, lambda: complete.exists() and '"kind": "step", "step": 7' in metrics.read_text())
    assert not (killed / "summary.json").exists()
    return whole, killed, end(start(killed, *SETTINGS, "--resume", "auto"))


def test_metrics_and_weights_are_those_of_the_uninterrupted_run_bit_for_bit(runs):
    whole, killed, _ = runs
    beside = ("phase", "checkpoint")  # what tells of starting and of files, which come when they come
    first, second = ([without_times(r) for r in rows(run) if r["kind"] not in beside] for run in (whole, killed))
    assert [row["step"] for row in first if row["kind"] == "step"] == list(range(1, 13))
    assert all(row["routing/missing_share"] == 0 for row in first if row["kind"] == "step")
    assert first == second
    for name in ("weights.jsonl", "routing.jsonl"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes()
    weights = [(run / "checkpoint" / "model.safetensors").read_bytes() for run in (whole, killed)]
    assert weights[0] == weights[1]


def test_the_summary_counts_both_parts(runs):
    whole, killed, said = runs
    assert "resumed after step 6" in said
    first, second = (json.loads((run / "summary.json").read_text()) for run in (whole, killed))
    assert {**first, "wall_seconds": 0} == {**second, "wall_seconds": 0}


def test_the_model_is_exported_on_the_way(runs):
    for run in runs[:2]:
        exported = [run / "exports" / f"step_{step:08d}" / "model.safetensors" for step in (6, 12)]
        assert exported[1].read_bytes() == (run / "checkpoint" / "model.safetensors").read_bytes()
        assert exported[0].read_bytes() != exported[1].read_bytes()


def test_only_the_newest_checkpoint_is_kept_and_nothing_half_written(runs):
    for run in runs[:2]:
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000012"]


def test_settings_that_change_the_result_are_refused_and_others_are_said(runs):
    _, killed, _ = runs
    before = (killed / "metrics.jsonl").read_bytes()
    process = start(
        killed, *SETTINGS, "--resume", "auto", "optimizer.learning_rate=1e-3", "policy.micro_batch_tokens=512"
    )
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "optimizer.learning_rate: 0.0002 -> 0.001" in output and "--allow-changes" in output
    assert "policy.micro_batch_tokens" not in output.split("change what it computes")[1]
    assert (killed / "metrics.jsonl").read_bytes() == before


def test_a_checkpoint_that_lost_a_file_is_refused_by_name(runs):
    _, killed, _ = runs
    lost = killed / "checkpoints" / "step_00000012" / "progress.json"
    kept = lost.read_bytes()
    lost.write_bytes(kept[:-20])
    process = start(killed, *SETTINGS, "--resume", "auto")
    output, _ = process.communicate(timeout=60)
    lost.write_bytes(kept)
    assert process.returncode == 2 and f"{lost}: {len(kept) - 20} bytes, was saved with {len(kept)}" in output


def newest_step(run: Path) -> int:
    return max((step_of(checkpoint) for checkpoint in complete_checkpoints(run)), default=0)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_twenty_kills_at_any_moment_lose_nothing_but_unsaved_steps(tmp_path):
    """Ten at random, from start-up on, and ten while a checkpoint is written; the end is the same bit for bit."""
    settings = (*SETTINGS, "algorithm.steps=120", "checkpoint.save_every=1", "checkpoint.export_every=0")
    whole, killed, generator = tmp_path / "whole", tmp_path / "killed", random.Random(0)
    end(start(whole, *settings))
    newest: list[int] = []
    for number in range(20):
        newest.append(newest_step(killed))
        process, folder = start(killed, *settings, "--resume", "auto"), killed / "checkpoints"
        if number % 2:
            saving = folder / f"step_{newest[-1] + generator.randint(2, 5):08d}.partial"
            kill_when(process, lambda saving=saving: saving.exists())
        else:
            moment = time.monotonic() + generator.uniform(1.0, 20.0)
            kill_when(process, lambda moment=moment: time.monotonic() > moment)
        print(f"kill {number}: {sorted(path.name for path in folder.glob('*'))}")
    assert newest == sorted(newest) and newest_step(killed) > 3  # a kill costs no checkpoint
    last = newest_step(killed)
    assert f"resumed after step {last} " in end(start(killed, *settings, "--resume", "auto"))
    steps = [[without_times(r) for r in rows(run) if r["kind"] in ("step", "rollout")] for run in (whole, killed)]
    assert len(steps[0]) == 150 and steps[0] == steps[1]
    weights = [(run / "checkpoint" / "model.safetensors").read_bytes() for run in (whole, killed)]
    assert weights[0] == weights[1]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["pp=2,ep=1", "ep=1"])
def test_another_layout_goes_on_and_learns(runs, tmp_path, layout):
    killed = tmp_path / "moved"
    shutil.copytree(runs[1], killed)
    sizes = dict(part.split("=") for part in layout.split(","))
    changes = [f"policy.layout={json.dumps({k: int(v) for k, v in sizes.items()})}", "algorithm.steps=16"]
    said = end(start(killed, *SETTINGS, *changes, "--resume", "auto"))
    assert "changed since the run was interrupted: policy.layout.ep: 2 -> 1" in said
    steps = rows(killed, "step")
    assert [row["step"] for row in steps] == list(range(1, 17))
    assert steps[10]["loss"] == pytest.approx(rows(runs[0], "step")[10]["loss"], rel=1e-4)
    assert json.loads((killed / "summary.json").read_text())["weight_sync_mismatches"] == 0
