"""Parts of a real asynchronous run are killed and stopped at random: it takes all its steps on all its prompts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


def chaos(folder: Path, kills: int, hangs: int, minutes: float, *settings: str) -> dict:
    command = [sys.executable, "tools/chaos.py", "--config", "examples/chaos.yaml", "--out", folder / "run"]
    command += ["--kills", kills, "--hangs", hangs, "--minutes", minutes, "--json", folder / "chaos.json", *settings]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60 * minutes + 120)
    log = folder / "run.log"
    assert done.returncode == 0, done.stdout + done.stderr + (log.read_text()[-3000:] if log.exists() else "")
    return json.loads((folder / "chaos.json").read_text())


@pytest.mark.slow
def test_a_few_deeds(tmp_path):
    outcome = chaos(tmp_path, 2, 1, 8, "algorithm.steps=30")
    assert outcome["steps"] == 30 and outcome["prompts_used_once"] == outcome["prompts_expected"] == 240
    assert len(outcome["deeds"]) == 3 and outcome["orphans"] == 0 and outcome["wrong"] == []


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_twenty_kills_and_ten_hangs(tmp_path):
    outcome = chaos(tmp_path, 20, 10, 45)
    assert outcome["steps"] == 180 and outcome["prompts_used_once"] == outcome["prompts_expected"] == 1440
    assert len(outcome["deeds"]) == 30 and outcome["orphans"] == 0 and outcome["wrong"] == []
