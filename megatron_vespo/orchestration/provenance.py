"""Where figures come from: the sources' commit, and the kind of machine."""

import os
import subprocess
from collections import Counter
from pathlib import Path

from megatron_vespo.doctor.accelerators import driver_gpus

PACKAGE = Path(__file__).resolve().parents[1]
CPU_INFO = Path("/proc/cpuinfo")


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0))


def machine() -> str:
    """ "2 cores of AMD EPYC", and its GPUs if it has any."""
    lines = CPU_INFO.read_text(encoding="utf-8").splitlines() if CPU_INFO.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    gpus = Counter(line.partition(",")[0] for line in driver_gpus())
    return " and ".join(
        [f"{cores()} cores of {models[0] if models else os.uname().machine}"]
        + [f"{count} {name}" for name, count in gpus.items()]
    )


def source_commit() -> str | None:
    """Short name of the commit, with "-dirty" where tracked files were changed; None outside of a git checkout."""
    command = ["git", "-C", str(PACKAGE), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return answer.stdout.strip() or None if answer.returncode == 0 else None
