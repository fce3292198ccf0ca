"""Python code run in a process of its own, so that a crash or a hang of a library is a finding like any other."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HEAD = """
import json, sys, traceback

def report(**values):
    with open(sys.argv[1], "w") as file:
        json.dump(values, file)

def told(error):
    text = f"{type(error).__name__}: {error}"
    frames = traceback.extract_tb(error.__traceback__)
    return text + (f" ({frames[-1].filename}:{frames[-1].lineno})" if len(frames) > 1 else "")

def broken(error):
    first = error
    while (before := first.__cause__ or (None if first.__suppress_context__ else first.__context__)) is not None:
        first = before
    report(error=told(error), first="" if first is error else told(first), kind=type(error).__name__, message=str(error))
"""
"""`broken` goes back to the first cause: what libraries raise last often says only that something did not import."""

BODY = """
def probe():
{body}

try:
    probe()
except BaseException as error:
    broken(error)
"""


@dataclass(frozen=True)
class Probe:
    """How it ended: `values` is what the code reported, and `error` why it reported nothing.

    Attributes:
        kind: class of the exception that ended it, if one did.
        message: of that exception, without where it was raised.
    """

    values: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    kind: str = ""
    message: str = ""

    @property
    def ok(self) -> bool:
        return not self.error


def run_probe(body: str, seconds: float, arguments: tuple[str, ...] = ()) -> Probe:
    """Run `body`, the lines of a function that calls `report(name=value)` once; `sys.argv[2:]` are `arguments`.

    An exception, a signal, an exit and running longer than `seconds` all come back as `Probe.error`.
    """
    code = HEAD + BODY.format(body="\n".join(f"    {line}" for line in body.strip().splitlines()))
    with tempfile.TemporaryDirectory(prefix="doctor-") as folder:
        answer = Path(folder) / "answer.json"
        with open(Path(folder) / "output", "w+b") as output:
            process = subprocess.Popen(
                [sys.executable, "-c", code, str(answer), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # what it started ends with it
            )
            try:
                code_of_exit = process.wait(seconds)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return Probe(error=f"not done after {seconds:g} s")
            output.seek(0)
            said = output.read().decode(errors="replace").strip().splitlines()
        if not answer.is_file():
            last = f"; its last line: {said[-1].strip()}" if said else ""
            return Probe(error=f"the process {_ended(code_of_exit)}{last}")
        values = json.loads(answer.read_text())
    if "error" not in values:
        return Probe(values)
    first = f"; first cause: {values['first']}" if values["first"] else ""
    return Probe(error=values["error"] + first, kind=values["kind"], message=values["message"])


def _ended(code: int) -> str:
    return f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code} and reported nothing"
