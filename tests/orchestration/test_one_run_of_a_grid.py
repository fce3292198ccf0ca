"""`megatron-vespo ablate --only I` is the I-th line of its --dry-run; comparing needs no run."""

import subprocess
import sys
from pathlib import Path


def ablate(out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_vespo", "ablate", "examples/lab/compare.yaml", "--out", str(out), *words]
    return subprocess.run(command, capture_output=True, text=True)


def test_every_number_is_its_line_and_no_other_is_taken(tmp_path):
    lines = ablate(tmp_path, "--dry-run").stdout.splitlines()
    assert len(lines) == 9  # three variants, three seeds
    for number in (0, 8):
        assert ablate(tmp_path, "--dry-run", "--only", str(number)).stdout.splitlines() == [lines[number]]
    beyond = ablate(tmp_path, "--dry-run", "--only", "9")
    assert beyond.returncode == 2
    assert "--only 9: examples/lab/compare.yaml has 9 runs, 0 to 8" in beyond.stderr


def test_comparing_before_any_run_says_that_there_is_none(tmp_path):
    done = ablate(tmp_path, "--minutes", "0")
    assert done.returncode == 0, done.stderr
    assert "no run has begun" in done.stdout
