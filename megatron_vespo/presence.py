"""A process of a run makes itself known: its name, its number, and on a signal the stacks of all its threads.

Everything lies in one folder of the run: NAME.json, and NAME.stacks, which Python's faulthandler writes. It does so in
the kernel's signal handler, so it works where a thread holds the interpreter's lock in native code, and needs no right
to trace processes, which containers seldom give.
"""

import faulthandler
import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

STACKS_SIGNAL = signal.SIGUSR1
"""Free in all our processes: Ray's workers and SGLang's processes leave it alone; our servers use SIGUSR2."""
CHILD = ".child-"
CLOCK_SECONDS = 3.0
"""psutil reckons when a process started from when the machine did, which the kernel tells in whole seconds of a clock
that may be set."""

State = Literal["alive", "stopped", "gone"]


@dataclass(frozen=True)
class Process:
    """Of a run.

    Attributes:
        name: e.g. "policy rank 0".
        created: Unix seconds; tells it from a later process with the same number.
        stacks: the file that it writes its stacks to.
    """

    name: str
    pid: int
    created: float
    stacks: Path

    def state(self) -> State:
        """`stopped`: by SIGSTOP or a debugger."""
        try:
            process = psutil.Process(self.pid)
            if abs(process.create_time() - self.created) > CLOCK_SECONDS:
                return "gone"
            status = process.status()
        except psutil.NoSuchProcess:
            return "gone"
        if status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return "gone"
        return "stopped" if status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP) else "alive"


def announce(folder: Path, name: str) -> None:
    """Make this process known as `name`, from now on in place of an earlier one with that name and its children."""
    stem = folder / name.replace(" ", "_")
    for left in folder.glob(f"{stem.name}{CHILD}*"):
        left.unlink(missing_ok=True)
    _announce(stem, name)


def announce_child(folder: Path, parent: str) -> None:
    """Make this process, forked or spawned by `parent`, known; its name has what it calls itself, where it does."""
    _announce(folder / f"{parent.replace(' ', '_')}{CHILD}{os.getpid()}", parent)


def _announce(stem: Path, name: str) -> None:
    # Its own file: what a fork inherits is its parent's. faulthandler keeps it open, to append.
    stacks = stem.with_name(stem.name + ".stacks")
    stacks.unlink(missing_ok=True)
    faulthandler.register(STACKS_SIGNAL, file=stacks.open("a"), all_threads=True)
    record = {"name": name, "pid": os.getpid(), "created": psutil.Process().create_time()}
    unfinished = stem.with_name(stem.name + ".unfinished")
    unfinished.write_text(json.dumps(record))
    unfinished.rename(stem.with_name(stem.name + ".json"))


def withdraw(folder: Path, part: str) -> None:
    """Forget the processes of `part` ("policy": "policy rank 0" and so on): they are about to be stopped on purpose."""
    stem = part.replace(" ", "_")
    for record in folder.glob(f"{stem}*.json"):
        if record.stem == stem or record.name.startswith((f"{stem}_", f"{stem}{CHILD}")):
            record.unlink(missing_ok=True)


def processes(folder: Path) -> list[Process]:
    """All that are known, by name; the last of each name."""
    return sorted(filter(None, map(_read, folder.glob("*.json"))), key=lambda process: process.name)


def _read(record: Path) -> Process | None:
    try:
        values = json.loads(record.read_text())
    except FileNotFoundError:  # replaced by its successor at this moment
        return None
    stacks = record.with_suffix(".stacks")
    process = Process(values["name"], values["pid"], values["created"], stacks)
    if CHILD not in record.name:
        return process
    return Process(f"{process.name} {_title(process)}", process.pid, process.created, stacks)


def _title(process: Process) -> str:
    """What a child calls itself, e.g. "scheduler"; SGLang's do so as sglang::scheduler."""
    try:
        words = psutil.Process(process.pid).cmdline()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        words = []
    title = words[0].rpartition("::")[2] if words and "::" in words[0] else ""
    return title or f"child {process.pid}"
