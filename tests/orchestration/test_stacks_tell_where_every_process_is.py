"""Every process of a run tells its stacks, whatever it is busy with; one that cannot is named with the reason."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vespo import presence
from megatron_vespo.orchestration.stacks import collect, collect_run, in_few_words
from megatron_vespo.orchestration.supervision import RunFailed, Supervisor, describe_waits
from megatron_vespo.presence import Process

PROGRAM = """
import ctypes, sys, threading, time
from pathlib import Path
from megatron_vespo.presence import announce

def sleeps_in_python():
    print("ready", flush=True)
    time.sleep(600)

def holds_the_lock_in_native_code():
    print("ready", flush=True)
    while True:  # a signal ends each sleep
        ctypes.PyDLL(None).sleep(600)

announce(Path(sys.argv[1]), sys.argv[2])
globals()[sys.argv[3]]()
"""


@pytest.fixture
def start(tmp_path):
    """Starts a process that makes itself known in tmp_path / "parts" and then runs the named function."""
    started = []
    (tmp_path / "parts").mkdir()

    def start(name: str, function: str) -> subprocess.Popen:
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / "parts"), name, function]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def found_in(folder: Path) -> dict:
    return {one.process.name: one for one in collect(presence.processes(folder / "parts"), folder / "stacks")}


def test_a_process_tells_where_it_is_even_while_it_holds_the_interpreters_lock(start, tmp_path):
    start("policy rank 0", "sleeps_in_python")
    start("policy rank 1", "holds_the_lock_in_native_code")
    for _ in range(2):  # the second time it tells only what is new
        found = found_in(tmp_path)
        for name, function in (
            ("policy rank 0", "sleeps_in_python"),
            ("policy rank 1", "holds_the_lock_in_native_code"),
        ):
            text = (tmp_path / "stacks" / f"{name.replace(' ', '_')}.txt").read_text()
            assert found[name].state == "alive" and text.startswith(f"{name}, pid ")
            assert text.count(f" in {function}\n") == 1
    assert in_few_words(list(found.values()), ["policy rank 1"]).endswith("waited for policy rank 1")


def test_who_is_stopped_or_gone_is_named_and_holds_up_nobody(start, tmp_path):
    start("driver", "sleeps_in_python")
    stopped, gone = start("engine", "sleeps_in_python"), start("graders 0", "sleeps_in_python")
    stopped.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, stopped.pid, os.WSTOPPED)
    gone.kill()
    gone.wait()
    found = found_in(tmp_path)
    assert [found[name].stacks == "" for name in ("driver", "engine", "graders 0")] == [False, True, True]
    words = in_few_words(list(found.values()), ["engine"])
    assert words == "engine is stopped (SIGSTOP or a debugger), graders 0 is gone"
    assert "stopped" in (tmp_path / "stacks" / "engine.txt").read_text()
    stopped.send_signal(signal.SIGCONT)


def test_a_process_that_does_not_handle_the_signal_yet_survives(tmp_path):
    process = subprocess.Popen(["sleep", "600"])
    try:
        created = presence.psutil.Process(process.pid).create_time()
        known = Process("engine", process.pid, created, tmp_path / "engine.stacks")
        (found,) = collect([known], tmp_path)
        assert process.poll() is None and "not so far yet" in found.state
    finally:
        process.kill()
        process.wait()


def test_an_expired_wait_tells_the_cause_and_writes_tasks_and_waits(start, tmp_path):
    start("policy rank 1", "sleeps_in_python").send_signal(signal.SIGSTOP)

    async def sample_responses():
        await asyncio.Event().wait()

    async def scenario():
        async def diagnose(wait):
            waits = describe_waits(supervisor.waits)
            found = await collect_run(tmp_path / "parts", tmp_path / "stacks", waits)
            return in_few_words(found, wait.owners)

        supervisor = Supervisor(diagnose)
        outer = supervisor.wait("send weights", sample_responses(), 60, "engine")
        inner = supervisor.wait("gather weights", sample_responses(), 0.1, "policy")
        await asyncio.gather(outer, inner)

    with pytest.raises(RunFailed) as error:
        asyncio.run(scenario())
    assert str(error.value).startswith("gather weights: not finished after 0 s: policy rank 1 is stopped")
    assert "sample_responses" in (tmp_path / "stacks" / "tasks.txt").read_text()
    first, second = (tmp_path / "stacks" / "waits.txt").read_text().splitlines()
    assert first.startswith("send weights: for ") and first.endswith(" of 60 s, of engine")
    assert second.startswith("gather weights: for ")


COLLECTS = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from megatron_vespo import presence
from megatron_vespo.orchestration import stacks

folder = Path(sys.argv[1])
presence.announce(folder, "driver")
stacks.POLL_SECONDS = 0.0

def collects():
    for _ in range(1000):
        (found,) = stacks.collect(presence.processes(folder), folder)
        assert "in collects" in found.stacks and "in result" in found.stacks, found.stacks

ThreadPoolExecutor().submit(collects).result()
print("alive")
"""


def test_who_collects_survives_its_own_stacks(tmp_path):
    """A signal's handler on another thread would walk through the frames of the one that collects, and crash sooner or later."""
    done = subprocess.run([sys.executable, "-c", COLLECTS, str(tmp_path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr
