"""The process that grades, and answers turns: `python -m megatron_vespo.rewards.worker SOCKET_FD MEMORY_MB PARENT_PID [PARTS NAME]`.

It takes pickled requests from the driver, which it trusts, and answers in lines of JSON: the driver unpickles nothing
that comes from here, where a model's output, and one day its code, is handled. What graders print goes to stderr.
"""

import ctypes
import json
import os
import pickle
import resource
import signal
import socket
import sys
import traceback
from pathlib import Path

from megatron_vespo.config import ConfigError
from megatron_vespo.presence import announce
from megatron_vespo.rewards.scorers import Environment, Scorer, build_environments, build_scorers

PR_SET_PDEATHSIG = 1
MAX_MESSAGE = 4_000
"""Characters of a traceback that are sent."""


def limit(memory_mb: int, parent: int) -> None:
    """Die with the driver, leave no core file, take no more memory than allowed."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before that took effect
        os._exit(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    size = memory_mb * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def respond(scorers: list[Scorer], environments: list[Environment | None], request: bytes) -> dict:
    try:
        kind, number, text, reference = pickle.loads(request)
        if kind == "grade":
            return {"reward": float(scorers[number](text, reference))}
        environment = environments[number]
        return {"said": None if environment is None else environment(text, reference)}
    except Exception:
        return {"exception": traceback.format_exc()[-MAX_MESSAGE:]}


def main() -> None:
    connection = socket.socket(fileno=int(sys.argv[1]))
    limit(int(sys.argv[2]), int(sys.argv[3]))
    if len(sys.argv) > 4:
        announce(Path(sys.argv[4]), sys.argv[5])
    os.dup2(2, 1)
    requests, answers = connection.makefile("rb"), connection.makefile("wb")

    def answer(message: dict) -> None:
        answers.write(json.dumps(message).encode() + b"\n")
        answers.flush()

    def receive() -> bytes:
        return requests.read(int.from_bytes(requests.read(8), "big"))

    sys.path[:], sources = pickle.loads(receive())
    try:
        scorers, environments = build_scorers(sources), build_environments(sources)
    except ConfigError as error:
        answer({"config_error": str(error)})
        return
    except Exception:
        answer({"exception": traceback.format_exc()[-MAX_MESSAGE:]})
        return
    answer({"ready": True})
    while request := receive():
        answer(respond(scorers, environments, request))


if __name__ == "__main__":
    main()
