"""Tasks dealt out to processes of this machine, and to those that torchrun started on this and others."""

import ctypes
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_vespo.errors import ConfigError, RunError

Task = TypeVar("Task")
Result = TypeVar("Result")
Advance = Callable[[int], None]
"""Called with the number of bytes that were done."""
PR_SET_PDEATHSIG = 1
POLL_SECONDS = 0.2
RANK_DEADLINE = timedelta(hours=24)
"""How long a rank waits for the slowest one. torchrun ends all of them as soon as one fails."""


@dataclass(frozen=True)
class Ranks:
    """The processes that torchrun started; one, where it did not."""

    rank: int = 0
    size: int = 1

    def share(self, tasks: Sequence[Task]) -> Sequence[Task]:
        return tasks[self.rank :: self.size]

    def together(self, function: Callable[[], Result]) -> list[Result]:
        """What `function` gave on each rank. If it failed on any, every rank raises: its own failure, or the first.

        Raises:
            ConfigError, RunError: another rank's failure, with its message.
        """
        if self.size == 1:
            return [function()]
        result, failure = None, None
        try:
            result = function()
        except Exception as error:
            failure = error
        told: list[Any] = [None] * self.size
        kind = None if failure is None else ConfigError if isinstance(failure, ConfigError) else RunError
        dist.all_gather_object(told, (result, kind, str(failure)))
        if failure is not None:
            raise failure
        for rank, (_, kind, message) in enumerate(told):
            if kind is not None:
                raise kind(f"on rank {rank}: {message}")
        return [result for result, _, _ in told]

    def on_first(self, function: Callable[[], Result]) -> Result:
        """Called on rank 0 alone; every rank gets what it gave, or raises as `together`."""
        return self.together(lambda: function() if self.rank == 0 else None)[0]  # type: ignore[return-value]


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """This process's place among those that torchrun started with it."""
    if not dist.is_torchelastic_launched():
        yield Ranks()
        return
    dist.init_process_group("gloo", timeout=RANK_DEADLINE)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def run_tasks(
    work: Callable[[Task, Advance], Result], tasks: Sequence[Task], *, processes: int, progress: Advance
) -> list[Result]:
    """`work` of each task, in `processes` (1: in this one), results in their order.

    `work` and `tasks` are pickled once for each process. A process whose parent is gone dies. After a failure no
    further task is begun; those under way are awaited.

    Raises:
        ConfigError: a task's. RunError: a task failed otherwise, or a process was killed.
    """
    if processes <= 1 or len(tasks) <= 1:
        return [work(task, progress) for task in tasks]
    context = multiprocessing.get_context("spawn")
    claimed, done_bytes = context.Value("q", 0), context.Value("q", 0)
    connections: dict[Any, Any] = {}
    for _ in range(min(processes, len(tasks))):
        ours, theirs = context.Pipe(duplex=False)
        arguments = (work, tasks, claimed, done_bytes, theirs, os.getpid(), torch.get_num_threads())
        process = context.Process(target=_work_off, args=arguments, daemon=True)
        process.start()
        theirs.close()
        connections[ours] = process
    results: dict[int, Result] = {}
    failure: Exception | None = None
    told = 0
    while connections:
        for connection in wait(list(connections), POLL_SECONDS):
            try:
                number, result, error = connection.recv()  # type: ignore[union-attr]
                results[number] = result
            except EOFError:
                process = connections.pop(connection)
                process.join()
                killed = RunError("a worker process was killed: out of memory? Use fewer --workers")
                error = killed if process.exitcode else None
            if error is not None:
                failure = failure or error
                claimed.value = len(tasks)
        now = done_bytes.value
        progress(now - told)
        told = now
    if failure is not None:
        raise failure
    return [results[number] for number in range(len(tasks))]


def _work_off(
    work: Callable[[Any, Advance], Any],
    tasks: Sequence[Any],
    claimed: Any,
    done_bytes: Any,
    answers: Connection,
    parent: int,
    threads: int,
) -> None:
    """A worker's life: claim the next task, send (its number, its result, its failure), until none is left."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before that took effect
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's affair
    torch.set_num_threads(threads)

    def advance(count: int) -> None:
        with done_bytes.get_lock():
            done_bytes.value += count

    while True:
        with claimed.get_lock():
            number = claimed.value
            claimed.value += 1
        if number >= len(tasks):
            return
        try:
            answers.send((number, work(tasks[number], advance), None))
        except ConfigError as error:
            answers.send((number, None, error))
        except Exception:
            answers.send((number, None, RunError(traceback.format_exc())))
