"""Jobs on the tests' cluster: submitted, watched, and what they leave."""

import importlib.util
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import environ
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
DEADLINE_SECONDS = 1800.0
"""For anything: long, so that a busy machine fails no test."""
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def _tool():
    sys.path.insert(0, str(ROOT / "tools"))  # where the tool finds the files beside it
    spec = importlib.util.spec_from_file_location("slurm_sandbox", ROOT / "tools" / "slurm_sandbox.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


slurm_sandbox = _tool()


def until(ready: Callable[[], bool], what: str, seconds: float = DEADLINE_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.2)


class Cluster:
    """The sandbox, as one who submits jobs sees it."""

    def __init__(self, sandbox) -> None:
        self.folder: Path = sandbox.folder
        self.nodes: list[str] = sandbox.names()
        site = sandbox.folder.parent / "cluster.env"
        interface = "eth0" if sandbox.mode == "namespaces" else "lo"
        settings = ["MODULES=", f"VENV={sys.prefix}", "CONTAINER=none", f"NETWORK_INTERFACE={interface}"]
        settings += [f"SHARED_SCRATCH={sandbox.folder.parent}/shared", f"LOCAL_SCRATCH={sandbox.folder}/local"]
        settings += [f"RAY_OBJECT_STORE_BYTES={256 * 2**20}"]
        site.write_text("\n".join(settings) + "\n")
        python_path = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.environment = environ | sandbox.environment | python_path | {"CLUSTER_ENV": str(site)}

    @property
    def sandbox(self):
        """As it is now: the tool, run as a command, changes it too."""
        return slurm_sandbox.load(self.folder)

    def command(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        """Run in the repository, with this cluster as its Slurm."""
        return subprocess.run(
            [str(word) for word in words], cwd=ROOT, env=self.environment, capture_output=True, text=True
        )

    def submit(self, *words: str | Path) -> str:
        """Number of the job: sbatch with these options, template and arguments."""
        done = self.command("sbatch", "--parsable", *words)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def facts(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says of a job, or of one task of an array ("7_0")."""
        words = self.command("scontrol", "show", "job", "-o", job).stdout.split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, job: str) -> str:
        return self.facts(job).get("JobState", "")

    def wait(self, job: str, seconds: float = DEADLINE_SECONDS) -> dict[str, str]:
        """Until the job is over; what is known of it then."""
        until(lambda: self.state(job) in OVER, f"job {job} is over", seconds)
        return self.facts(job)

    def processes(self, node: str) -> list[str]:
        """Command lines of what runs on the node beside Slurm's own."""
        machine = self.sandbox.process(node)
        found = []
        for process in machine.children(recursive=True) if machine else []:
            try:
                words = process.cmdline()
            except psutil.NoSuchProcess:
                continue
            if words and not re.match(r"slurmd|bash -c set -e\nread|sleep infinity", " ".join(words)):
                found.append(" ".join(words))
        return found

    def local_files(self, node: str) -> list[Path]:
        """In the node's local scratch."""
        own = self.sandbox.folder / "nodes" / node / "local"
        folder = own if self.sandbox.mode == "namespaces" else self.sandbox.folder / "local"
        return list(folder.iterdir())

    def mend(self) -> None:
        """No job, all nodes idle."""
        self.command("scancel", "--user", psutil.Process().username())
        for node in self.nodes:
            if self.sandbox.process(node) is None:
                slurm_sandbox.boot_node(self.sandbox, node)
        until(lambda: all(self.sandbox.state_of(node) == "idle" for node in self.nodes), "all nodes are idle")


@contextmanager
def running_cluster(nodes: int) -> Iterator[Cluster]:
    """node1 and so on, each with 8 GPUs and 8 processors as the scheduler counts them; gone at the end, after SIGTERM too."""
    if lacking := slurm_sandbox.missing():
        pytest.skip(f"Slurm is not installed ({', '.join(lacking)}): `make slurm-deps` as root")
    # Its path is short, since sockets are made below it; pytest's own folders are not.
    folder = Path(tempfile.mkdtemp(prefix="sb-"))
    former = signal.signal(signal.SIGTERM, lambda *_: pytest.exit("SIGTERM", returncode=128 + signal.SIGTERM))
    try:
        sandbox = slurm_sandbox.start_sandbox(folder / "box", nodes)
        try:
            yield Cluster(sandbox)
        finally:
            slurm_sandbox.stop_sandbox(sandbox)
    finally:
        shutil.rmtree(folder)
        signal.signal(signal.SIGTERM, former)
