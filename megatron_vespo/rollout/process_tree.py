"""The processes of one server, and what they leave behind."""

import shutil
import time
from pathlib import Path

import psutil

SHARED_MEMORY = Path("/dev/shm")
KILL_SECONDS = 5.0
"""Longest that the kernel may take to end a killed process."""


def tree(pid: int) -> list[psutil.Process]:
    """The process `pid` and all its descendants that exist now; empty if it is gone."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def running(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that still execute: not gone, not a zombie, not another process with the same number."""
    return [p for p in processes if p.is_running() and _status(p) != psutil.STATUS_ZOMBIE]


def _status(process: psutil.Process) -> str:
    try:
        return process.status()
    except psutil.NoSuchProcess:
        return psutil.STATUS_ZOMBIE


def end(processes: list[psutil.Process], grace_seconds: float) -> None:
    """SIGTERM to the first, which is to end the others; SIGKILL to whatever still runs after `grace_seconds`."""
    for process in running(processes[:1]):
        process.terminate()
    wait(processes, grace_seconds)
    kill(processes)


def kill(processes: list[psutil.Process]) -> None:
    """SIGKILL, and wait until they are gone."""
    survivors = running(processes)
    for process in survivors:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    wait(survivors, KILL_SECONDS)


def wait(processes: list[psutil.Process], seconds: float) -> None:
    """Until none of them runs, or `seconds` have passed. A zombie has ended: who reaps it is another's business."""
    deadline = time.monotonic() + seconds
    while running(processes) and time.monotonic() < deadline:
        time.sleep(0.02)


def shared_memory_of(processes: list[psutil.Process]) -> set[Path]:
    """Files in /dev/shm that these processes map: load figures of SGLang, semaphores, buffers."""
    found = set()
    for process in processes:
        try:
            lines = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        found.update(line[line.index("/") :] for line in lines if f" {SHARED_MEMORY}/" in line)
    return {Path(name) for name in found if not name.endswith("(deleted)")}


def remove(files: set[Path], folder: Path | None) -> None:
    """Remove shared-memory files and a server's temporary folder, where they are still there."""
    for file in files:
        file.unlink(missing_ok=True)
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
