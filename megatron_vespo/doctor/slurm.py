"""Slurm, as seen from this host."""

import os
import shutil
import subprocess

from megatron_vespo.doctor.finding import Finding

COMMANDS = ("sbatch", "srun", "scontrol", "squeue")


def check_slurm() -> Finding:
    """Are the commands there, and does the controller answer?"""
    absent = [command for command in COMMANDS if shutil.which(command) is None]
    if len(absent) == len(COMMANDS):
        return Finding(
            "Slurm", "note", "not on this host", "", "jobs can't be submitted from here; runs on one host can"
        )
    mend = "apt-get install slurm-client, or the site's module"
    if absent:
        return Finding("Slurm", "warning", "incomplete", ", ".join(absent), "jobs can't be submitted from here", mend)
    try:
        answer = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, timeout=15)
    except subprocess.TimeoutExpired:
        return Finding("Slurm", "warning", "scontrol ping: no answer within 15 s", "a controller", "no job starts")
    said = " ".join((answer.stdout + answer.stderr).split())
    if answer.returncode or "UP" not in said:
        mend = "systemctl status slurmctld; munge -n | unmunge; is this the cluster's slurm.conf?"
        return Finding("Slurm", "warning", said or "scontrol ping failed", "a controller", "no job starts", mend)
    return Finding("Slurm", "ok", said)


def nodes_of_job() -> list[str]:
    """Hosts of the job that this process is in; none outside of one.

    Raises:
        subprocess.SubprocessError: scontrol does not tell them.
    """
    listed = os.environ.get("SLURM_JOB_NODELIST")
    if not listed:
        return []
    names = ["scontrol", "show", "hostnames", listed]
    return subprocess.run(names, capture_output=True, text=True, timeout=15, check=True).stdout.split()
