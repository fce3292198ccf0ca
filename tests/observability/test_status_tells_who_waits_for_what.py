"""`megatron-vespo status` tells from another process what a run does, and what became of it."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_vespo import presence
from megatron_vespo.config import ConfigError
from megatron_vespo.observability.status import MARKER, read_status
from megatron_vespo.orchestration.status_file import Elsewhere, StatusFile
from megatron_vespo.orchestration.supervision import Supervisor

DRIVER = """
import asyncio, sys
from pathlib import Path
from megatron_vespo.orchestration.status_file import StatusFile
from megatron_vespo.orchestration.supervision import Supervisor
from megatron_vespo.presence import announce

async def main():
    folder = Path(sys.argv[1])
    announce(folder / "parts", "driver")
    supervisor = Supervisor()
    StatusFile(folder, folder / "parts", supervisor)
    never = asyncio.Event().wait
    outer = asyncio.ensure_future(supervisor.wait("send weights", never(), 600, "policy and engine"))
    await asyncio.sleep(0.01)
    inner = asyncio.ensure_future(supervisor.wait("gather weights", never(), 300, "policy rank 1"))
    await asyncio.gather(outer, inner)

asyncio.run(main())
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "parts").mkdir()
    (tmp_path / MARKER).touch()
    (tmp_path / "config.yaml").write_text("algorithm: {steps: 120}\n")
    rows = [{"kind": "step", "step": 7, "timestamp": time.time() - 300}, {"kind": "sync", "step": 7, "timestamp": 0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "step", "st')
    return tmp_path


@pytest.fixture
def driver(folder):
    process = subprocess.Popen([sys.executable, "-c", DRIVER, str(folder)])
    until(lambda: (folder / "status.json").exists() and len(read_status(folder).waits) == 2)
    yield process
    process.kill()
    process.wait()


def until(condition) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def printed(folder: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "megatron_vespo", "status", str(folder), *options]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "160"})


def test_a_run_that_goes_on_shows_its_step_its_processes_and_its_waits_the_oldest_first(folder, driver):
    shown = json.loads(printed(folder, "--json").stdout)
    assert (shown["state"], shown["step"], shown["steps"]) == ("running", 7, 120)
    assert 300 <= shown["last_step_seconds_ago"] < 900
    assert shown["parts"] == [{"name": "driver", "pid": driver.pid, "state": "alive", "host": socket.gethostname()}]
    assert [(wait["what"], wait["owners"], wait["deadline_seconds"]) for wait in shown["waits"]] == [
        ("send weights", ["policy and engine"], 600),
        ("gather weights", ["policy rank 1"], 300),
    ]
    lines = printed(folder).stdout.splitlines()
    assert lines[0].startswith(f"{folder}: running, step 7 of 120, the last 5 min ago")
    assert any(line.split()[:3] == ["driver", str(driver.pid), "alive"] for line in lines)
    assert any(line.startswith("gather weights") and line.rstrip().endswith("5 min") for line in lines)


def test_a_stopped_driver_and_a_killed_one_are_told_apart(folder, driver):
    driver.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, driver.pid, os.WSTOPPED)
    status = read_status(folder)
    assert status.state == "running" and "stopped" in status.message and status.parts[0].state == "stopped"
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    status = read_status(folder)
    assert status.state == "driver gone" and "--resume auto" in status.message and status.parts[0].state == "gone"


def test_another_process_with_the_drivers_number_is_not_the_driver(folder, driver):
    driver.kill()
    driver.wait()
    record = folder / "parts" / "driver.json"
    values = json.loads(record.read_text())
    record.write_text(json.dumps(values | {"pid": os.getpid(), "created": values["created"] - 3600}))
    assert read_status(folder).state == "driver gone"


@pytest.mark.parametrize(("error", "state"), [(None, "finished"), (RuntimeError("engine: out of memory"), "failed")])
def test_how_a_run_ended_is_told(folder, error, state):
    StatusFile(folder, folder / "parts", Supervisor()).end(error)
    status = read_status(folder)
    assert (status.state, status.message) == (state, str(error or ""))
    assert status.parts == [] and status.waits == []


def test_runs_of_a_grid_are_told_one_by_one(folder, tmp_path_factory):
    second = tmp_path_factory.mktemp("second")
    (second / MARKER).touch()
    file = StatusFile(folder, folder / "parts", Supervisor())
    presence.announce(folder / "parts", "driver")
    try:
        file.follow(second)
        until(lambda: (second / "status.json").exists() and read_status(second).state == "running")
        assert read_status(folder).state == "finished"
    finally:
        file.end(None)
    assert [read_status(one).state for one in (folder, second)] == ["finished", "finished"]


def test_short_waits_are_not_each_written(folder):
    """A status of 2,000 waits in one second costs a few writes."""
    writes = []

    class Counting(StatusFile):
        def _write(self, *arguments):
            writes.append(1)
            super()._write(*arguments)

    async def many():
        for number in range(2000):
            await supervisor.wait(f"wait {number}", asyncio.sleep(0), 60)

    supervisor = Supervisor()
    started = time.monotonic()
    file = Counting(folder, folder / "parts", supervisor)
    asyncio.run(many())
    file.end(None)
    assert len(writes) <= 3 + (time.monotonic() - started) / 0.5


def test_what_is_not_a_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="not the folder of a run"):
        read_status(tmp_path)
    refused = printed(tmp_path / "nothing")
    assert refused.returncode == 2 and refused.stderr.startswith("error: ")


def test_a_run_before_its_first_process_is_not_started(folder):
    assert read_status(folder).state == "not started"
    (folder / "summary.json").write_text(json.dumps({"status": "failed: engine: out of memory"}))
    status = read_status(folder)
    assert (status.state, status.message) == ("failed", "engine: out of memory")


def test_processes_of_other_hosts_are_told_as_those_told_them(folder):
    file = StatusFile(folder, folder / "parts", Supervisor())
    file.elsewhere = [Elsewhere("node2", "engine 0", 4711, "stopped")]
    until(lambda: len(read_status(folder).parts) == 1)
    (part,) = read_status(folder).parts
    assert (part.name, part.host, part.pid, part.state) == ("engine 0", "node2", 4711, "stopped")
    old = json.loads((folder / "status.json").read_text()) | {"written": time.time() - 600}
    file.end(None)
    (folder / "status.json").write_text(json.dumps(old))
    assert [part.state for part in read_status(folder).parts] == ["unknown"]
