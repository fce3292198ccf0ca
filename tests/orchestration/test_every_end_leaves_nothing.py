"""However a run ends, within 15 s its processes, ports, shared memory and Ray session are gone, and the cause is said."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from tiny_base import write_tiny_base

from megatron_vespo.rollout import process_tree

STOP_SECONDS = 15


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    write_tiny_base(folder)
    return folder


class Run:
    """A training run as a user starts it, followed by its output."""

    def __init__(self, base: Path, folder: Path, *overrides: str) -> None:
        # Of its own, to see what stays in it; short, because Ray's sockets lie in it.
        self.temporary = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))
        settings = [
            *("examples/quickstart.yaml", f"model.path={base}", f"run_dir={folder}", "observability.console=plain"),
            *("data.max_prompt_tokens=128", "rollout.max_response_tokens=96", "evaluation.prompts=4"),
            *("evaluation.exclude=[]", "algorithm.steps=4000", "policy.max_restarts=0"),
            *("rollout.engine.max_restarts=0", *overrides),
        ]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "megatron_vespo", "train", *settings],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env=os.environ | {"TMPDIR": str(self.temporary)},
        )
        self.lines: list[str] = []

    def read_until(self, text: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if text in line:
                return
        raise AssertionError(f"the run ended before {text!r}:\n" + "\n".join(self.lines[-20:]))

    def family(self) -> list[psutil.Process]:
        """Everything that descends from the run, Ray's actors and SGLang's processes included."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.shared_memory = process_tree.shared_memory_of(family)
        return family

    def find(self, text: str) -> psutil.Process:
        return next(p for p in self.family() if text in " ".join(p.cmdline()) or text in p.name())

    def end(self, family: list[psutil.Process]) -> None:
        """Wait for the end; nothing of the run may be there after STOP_SECONDS."""
        started = time.monotonic()
        output, _ = self.process.communicate(timeout=STOP_SECONDS * 3)
        seconds = time.monotonic() - started
        self.lines += output.splitlines()
        _, alive = psutil.wait_procs(family, timeout=max(0.1, STOP_SECONDS - seconds))
        assert not alive, f"still there: {[(p.pid, p.name()) for p in alive]}"
        assert seconds < STOP_SECONDS, f"took {seconds:.1f} s"
        assert not [file for file in self.shared_memory if file.exists()]
        # torch's compiler cache is one folder a user, shared by all runs.
        left = [path.name for path in self.temporary.iterdir() if not path.name.startswith("torchinductor")]
        assert not left, left
        assert self.process.returncode != 0


@pytest.fixture
def run(base, tmp_path):
    run = Run(base, tmp_path / "run")
    yield run
    if run.process.poll() is None:
        family = run.family()
        for process in [*family, run.process]:
            process.kill()
    run.process.wait()
    shutil.rmtree(run.temporary)


@pytest.mark.parametrize(
    ("number", "moment"),
    [pytest.param(signal.SIGINT, "generating", marks=pytest.mark.slow), (signal.SIGTERM, "starting engine")],
)
def test_a_signal_ends_everything(run, number, moment):
    run.read_until(moment)
    time.sleep(2)
    family = run.family()
    run.process.send_signal(number)
    run.end(family)
    assert run.process.returncode == 128 + number
    assert run.lines[-1] == f"error: stopped by {signal.Signals(number).name}"


@pytest.mark.parametrize(
    ("victim", "cause"),
    [
        pytest.param("PolicyRank", "error: policy rank", marks=pytest.mark.slow),
        ("megatron_vespo.rollout.serve", "error: engine 0: "),
    ],
)
def test_the_part_that_died_is_named_last(run, victim, cause):
    run.read_until("step 1/")
    family = run.family()
    os.kill(run.find(victim).pid, signal.SIGKILL)
    run.end(family)
    assert run.process.returncode == 1
    assert run.lines[-1].startswith(cause), run.lines[-5:]
