"""`ablate --results`: a small file with the figures of all runs and where they come from."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_vespo.config import AblationConfig, load_config, plan_runs

GRID = {
    "title": "Two",
    "config": str(Path("examples/quickstart.yaml").resolve()),
    "set": {"algorithm.steps": 8},
    "variants": {"vespo": {}},
    "grid": {"algorithm.staleness": [2, 4]},
    "seeds": [3, 5],
}
FINALS = {("2", 3): 0.5, ("2", 5): 0.7, ("4", 3): 0.25}
"""Of finished runs; the fourth never began."""
NOON = 1_768_478_400.0  # 2026-01-15 12:00 UTC


@pytest.fixture
def grid(tmp_path) -> Path:
    """With the folders that its runs would have left."""
    file = tmp_path / "grid.yaml"
    file.write_text(yaml.safe_dump(GRID))
    for run in plan_runs(load_config(AblationConfig, file), file, tmp_path / "out"):
        final = FINALS.get((run.point[0][1], run.seed))
        if final is None:
            continue
        folder = Path(run.config.run_dir)
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(run.config.model_dump(mode="json")))
        row = {"kind": "evaluation", "step": 8, "when": "after", "accuracy": final, "timestamp": NOON}
        (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        summary = {"status": "finished", "eval_accuracy_after": final, "wall_seconds": 1800.0}
        (folder / "summary.json").write_text(json.dumps(summary))
    return file


def test_figures_are_kept_with_how_they_were_made(grid, tmp_path):
    kept = tmp_path / "kept" / "two.json"
    command = ["ablate", str(grid), "--out", str(tmp_path / "out"), "--seed", "3", "--seed", "5"]
    words = [sys.executable, "-m", "megatron_vespo", *command, "--minutes", "0", "--results", str(kept)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    data = json.loads(kept.read_text())
    assert data["title"] == "Two" and data["date"] == "2026-01-15" and data["seeds"] == [3, 5]
    assert data["command"] == " ".join(["megatron-vespo", *command])
    assert (data["planned"], data["finished"]) == (4, 3)
    cores = len(os.sched_getaffinity(0))
    assert data["wall_hours"] == 1.5 and data["core_hours"] == 1.5 * cores and f"{cores} cores of " in data["machine"]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert commit.startswith((data["commit"] or "").removesuffix("-dirty")) and bool(commit) == bool(data["commit"])
    first, second = data["variants"]
    assert (first["method"], first["point"]) == ("vespo", {"algorithm.staleness": "2"})
    assert first["accuracy_final"] == {"mean": pytest.approx(0.6), "min": 0.5, "max": 0.7, "n": 2}
    assert second["runs"][0]["accuracy_over_steps"] == [[8.0, 0.25]]
