"""tools/slurm_sandbox.py: a real Slurm whose nodes can lose power."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from cluster_jobs import ROOT, until


def tool(folder: Path, command: str, *words: str) -> str:
    """What a command of the tool prints."""
    line = [sys.executable, "tools/slurm_sandbox.py", command, "--folder", str(folder), *words]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def mentioning(folder: Path) -> list[str]:
    """Command lines of the processes of this host in whose environment or command line the folder is."""
    found = []
    for process in psutil.process_iter():
        try:
            words = " ".join(process.cmdline())
            if str(folder) in words or process.environ().get("SLURM_CONF", "").startswith(str(folder)):
                found.append(words)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


@pytest.fixture
def folder() -> Iterator[Path]:
    """Its path is short."""
    folder = Path(tempfile.mkdtemp(prefix="sb-"))
    yield folder
    shutil.rmtree(folder)


def test_two_nodes_run_a_command_each_under_their_own_names(cluster):
    told = "echo $SLURMD_NODENAME $(hostname) $CUDA_VISIBLE_DEVICES"
    done = cluster.command("srun", "--nodes=2", "--gpus-per-node=2", "bash", "-c", told)
    assert done.returncode == 0, done.stderr
    hosts = {node: host for node, host, gpus in map(str.split, done.stdout.splitlines()) if gpus == "0,1"}
    assert set(hosts) == {"node1", "node2"}
    if cluster.sandbox.mode == "namespaces":
        assert all(node == host for node, host in hosts.items())


def test_a_test_session_that_is_told_to_end_leaves_no_cluster(cluster, folder):
    code = (
        "import time\nfrom cluster_jobs import running_cluster\n"
        "with running_cluster(1) as cluster:\n    print(cluster.folder, flush=True)\n    time.sleep(3600)\n"
    )
    paths = {"PYTHONPATH": f"{Path(__file__).parent}:{ROOT}", "TMPDIR": str(folder)}
    session = subprocess.Popen([sys.executable, "-c", code], env=os.environ | paths, stdout=subprocess.PIPE, text=True)
    box = Path(session.stdout.readline().strip())
    assert any("slurmctld" in words for words in mentioning(box))
    session.terminate()
    session.wait()
    assert mentioning(box) == [] and not box.exists()


@pytest.mark.slow
def test_a_node_that_loses_power_takes_its_job_with_it_and_comes_back(whole, tmp_path):
    marker = tmp_path / "attempts"
    script = (
        f'#!/bin/bash\necho "attempt $SLURM_RESTART_COUNT" >> {marker}\n[ -n "$SLURM_RESTART_COUNT" ] || sleep 3600\n'
    )
    (tmp_path / "job").write_text(script)
    job = whole.submit("--requeue", "--nodelist=node2", f"--output={tmp_path}/out", tmp_path / "job")
    until(marker.exists, "the job has begun")
    tool(whole.sandbox.folder, "kill-node", "2")
    assert whole.processes("node2") == []
    tool(whole.sandbox.folder, "boot-node", "2")
    facts = whole.wait(job)
    assert (facts["JobState"], facts["Restarts"], facts["ExitCode"]) == ("COMPLETED", "1", "0:0")
    assert marker.read_text() == "attempt \nattempt 1\n"


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["namespaces", "loopback"])
def test_a_second_sandbox_goes_down_without_a_trace(cluster, folder, mode):
    if mode == "namespaces" and cluster.sandbox.mode != mode:
        pytest.skip("this user may not make namespaces")
    try:
        tool(folder, "up", "--mode", mode)
        bridge = f"slurmbox{json.loads((folder / 'sandbox.json').read_text())['number']}"
        assert mode == "loopback" or bridge in psutil.net_if_addrs()
        tool(folder, "run", "--", "sbatch", f"--output={folder}/out", "--nodes=2", "--wrap", "srun sleep 3600")
        until(lambda: sum("sleep 3600" in words for words in mentioning(folder)) >= 2, "the job runs on both nodes")
    finally:
        tool(folder, "down")
    assert mentioning(folder) == []
    if mode == "namespaces":
        until(lambda: bridge not in psutil.net_if_addrs(), "the kernel has taken the network away")
