"""Scorers that misbehave on command: the response says how."""

import os
import signal
import subprocess
import sys
import time


class Unpicklable:
    def __reduce__(self):
        raise TypeError("not to be sent")


class Stubborn:
    """Loads nowhere."""

    def __reduce__(self):
        return int, ("not a number",)


def misbehave(response, answer, row) -> float:
    kind, _, argument = response.partition(" ")
    if kind == "throw":
        raise ZeroDivisionError(argument)
    if kind == "hang":
        time.sleep(3600)
    if kind == "hang_deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with open("/dev/null", "wb") as sink:
            while True:
                sink.write(b"x" * 1000)
    if kind == "hang_with_child":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
        with open(argument, "w") as file:
            file.write(str(child.pid))
        time.sleep(3600)
    if kind == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "exit":
        sys.exit(3)
    if kind == "eat":
        return float(len(bytearray(8 * 2**30)))
    if kind == "print":
        print(argument)
        sys.stdout.flush()
    if kind == "return":
        return float(argument)
    if kind == "return_text":
        return argument
    return float(response == str(answer))


def torch_is_loaded(response, answer, row) -> float:
    return float("torch" in sys.modules)


def reply(response, answer, row) -> str | None:
    """An environment that misbehaves in the same ways."""
    kind, _, argument = response.partition(" ")
    if kind == "say":
        return argument
    if kind == "number":
        return 7  # pyright: ignore[reportReturnType]
    misbehave(response, answer, row)
    return None


def echo(response, answer, row) -> str:
    """An environment that tells what it was given."""
    return repr((response, answer, row))
