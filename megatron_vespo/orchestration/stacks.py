"""Where every process of a run is: the stacks of all of them, when something was waited for too long."""

import asyncio
import faulthandler
import io
import os
import time
from dataclasses import dataclass
from pathlib import Path

from megatron_vespo import presence
from megatron_vespo.presence import STACKS_SIGNAL, Process

ANSWER_SECONDS = 5.0
"""Longest that processes may take to write their stacks, which takes them milliseconds."""
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Found:
    """One process: what the kernel says of it, and its stacks, "" where it wrote none."""

    process: Process
    state: str
    stacks: str


def collect(processes: list[Process], target: Path) -> list[Found]:
    """Write target/NAME.txt for each process, at most ANSWER_SECONDS later."""
    before = {process: _size(process.stacks) for process in processes}
    asked = [process for process in processes if process.state() == "alive" and _ask(process)]
    _wait_for_answers({process: before[process] for process in asked})
    target.mkdir(parents=True, exist_ok=True)
    found = []
    for process in processes:
        stacks = _read_from(process.stacks, before[process])
        found.append(Found(process, _state(process, asked=process in asked, answered=bool(stacks)), stacks))
        heading = f"{process.name}, pid {process.pid}: {found[-1].state}{_kernel_words(process)}\n\n"
        (target / f"{process.name.replace(' ', '_')}.txt").write_text(heading + stacks)
    return found


def in_few_words(found: list[Found], owners: list[str]) -> str:
    """The likely cause: processes that are stopped, gone or without an answer; else who was waited for."""
    odd = [f"{one.process.name} is {one.state}" for one in found if one.state != "alive"]
    if odd:
        return ", ".join(odd)
    return f"all processes are alive; waited for {', '.join(owners)}" if owners else "all processes are alive"


def _ask(process: Process) -> bool:
    """Whether it was signalled: the signal would end a process that has not come so far as to handle it.

    This process tells its own stacks without a signal. This thread would run on beside the handler, and one that walks through
    the frames of a running thread may crash.
    """
    if process.pid == os.getpid():
        with process.stacks.open("a") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        return True
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
        caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
        if not int(caught, 16) >> (STACKS_SIGNAL - 1) & 1:
            return False
        os.kill(process.pid, STACKS_SIGNAL)
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return False
    return True


def _wait_for_answers(before: dict[Process, int]) -> None:
    """Until all have written, and go on writing no more."""
    deadline, last = time.monotonic() + ANSWER_SECONDS, before
    while time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        now = {process: _size(process.stacks) for process in before}
        if now == last and all(now[process] > size for process, size in before.items()):
            return
        last = now


def _state(process: Process, *, asked: bool, answered: bool) -> str:
    state = process.state()
    if state == "stopped":
        return "stopped (SIGSTOP or a debugger)"
    if state == "alive" and not asked:
        return "alive, but not so far yet that it could tell its stacks"
    if state == "alive" and not answered:
        return f"alive, but without an answer (in the kernel's state {_proc_state(process)})"
    return state


def _kernel_words(process: Process) -> str:
    """Where in the kernel it waits, if the kernel tells."""
    place = _proc(process, "wchan")
    return f"; in the kernel at {place}" if place not in ("", "0") else ""


def _proc_state(process: Process) -> str:
    line = next((line for line in _proc(process, "status").splitlines() if line.startswith("State:")), "State: unknown")
    return line.partition(":")[2].strip()


def _proc(process: Process, name: str) -> str:
    try:
        return Path(f"/proc/{process.pid}/{name}").read_text().strip()
    except OSError:
        return ""


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _read_from(file: Path, offset: int) -> str:
    if not file.exists():
        return ""
    with file.open("rb") as stream:
        stream.seek(offset)
        return stream.read().decode(errors="replace")


def task_stacks() -> str:
    """Of all tasks of the running event loop: where each awaits."""
    text = io.StringIO()
    for task in asyncio.all_tasks():
        task.print_stack(file=text)
    return text.getvalue()


async def collect_run(parts: Path, target: Path, waits: str) -> list[Found]:
    """Of all processes known in the folder `parts`; beside them tasks.txt, of the driver, and `waits` as waits.txt."""
    tasks = task_stacks()
    found = await asyncio.to_thread(lambda: collect(presence.processes(parts), target))
    (target / "tasks.txt").write_text(tasks)
    (target / "waits.txt").write_text(waits)
    return found
