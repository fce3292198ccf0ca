"""A killed asynchronous run goes on: the planned steps, every trajectory accounted for, the bound kept."""

import json
import shutil

from test_a_killed_run_goes_on import end, kill_when, start
from test_a_run_from_start_to_report import SHORT, rows

from megatron_vespo.checkpoint.check import check_folder
from megatron_vespo.orchestration.checkpoints import complete_checkpoints
from megatron_vespo.rollout.trajectory_file import read_trajectories

STEPS, BOUND = 16, 7
SETTINGS = (
    *SHORT,
    f"algorithm.steps={STEPS}",
    f"algorithm.asynchronous={{sync_every: 2, max_staleness: {BOUND}}}",
    "routing.replay=R3",
    "checkpoint.save_every=3",
    "checkpoint.export_every=3",
    "checkpoint.keep_last=5",
    "evaluation.every_steps=0",
)


def test_killed_with_groups_in_every_state(tmp_path):
    run = tmp_path / "killed"
    process = start(run, *SETTINGS)
    complete, metrics = run / "checkpoints" / "step_00000006" / "complete.json", run / "metrics.jsonl"
    kill_when(process, lambda: complete.exists() and '"kind": "step", "step": 7' in metrics.read_text())
    saved = json.loads((complete.parent / "progress.json").read_text())
    waiting = read_trajectories(complete.parent)
    assert len(waiting) == sum(saved["mini_batches"])
    assert all(t.engine_routes.recorded.all() for t in waiting)
    # As if it had been killed before the export of that step was written.
    newest = complete_checkpoints(run)[-1]
    exported = run / "exports" / newest.name
    if exported.exists():
        shutil.rmtree(exported)

    said = end(start(run, *SETTINGS, "--resume", "auto"))
    assert "resumed after step" in said
    check_folder(exported)
    steps, summary = rows(run, "step"), json.loads((run / "summary.json").read_text())
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    assert max(row["staleness"] for row in steps) <= BOUND
    assert summary["status"] == "finished" and summary["weight_sync_mismatches"] == 0
    assert summary["trajectories_generated"] == summary["trajectories_used"] == STEPS * 16
    assert summary["trajectories_left"] == summary["dropped_for_age"] == 0
    fingerprints = [row["response/fingerprint"] for row in rows(run, "rollout")]
    assert len(set(fingerprints)) == STEPS
