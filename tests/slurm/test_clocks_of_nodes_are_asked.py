"""The doctor inside a job of two nodes asks each for its time, over the real srun."""

import sys

from cluster_jobs import ROOT

CODE = (
    "from megatron_vespo.doctor.clocks import check_node_clocks\n"
    "from megatron_vespo.doctor.slurm import check_slurm, nodes_of_job\n"
    "nodes = nodes_of_job()\n"
    "print(*nodes)\n"
    "print(check_node_clocks(nodes, seconds=120))\n"
    "print(check_slurm())\n"
)


def test_nodes_of_a_job_tell_their_time(whole):
    done = whole.command("salloc", "--quiet", "--nodes=2", f"--chdir={ROOT}", sys.executable, "-c", CODE)
    assert done.returncode == 0, done.stderr
    nodes, clocks, slurm = done.stdout.splitlines()
    assert nodes == "node1 node2"
    assert "status='ok'" in clocks and "2 nodes; furthest from this host" in clocks, clocks
    assert "status='ok'" in slurm and "UP" in slurm, slurm
