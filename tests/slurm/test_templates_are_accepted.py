"""Every template: shellcheck finds nothing, Slurm would take it, and mistakes end it at once with exit code 2."""

import subprocess

import pytest
from cluster_jobs import ROOT

TEMPLATES = sorted(path.name for path in (ROOT / "slurm").glob("*.sbatch"))
WORDS = {
    "convert.sbatch": (),
    "eval.sbatch": ("CHECKPOINT", "TASKS"),
    "prepare_data.sbatch": (),
    "ablation_array.sbatch": ("GRID", "OUT"),
}


def test_shellcheck_finds_nothing(cluster):
    files = [path for path in sorted((ROOT / "slurm").iterdir()) if path.suffix in (".sbatch", ".sh", ".env")]
    done = subprocess.run(["shellcheck", "-x", *files], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("template", TEMPLATES)
def test_slurm_would_take_the_template_as_it_is(cluster, template):
    done = cluster.command("sbatch", "--test-only", f"slurm/{template}")
    assert done.returncode == 0, done.stderr
    assert "to start at" in done.stderr


@pytest.mark.slow
def test_mistakes_reach_scontrol_and_the_output_of_the_job(whole, tmp_path):
    no_such = tmp_path / "no_such"
    mistakes = {
        ("slurm/convert.sbatch", "sideways"): "hf_to_megatron or megatron_to_hf, not 'sideways'",
        ("slurm/convert.sbatch", "hf_to_megatron", "--hf", no_such, "--out", tmp_path / "out"): str(no_such),
        ("slurm/eval.sbatch", "examples/tiny_base"): "needs CHECKPOINT and TASKS",
        ("slurm/eval.sbatch", "examples/tiny_base", no_such): str(no_such),
        ("slurm/ablation_array.sbatch", "examples/lab/compare.yaml", tmp_path / "runs"): "not an array",
    }
    jobs = {
        whole.submit(f"--output={tmp_path}/{number}", *words): (tmp_path / str(number), message)
        for number, (words, message) in enumerate(mistakes.items())
    }
    for job, (output, message) in jobs.items():
        facts = whole.wait(job)
        assert (facts["JobState"], facts["ExitCode"]) == ("FAILED", "2:0"), output.read_text()
        assert message in output.read_text()
