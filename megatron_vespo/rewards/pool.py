"""Grading of trajectories by processes that can be killed: `await pool.grade(trajectories)`."""

import asyncio
import logging
import queue
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from megatron_vespo.config import DataConfig, RewardConfig, Source
from megatron_vespo.data.prompt import Prompt
from megatron_vespo.data.sources import numbered_sources
from megatron_vespo.rewards.grader import Grader, Outcome, Reply, Verdict
from megatron_vespo.rollout.trajectory import Trajectory

logger = logging.getLogger(__name__)
OUTCOMES: tuple[str, ...] = get_args(Outcome)
STARTS = 3
"""Attempts to get a grading process back, before the run is ended."""


@dataclass(frozen=True)
class Task:
    kind: Literal["grade", "reply"]
    source: int
    text: str
    reference: object
    answer: Future
    """Of a Verdict or a Reply."""


class RewardPool:
    """`config.workers` grading processes, each with a thread that feeds it one response at a time.

    One response's deadline concerns no other: when a grading hangs, its process is killed and a new one, warmed up
    before its clock starts, goes on with the rest. Use as a context manager, or call `start` and `close`.

    `Prompt.source` counts in `data.sources` followed by `evaluation_sources`.
    """

    def __init__(
        self,
        config: RewardConfig,
        data: DataConfig,
        evaluation_sources: tuple[Source, ...] | None = None,
        log: Path | None = None,
        parts: Path | None = None,
    ):
        """`log`: where what the processes print is appended; None: it goes where this process's output goes.
        `parts`: the folder where processes of a run make themselves known; None: there is no run."""
        self._config = config
        sources = numbered_sources(data, evaluation_sources)
        self._graders = [Grader(sources, config, log, parts, f"graders {number}") for number in range(config.workers)]
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._closing = threading.Event()
        self._reported: set[str] = set()
        self._replying = {number for number, source in enumerate(sources.values()) if source.environment is not None}
        self.failed_replies = 0
        """Turns that an environment threw at, hung at or died of: the response ended there."""

    def __enter__(self) -> "RewardPool":
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """Of the processes that live now."""
        return [grader.pid for grader in self._graders if grader.pid is not None]

    def start(self) -> None:
        """Start all processes and wait until they can grade (seconds: they import their scorers).

        Raises:
            ConfigError: a scorer cannot be built.
            RuntimeError: a process did not start.
        """
        started = [Future() for _ in self._graders]
        for number, (grader, ready) in enumerate(zip(self._graders, started, strict=True)):
            thread = threading.Thread(target=self._serve, args=(grader, ready), name=f"grader-{number}", daemon=True)
            thread.start()
            self._threads.append(thread)
        try:
            for ready in started:
                ready.result()
        except BaseException:
            self.close()
            raise

    async def grade(self, trajectories: list[Trajectory]) -> None:
        """Set `reward` and `outcome` of each, from its `text` and its prompt's `source` and `reference`.

        A grading that threw, hung past the deadline, died or returned something not finite gets `config.on_failure`;
        the first of each kind is logged with its traceback.

        Raises:
            RuntimeError: the pool is not running, or no grading process can be started any more.
        """
        results = await asyncio.gather(*(self._done("grade", t.prompt, t.text) for t in trajectories))
        for trajectory, verdict in zip(trajectories, results, strict=True):
            trajectory.outcome = verdict.outcome
            trajectory.reward = verdict.reward if verdict.outcome == "graded" else self._config.on_failure
            what = f"grading of {trajectory.prompt.identity}, sample {trajectory.sample}"
            self._report(what, verdict, f"reward {self._config.on_failure}")

    def replies_to(self, prompt: Prompt) -> bool:
        """Whether its source has an environment."""
        return prompt.source in self._replying

    async def reply(self, prompt: Prompt, text: str) -> str | None:
        """What the environment of a prompt's source says to the response so far; None: the response ends there.

        So it does where the environment threw, hung past the deadline or died: counted in `failed_replies`, and the first
        of each kind is logged. Raises RuntimeError as `grade`.
        """
        reply: Reply = await self._done("reply", prompt, text)
        if reply.outcome != "graded":
            self.failed_replies += 1
            self._report(f"a turn of {prompt.identity}", reply, "the response ends there")
        return reply.text

    async def _done(self, kind: Literal["grade", "reply"], prompt: Prompt, text: str) -> Any:
        if not self._threads or self._closing.is_set():
            raise RuntimeError("the reward pool is not running")
        answer = Future()
        self._tasks.put(Task(kind, prompt.source, text, prompt.reference, answer))
        try:
            return await asyncio.wrap_future(answer)
        finally:
            answer.cancel()

    def close(self) -> None:
        """End all processes and threads. What is being graded fails with RuntimeError."""
        self._closing.set()
        for _ in self._threads:
            self._tasks.put(None)
        for grader in self._graders:
            grader.interrupt()
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        while not self._tasks.empty():
            task = self._tasks.get()
            if task is not None and task.answer.set_running_or_notify_cancel():
                task.answer.set_exception(RuntimeError("the reward pool was closed"))

    def _serve(self, grader: Grader, ready: Future) -> None:
        """A thread's life: start the process, grade until closed, end the process."""
        try:
            try:
                grader.start()
            except BaseException as error:
                ready.set_exception(error)
                return
            ready.set_result(None)
            while not self._closing.is_set():
                task = self._tasks.get()
                if task is not None and task.answer.set_running_or_notify_cancel():
                    self._run(grader, task)
        finally:
            grader.kill()

    def _run(self, grader: Grader, task: Task) -> None:
        for attempt in range(1, STARTS + 1):
            try:
                work = grader.grade if task.kind == "grade" else grader.reply
                answer = work(task.source, task.text, task.reference)
                if self._closing.is_set():  # which ends a grading as if its process had crashed
                    raise RuntimeError("the reward pool was closed")
                task.answer.set_result(answer)
                return
            except Exception as error:
                if attempt == STARTS or self._closing.is_set():
                    task.answer.set_exception(error)
                    return
                logger.warning("attempt %d of %d: %s", attempt, STARTS, error)

    def _report(self, what: str, answer: Verdict | Reply, consequence: str) -> None:
        kind = f"{type(answer).__name__} {answer.outcome}"
        if answer.outcome == "graded" or kind in self._reported:
            return
        self._reported.add(kind)
        logger.warning(
            "%s ended as %r (%s; further ones are only counted): %s", what, answer.outcome, consequence, answer.detail
        )
