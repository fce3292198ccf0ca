"""Processes that stay up and run functions together: starting Megatron in each takes longer than most checks."""

import gc
import queue
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

from megatron_vespo.rendezvous import listen, port_of

LOOPBACK = "127.0.0.1"


class RankFailed(RuntimeError):
    """A rank raised, or gave no answer; the message has its traceback."""


class RankPool:
    """`run(world_size, function, ...)` calls `function(rank, world_size, port, ...)` in as many processes at once.

    The functions meet at `port` of the loopback interface, a new one for each call. After a failure the processes are
    replaced, since the others may still wait for the one that failed.
    """

    def __init__(self, processes: int, deadline_seconds: float = 300):
        self._context = multiprocessing.get_context("spawn")
        self._count = processes
        self._deadline_seconds = deadline_seconds
        self._start()

    def _start(self) -> None:
        self._jobs = [self._context.Queue() for _ in range(self._count)]
        self._answers = self._context.Queue()
        self._processes = [
            self._context.Process(target=_serve, args=(rank, jobs, self._answers), daemon=True)
            for rank, jobs in enumerate(self._jobs)
        ]
        for process in self._processes:
            process.start()

    def run(self, world_size: int, function: Callable, *arguments: Any) -> list[Any]:
        """The answers of processes 0 .. world_size - 1. Raises RankFailed with the first failure."""
        if world_size > self._count:
            raise ValueError(f"{world_size} ranks asked for, the pool has {self._count}")
        port = free_port()
        for rank in range(world_size):
            self._jobs[rank].put((function, world_size, port, arguments))
        answers: dict[int, Any] = {}
        while len(answers) < world_size:
            try:
                rank, answer, failure = self._answers.get(timeout=self._deadline_seconds)
            except queue.Empty:
                failure = f"no answer within {self._deadline_seconds} s"
                rank, answer = min(set(range(world_size)) - set(answers)), None
            if failure is not None:
                self.close()
                self._start()
                raise RankFailed(f"rank {rank} of {world_size}: {failure}")
            answers[rank] = answer
        return [answers[rank] for rank in range(world_size)]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def __enter__(self) -> "RankPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with listen(LOOPBACK) as probe:
        return port_of(probe)


def _serve(rank: int, jobs: Any, answers: Any) -> None:
    torch.set_num_threads(1)
    # Megatron tells each process, several times over, which optional libraries it does without.
    warnings.filterwarnings("ignore", module=r"megatron\.|torch\.")
    while True:
        function, world_size, port, arguments = jobs.get()
        try:
            answers.put((rank, function(rank, world_size, port, *arguments), None))
        except Exception:
            answers.put((rank, None, traceback.format_exc()))
        gc.collect()  # a finished model is full of cycles, and its process groups keep threads and sockets as long
