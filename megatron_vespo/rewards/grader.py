"""One killable grading process, seen from the driver: started, asked, killed at its deadline, started again."""

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from megatron_vespo import presence
from megatron_vespo.config import ConfigError, RewardConfig, Source

Outcome = Literal["graded", "exception", "timeout", "crash", "not_finite"]
STARTUP_SECONDS = 180.0
"""Longest that a worker may take to import its scorers. Not part of any grading's deadline."""
MAX_ANSWER_BYTES = 2**20


@dataclass(frozen=True)
class Verdict:
    """How one grading ended. `reward` is meaningful only for "graded"."""

    outcome: Outcome
    reward: float
    detail: str = ""


@dataclass(frozen=True)
class Reply:
    """What an environment said to a turn: `text`, None if it ended the response there.

    `outcome` is as a verdict's: "graded" where it came to an answer.
    """

    outcome: Outcome
    text: str | None
    detail: str = ""


class WorkerGone(Exception):
    """The process closed its connection or was found dead."""


class Grader:
    """A worker process and the connection to it. Used by one thread; only `interrupt` may come from another.

    The process dies with the thread that started it (Linux's parent-death signal counts threads), so start and use it
    in a thread that lives as long as it shall.
    """

    def __init__(
        self,
        sources: dict[str, Source],
        config: RewardConfig,
        log: Path | None = None,
        parts: Path | None = None,
        name: str = "grader",
    ):
        """`sources` by their path in the configuration; `grade` counts in their order. `log` and `parts` as in
        `RewardPool`; `name`: what the process makes itself known as."""
        self._sources, self._config, self._log = sources, config, log
        self._parts, self._name = parts, name
        self._lock = threading.Lock()  # of _process and _interrupted
        self._interrupted = False
        self._process: subprocess.Popen | None = None
        self._connection: socket.socket | None = None
        self._received = b""

    @property
    def pid(self) -> int | None:
        process = self._process
        return process.pid if process else None

    def start(self) -> None:
        """Start the process and wait until it can grade.

        Raises:
            ConfigError: a scorer cannot be built there.
            RuntimeError: it died or did not get ready; says of what.
        """
        self.kill()
        self._launch()
        request = pickle.dumps((list(sys.path), self._sources))
        try:
            answer = self._ask(request, time.monotonic() + STARTUP_SECONDS)
        except (WorkerGone, TimeoutError, ValueError) as error:
            raise RuntimeError(self._not_started(f"{type(error).__name__}, exit code {self.kill()}")) from None
        if "ready" not in answer:
            self.kill()
            if "config_error" in answer:
                raise ConfigError(answer["config_error"])
            raise RuntimeError(self._not_started(str(answer.get("exception", answer))))

    def _not_started(self, why: str) -> str:
        limit = self._config.memory_limit_mb
        return f"a grading process did not start (reward.memory_limit_mb ({limit}) may be too small for it): {why}"

    def grade(self, source: int, text: str, reference: object) -> Verdict:
        """Grade one response. Whatever happens there ends as a verdict, at most the deadline later.

        Raises:
            RuntimeError, ConfigError: a new process was needed and could not be started.
        """
        answer = self._answer("grade", source, text, reference)
        return answer if isinstance(answer, Verdict) else read_answer(answer)

    def reply(self, source: int, text: str, reference: object) -> Reply:
        """What the source's environment says to a response so far; as `grade`."""
        answer = self._answer("reply", source, text, reference)
        return Reply(answer.outcome, None, answer.detail) if isinstance(answer, Verdict) else read_reply(answer)

    def _answer(self, kind: str, source: int, text: str, reference: object) -> dict | Verdict:
        """The worker's line of JSON, or how it came to none."""
        try:
            request = pickle.dumps((kind, source, text, reference))
        except Exception:  # pickling runs the reference's own methods
            return Verdict("exception", float("nan"), traceback.format_exc())
        if not self._alive():
            self.start()
        try:
            return self._ask(request, time.monotonic() + self._config.timeout_seconds)
        except TimeoutError:
            self.kill()
            return Verdict("timeout", float("nan"), f"no answer within {self._config.timeout_seconds} s")
        except WorkerGone:
            return Verdict("crash", float("nan"), f"the grading process died, exit code {self.kill()}")
        except ValueError as error:
            self.kill()
            return Verdict("crash", float("nan"), f"the grading process answered with garbage: {error}")

    def kill(self) -> int | None:
        """End the process and everything it started; wait until it is gone. Returns its exit code.

        One that had begun to exit by itself keeps its own code.
        """
        with self._lock:
            process, self._process = self._process, None
            if process is not None:
                os.killpg(process.pid, signal.SIGKILL)
                if self._parts is not None:
                    presence.withdraw(self._parts, self._name)
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        return process.wait() if process is not None else None

    def interrupt(self) -> None:
        """From another thread: end the process, and let no other start. What runs here ends soon after."""
        with self._lock:
            self._interrupted = True
            if self._process is not None:
                os.killpg(self._process.pid, signal.SIGKILL)

    def _launch(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs, self._lock, self._output() as output:
            if self._interrupted:
                ours.close()
                raise RuntimeError("the reward pool was closed")
            self._connection, self._received = ours, b""
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    *("-m", "megatron_vespo.rewards.worker"),
                    *(str(theirs.fileno()), str(self._config.memory_limit_mb), str(os.getpid())),
                    *(() if self._parts is None else (str(self._parts), self._name)),
                ],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C is the driver's to handle; and the whole group can be killed
                env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            )

    def _output(self) -> AbstractContextManager[IO | None]:
        if self._log is None:
            return nullcontext()
        self._log.parent.mkdir(parents=True, exist_ok=True)
        return self._log.open("ab")

    def _alive(self) -> bool:
        """Looks without reaping, so that the process's group keeps its number until `kill`."""
        process = self._process
        if process is None:
            return False
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def _ask(self, request: bytes, deadline: float) -> dict:
        """Send one request behind its length, receive one line of JSON, both before `deadline` (time.monotonic)."""
        connection = self._connection
        if connection is None:
            raise WorkerGone
        try:
            connection.settimeout(max(1e-3, deadline - time.monotonic()))
            connection.sendall(len(request).to_bytes(8, "big") + request)
            while b"\n" not in self._received:
                connection.settimeout(max(1e-3, deadline - time.monotonic()))
                part = connection.recv(65536)
                if not part:
                    raise WorkerGone
                self._received += part
                if len(self._received) > MAX_ANSWER_BYTES:
                    raise ValueError(f"an answer of more than {MAX_ANSWER_BYTES} bytes")
        except TimeoutError:
            raise
        except OSError:
            raise WorkerGone from None
        line, _, self._received = self._received.partition(b"\n")
        answer = json.loads(line)
        if not isinstance(answer, dict):
            raise ValueError(f"not an object: {line[:100]!r}")
        return answer


def read_answer(answer: dict) -> Verdict:
    """What a worker's line of JSON says."""
    if "exception" in answer:
        return Verdict("exception", float("nan"), str(answer["exception"]))
    reward = answer.get("reward")
    if not isinstance(reward, float):
        return Verdict("crash", float("nan"), f"the grading process answered with garbage: {answer!r:.200}")
    if reward != reward or reward in (float("inf"), float("-inf")):
        return Verdict("not_finite", reward, f"the scorer returned {reward}")
    return Verdict("graded", reward)


def read_reply(answer: dict) -> Reply:
    """What a worker's line of JSON says."""
    if "exception" in answer:
        return Reply("exception", None, str(answer["exception"]))
    said = answer.get("said", answer)
    if said is not None and not isinstance(said, str):
        return Reply("crash", None, f"the grading process answered with garbage: {answer!r:.200}")
    return Reply("graded", said)
