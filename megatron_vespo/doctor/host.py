"""Space and limits of this host."""

import os
import resource
from pathlib import Path

from megatron_vespo.doctor.finding import Finding

GIB = 2**30
FILES = 8_192
"""Open files of one process, which Ray's servers and a driver with few sockets stay below."""
PROCESSES = 8_192
"""Processes and threads of one user: SGLang, Ray and Megatron start hundreds each."""


def check_shared_memory(need_gb: float, folder: Path = Path("/dev/shm")) -> Finding:
    """Free space of /dev/shm: weight buckets, NCCL within a host, Ray's objects."""
    mend = "docker run --shm-size=16g, or mount -o remount,size=50% /dev/shm"
    cost = "weight updates and Ray fail with a bus error or 'no space left on device', in the middle of a run"
    if not folder.is_dir():
        return Finding("shared memory", "failed", f"{folder}: no such folder", f"{need_gb:g} GiB", cost, mend)
    found = f"{_free(folder):.1f} GiB free in {folder}"
    if _free(folder) >= need_gb:
        return Finding("shared memory", "ok", found)
    return Finding("shared memory", "failed", found, f"{need_gb:g} GiB", cost, mend)


def check_disk(name: str, folder: Path, need_gb: float, why: str) -> Finding:
    """Can be written, with so much free. `folder` need not exist yet. `why`: what the space is for."""
    there = existing(folder)
    mend = f"free space (df -h {there}), or name another folder"
    if not os.access(there, os.W_OK | os.X_OK):
        cost = "a run can't write its files"
        return Finding(name, "failed", f"{there}: no permission to write", "a folder of yours", cost, mend)
    found = f"{_free(there):.1f} GiB free in {there}"
    if _free(there) >= need_gb:
        return Finding(name, "ok", f"{found}; {need_gb:.1f} GiB are needed for {why}")
    cost = "a run ends when the disk is full; what it had saved stays"
    return Finding(name, "failed", found, f"{need_gb:.1f} GiB, for {why}", cost, mend)


def existing(folder: Path) -> Path:
    """`folder`, or the nearest above it that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def check_open_files(sockets: int) -> Finding:
    """`sockets`: responses that the driver asks for at once."""
    soft, hard = (_number(limit) for limit in resource.getrlimit(resource.RLIMIT_NOFILE))
    return judge_open_files(soft, hard, sockets)


def judge_open_files(soft: float, hard: float, sockets: int) -> Finding:
    """`soft` and `hard`: the limits in force."""
    need, asked = sockets + 1024, max(FILES, sockets + 1024)
    found = f"{soft:,.0f} open files (hard limit {hard:,.0f})"
    if soft >= asked:
        return Finding("open files", "ok", found)
    mend = f"ulimit -n {asked}, before the run"
    if hard < asked:
        mend = "raise the hard limit: nofile in /etc/security/limits.conf, LimitNOFILE of slurmd, docker run --ulimit nofile"
    if soft >= need:
        return Finding("open files", "warning", found, f"{asked:,}", "Ray may run out of them with many workers", mend)
    cost = f"'too many open files' with {sockets:,} responses under way"
    return Finding("open files", "failed", found, f"{asked:,}", cost, mend)


def check_processes(cgroup: Path = Path("/sys/fs/cgroup")) -> Finding:
    """The smaller of the user's limit and the control group's. `cgroup`: where control groups are mounted."""
    limits = {"ulimit -u": _number(resource.getrlimit(resource.RLIMIT_NPROC)[0])}
    group = cgroup / own_group() / "pids.max"
    if group.is_file() and (text := group.read_text().strip()).isdigit():
        limits[f"pids.max of {group.parent}"] = float(text)
    which, limit = min(limits.items(), key=lambda item: item[1])
    found = f"{limit:,.0f} processes and threads ({which})"
    if limit >= PROCESSES:
        return Finding("processes", "ok", found)
    return Finding(
        *(
            "processes",
            "warning",
            found,
            f"{PROCESSES:,}",
            "'can't start new thread' in Ray or SGLang, mostly at start",
        ),
        f"ulimit -u {PROCESSES}; in a container --pids-limit={PROCESSES}; in a job ask the site",
    )


def own_group() -> str:
    """Of this process, in the unified hierarchy; empty where it can't be told."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return ""
    return next((line[3:].lstrip("/") for line in lines if line.startswith("0::")), "")


def check_locked_memory(has_gpu: bool) -> Finding:
    """InfiniBand pins memory."""
    soft = _number(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0])
    found = "unlimited" if soft == float("inf") else f"{soft / 2**20:,.0f} MiB"
    if soft == float("inf") or not has_gpu:
        return Finding(
            "locked memory", "ok" if soft == float("inf") else "note", found, "", "" if has_gpu else "for GPUs"
        )
    return Finding(
        *("locked memory", "warning", found, "unlimited", "NCCL over InfiniBand fails to register memory"),
        "ulimit -l unlimited; LimitMEMLOCK=infinity of slurmd; docker run --ulimit memlock=-1",
    )


def _number(limit: int) -> float:
    return float("inf") if limit == resource.RLIM_INFINITY else float(limit)


def _free(folder: Path) -> float:
    space = os.statvfs(folder)
    return space.f_bavail * space.f_frsize / GIB
