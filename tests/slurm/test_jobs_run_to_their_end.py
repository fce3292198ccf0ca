"""The templates do their work on a cluster, share its nodes, and leave nothing on them."""

import json
import sys
from pathlib import Path

import pytest
import yaml
from cluster_jobs import ROOT, Cluster, until
from safetensors import safe_open

pytestmark = [pytest.mark.slow, pytest.mark.timeout(6000)]

HALF_A_NODE = ("--nodelist=node1", "--gpus-per-node=4", "--cpus-per-task=4")
GRID = {
    "title": "Two seeds",
    "config": str(ROOT / "examples" / "quickstart.yaml"),
    "set": {
        "algorithm.steps": 4,
        "algorithm.prompts_per_step": 4,
        "rollout.group_size": 4,
        "policy.ranks": 1,
        "policy.layout": {"ep": 1},
        "evaluation.prompts": 8,
        "evaluation.exclude": [],
        "evaluation.every_steps": 0,
        "observability.tensorboard": False,
    },
    "variants": {"vespo": {}},
    "seeds": [1, 2],
}


def is_clean(cluster: Cluster, node: str) -> bool:
    return not cluster.processes(node) and not cluster.local_files(node)


def tensor_names(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "numpy") as file:
        return set(file.keys())


def test_a_checkpoint_goes_to_megatron_and_back(whole, tmp_path):
    base, there, back = ROOT / "examples" / "tiny_base", tmp_path / "megatron", tmp_path / "hf"
    forth = ("hf_to_megatron", "--hf", base, "--out", there)
    first = whole.submit(f"--output={tmp_path}/1", "slurm/convert.sbatch", *forth)
    home = ("megatron_to_hf", "--megatron", there, "--out", back)
    after = f"--dependency=afterok:{first}"
    second = whole.submit(f"--output={tmp_path}/2", after, "slurm/convert.sbatch", *home)
    facts = whole.wait(second)
    assert (facts["JobState"], facts["ExitCode"]) == ("COMPLETED", "0:0")
    assert tensor_names(back) == tensor_names(base)


def test_an_array_trains_a_grid_two_runs_at_once_on_one_node(whole, tmp_path):
    grid, runs = tmp_path / "grid.yaml", tmp_path / "runs"
    grid.write_text(yaml.safe_dump(GRID))
    array = ("--array=0-1", *HALF_A_NODE, f"--output={tmp_path}/%a", "slurm/ablation_array.sbatch", grid, runs)
    job = whole.submit(*array)
    tasks = [whole.wait(f"{job}_{task}") for task in (0, 1)]
    assert [task["ExitCode"] for task in tasks] == ["0:0", "0:0"], (tmp_path / "0").read_text()
    assert max(task["StartTime"] for task in tasks) < min(task["EndTime"] for task in tasks)
    until(lambda: is_clean(whole, "node1"), "nothing is left on node1")
    for task, seed in enumerate(GRID["seeds"]):
        rows = [json.loads(row) for row in (runs / "vespo" / f"seed_{seed}" / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows if row["kind"] == "step"] == [1, 2, 3, 4]
        assert (runs / "slurm" / f"task_{task}" / "attempt_0" / "node1.run.log").exists()

    page = (sys.executable, "-m", "megatron_vespo", "ablate", grid, "--out", runs, "--minutes", "0")
    assert whole.command(*page).returncode == 0
    figures = json.loads((runs / "comparison.json").read_text())
    assert [(row["name"], row["seeds"]) for row in figures] == [("vespo", 2)]

    written = (runs / "vespo" / "seed_1" / "metrics.jsonl").stat().st_mtime_ns
    again = whole.submit("--array=0", *array[1:])
    assert whole.wait(f"{again}_0")["ExitCode"] == "0:0"
    assert (runs / "vespo" / "seed_1" / "metrics.jsonl").stat().st_mtime_ns == written


def test_a_cancelled_job_leaves_nothing(whole, tmp_path):
    words = ("examples/tiny_base", "examples/tiny_base.eval.yaml", "evaluation.exclude=[]")
    job = whole.submit(f"--output={tmp_path}/out", "--nodelist=node1", "slurm/eval.sbatch", *words)
    until(lambda: any("rollout.serve" in line for line in whole.processes("node1")), "an engine starts")
    assert whole.local_files("node1")
    assert whole.command("scancel", job).returncode == 0
    assert whole.wait(job)["JobState"] == "CANCELLED"
    until(lambda: is_clean(whole, "node1"), "nothing is left on node1")
