"""`megatron-vespo submit` asks for what the configuration needs, and hands Slurm a script that it takes."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vespo.config import ConfigError, TrainConfig, load_config
from megatron_vespo.submit import nodes_of

CONFIG = "examples/quickstart.yaml"


@pytest.mark.parametrize(
    ("overrides", "gpus_per_node", "nodes"),
    [
        ((), None, 1),  # 2 ranks and an engine of 1
        (("cluster.policy_nodes=6", "cluster.engine_nodes=2"), None, 8),
        (("policy.ranks=16", "rollout.engine.count=4", "rollout.engine.tensor_parallel=4"), 8, 4),
        (
            ("policy.ranks=4", "rollout.engine.count=3", "rollout.engine.tensor_parallel=2"),
            8,
            2,
        ),  # 2 fit beside the ranks
        (
            ("policy.ranks=2", "rollout.engine.count=3", "rollout.engine.tensor_parallel=2"),
            3,
            4,
        ),  # 1 GPU is left of each 3
    ],
)
def test_as_many_nodes_as_the_run_needs(overrides, gpus_per_node, nodes):
    assert nodes_of(load_config(TrainConfig, CONFIG, list(overrides)), gpus_per_node) == nodes


def test_an_engine_that_is_larger_than_a_node_is_refused():
    config = load_config(TrainConfig, CONFIG, ["rollout.engine.tensor_parallel=8"])
    with pytest.raises(ConfigError, match="tensor_parallel: 8, but a node has 4 GPUs"):
        nodes_of(config, 4)


def test_a_dry_run_prints_a_script_that_slurm_takes(cluster, tmp_path):
    words = [CONFIG, "seed=2", "algorithm.objective={aggregation: token_mean}"]
    asked = ["--nodes", "2", "--gpus-per-node", "4", "--time", "1:00:00"]
    done = cluster.command(sys.executable, "-m", "megatron_vespo", "submit", *words, *asked, "--dry-run")
    assert done.returncode == 0, done.stderr
    for line in ("#SBATCH --nodes=2", "#SBATCH --gpus-per-node=4", "#SBATCH --time=1:00:00", "#SBATCH --requeue"):
        assert done.stdout.splitlines().count(line) == 1
    script = tmp_path / "job.sbatch"
    script.write_text(done.stdout)
    assert cluster.command("sbatch", "--test-only", script).returncode == 0
    printed = subprocess.run(
        ["bash", "-c", f'{next(x for x in done.stdout.splitlines() if x.startswith("set -- "))}; printf "%s\\n" "$@"'],
        capture_output=True,
        text=True,
    )
    assert printed.stdout.splitlines() == words


def test_a_mistake_is_told_before_anything_is_submitted(cluster):
    done = cluster.command(sys.executable, "-m", "megatron_vespo", "submit", CONFIG, "algorithm.stepz=3")
    assert done.returncode == 2 and "algorithm.stepz: unknown key" in done.stderr


def test_a_site_that_is_named_wins_over_the_variable_for_sbatch_and_in_the_job(cluster, tmp_path):
    site = tmp_path / "my site.env"
    # Sourced by `submit`, it names the account, which only sbatch reads; sourced by the job, it ends it.
    site.write_text('export SBATCH_ACCOUNT=of_the_site\n[ -z "${SLURM_JOB_ID:-}" ] || exit 7\n')
    asked = ("--nodes", "1", "--site", site)
    done = cluster.command(sys.executable, "-m", "megatron_vespo", "submit", CONFIG, f"run_dir={tmp_path}/run", *asked)
    assert done.returncode == 0, done.stderr
    facts = cluster.wait(done.stdout.split()[-1])
    assert (facts["Account"], facts["ExitCode"]) == ("of_the_site", "7:0")
    Path(facts["StdOut"]).unlink()


def test_a_site_that_is_not_there_is_a_mistake(cluster, tmp_path):
    no_such = tmp_path / "no.env"
    done = cluster.command(sys.executable, "-m", "megatron_vespo", "submit", CONFIG, "--site", no_such, "--dry-run")
    assert done.returncode == 2 and f"--site {no_such}: no such file" in done.stderr


def test_who_asks_for_a_job_sees_it(cluster, tmp_path):
    job = cluster.submit("--hold", f"--output={tmp_path}/out", "--wrap", "true")
    listed = cluster.command("squeue", "--me")
    assert job in listed.stdout.split(), listed.stdout + listed.stderr
    assert cluster.command("scancel", job).returncode == 0
