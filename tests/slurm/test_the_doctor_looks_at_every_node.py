"""`srun ... megatron-vespo doctor`: one examination on each node of a job, told apart by srun's labels."""

import sys

import pytest

CONFIG = "examples/quickstart.yaml"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_each_node_has_its_own_findings(whole):
    words = ["--nodes=2", "--ntasks-per-node=1", "--label", "--kill-on-bad-exit=0"]
    done = whole.command("srun", *words, sys.executable, "-m", "megatron_vespo", "doctor", CONFIG)
    for task in (0, 1):
        lines = [line for line in done.stdout.splitlines() if line.startswith(f"{task}: ")]
        assert any("model and tasks" in line and "Qwen3MoeForCausalLM" in line for line in lines), (
            done.stdout + done.stderr
        )
