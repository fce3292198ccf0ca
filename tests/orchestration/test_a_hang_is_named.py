"""A rank of a real run stops answering: status tells who waits for it, then the run ends with the cause and all stacks."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from test_every_end_leaves_nothing import Run

from megatron_vespo.observability.status import read_status

DEADLINE = 40
"""Longer than any step of this run takes on a busy machine; what is stopped never answers."""


@pytest.fixture
def run(tmp_path):
    settings = (f"policy.step_timeout_seconds={DEADLINE}", "reward.workers=2", "checkpoint.save_every=0")
    run = Run("examples/tiny_base", tmp_path / "run", *settings)
    yield run
    if run.process.poll() is None:
        for process in [*run.family(), run.process]:
            process.kill()
    run.process.wait()
    shutil.rmtree(run.temporary)


def wait_for(folder, condition):
    """Poll the run's status until `condition` of it."""
    deadline = time.monotonic() + 120
    while not condition(status := read_status(folder)):
        assert time.monotonic() < deadline, status
        time.sleep(0.1)
    return status


def test_a_stopped_rank_is_named_and_every_other_process_tells_where_it_is(run, tmp_path):
    folder = tmp_path / "run"
    run.read_until("step 1/")
    parts = {part.name: part for part in read_status(folder).parts}
    assert set(parts) == {
        *("driver", "policy rank 0", "policy rank 1", "graders 0", "graders 1"),
        *("engine 0", "engine 0 actor", "engine 0 scheduler", "engine 0 detokenizer"),
    }
    assert {part.state for part in parts.values()} == {"alive"}
    assert parts["driver"].pid == run.process.pid
    family = run.family()

    os.kill(parts["policy rank 1"].pid, signal.SIGSTOP)
    # A process stops when the kernel comes to it, not when it is told to.
    wait_for(folder, lambda now: any(part.state == "stopped" for part in now.parts))
    status = wait_for(folder, lambda now: any("policy rank 1" in wait.owners for wait in now.waits))
    wait = next(wait for wait in status.waits if "policy rank 1" in wait.owners)
    assert status.state == "running" and wait.deadline_seconds == DEADLINE
    assert [part.name for part in status.parts if part.state == "stopped"] == ["policy rank 1"]
    command = [sys.executable, "-m", "megatron_vespo", "status", str(folder)]
    shown = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "160"}).stdout
    assert wait.what in shown and re.search(r"policy rank 1 +\d+ +stopped", shown)

    stacks = folder / "stacks"
    wait_for(folder, lambda _: (stacks / "waits.txt").exists())
    run.end(family)
    assert run.process.returncode == 1
    cause = f"not finished after {DEADLINE} s: policy rank 1 is stopped (SIGSTOP or a debugger)"
    assert run.lines[-1] == f"error: {wait.what}: {cause}; stacks of all parts: {stacks}"
    runs = {
        "driver": "run_interruptible",
        "policy_rank_0": "policy_rank.py",
        "engine_0": "run_server",
        "engine_0_scheduler": "run_scheduler_process",
        "engine_0_detokenizer": "run_detokenizer_process",
        "engine_0_actor": "hold",
        "graders_0": "receive",
        "graders_1": "receive",
        "tasks": "run_once",
        "waits": wait.what,
    }
    for name, words in runs.items():
        assert words in (stacks / f"{name}.txt").read_text(), name
    assert "stopped" in (stacks / "policy_rank_1.txt").read_text()
    ended = read_status(folder)
    assert ended.state == "failed" and cause in ended.message
    assert cause in json.loads((folder / "summary.json").read_text())["status"]
