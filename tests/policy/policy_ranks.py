"""Two processes that stay up for a whole test session and run functions together over gloo."""

import queue
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

DEADLINE_SECONDS = 120


class RankPool:
    """Processes 0 and 1. `run(function, ...)` calls `function(rank, world_size, port, ...)` in each of them."""

    def __init__(self, processes: int = 2):
        context = multiprocessing.get_context("spawn")
        self.jobs = [context.Queue() for _ in range(processes)]
        self.answers = context.Queue()
        self.processes = [
            context.Process(target=_serve, args=(rank, jobs, self.answers), daemon=True)
            for rank, jobs in enumerate(self.jobs)
        ]
        for process in self.processes:
            process.start()

    def run(self, world_size: int, function: Callable, *arguments: Any) -> list[Any]:
        """The answers of the first `world_size` processes, by rank; the first failure is raised here."""
        port = free_port()
        for rank in range(world_size):
            self.jobs[rank].put((function, rank, world_size, port, arguments))
        answers: dict[int, Any] = {}
        for _ in range(world_size):
            try:
                rank, answer, failure = self.answers.get(timeout=DEADLINE_SECONDS)
            except queue.Empty:
                raise TimeoutError(f"ranks {set(range(world_size)) - set(answers)} gave no answer") from None
            if failure:
                raise RuntimeError(f"rank {rank} failed:\n{failure}")
            answers[rank] = answer
        return [answers[rank] for rank in range(world_size)]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _serve(rank: int, jobs: Any, answers: Any) -> None:
    torch.set_num_threads(1)
    while True:
        function, rank, world_size, port, arguments = jobs.get()
        try:
            answers.put((rank, function(rank, world_size, port, *arguments), None))
        except Exception:
            answers.put((rank, None, traceback.format_exc()))
