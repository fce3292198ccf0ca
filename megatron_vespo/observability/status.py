"""What a run does now, from the files in its folder and the processes of this host; without Ray, beside the run."""

import json
import socket
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from megatron_vespo.errors import ConfigError
from megatron_vespo.presence import Process, processes

STATUS_FILE = "status.json"
MARKER = ".megatron_vespo_run"
"""A file that says: this folder is a run of ours, and may be replaced by one."""
DRIVER = "driver"
FRESH_SECONDS = 30.0
"""The age of status.json at which what it says of other hosts is no longer taken for what is there now."""
TAIL_BYTES = 2**20
"""Of metrics.jsonl; a row has a few kB."""

State = Literal["running", "finished", "failed", "driver gone", "on another host", "not started"]


@dataclass(frozen=True)
class PartStatus:
    name: str
    pid: int
    state: str
    """alive, stopped, gone; unknown where it can't be seen."""
    host: str = ""


@dataclass(frozen=True)
class WaitStatus:
    what: str
    owners: list[str]
    """Parts that have not answered."""
    seconds: float
    """So far."""
    deadline_seconds: float


@dataclass(frozen=True)
class RunStatus:
    run_dir: str
    state: State
    message: str
    """The cause of a failure, or what to do; else ""."""
    step: int | None
    steps: int | None
    last_step_seconds_ago: float | None
    parts: list[PartStatus] = field(default_factory=list)
    waits: list[WaitStatus] = field(default_factory=list)
    """The oldest first."""

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=1)


def read_status(folder: Path) -> RunStatus:
    """Raises ConfigError where `folder` is not a run of ours."""
    if not (folder / MARKER).exists():
        raise ConfigError(f"{folder}: not the folder of a run (no {MARKER} in it). Give the run_dir of a run")
    written = read_json(folder / STATUS_FILE)
    summary = read_json(folder / "summary.json")
    step, timestamp = last_step(folder / "metrics.jsonl")
    now = time.time()
    parts = part_states(written)
    state, message = judge(written, summary, parts, now)
    return RunStatus(
        run_dir=str(folder),
        state=state,
        message=message,
        step=step,
        steps=planned_steps(folder / "config.yaml"),
        last_step_seconds_ago=None if timestamp is None else now - timestamp,
        parts=parts,
        waits=sorted(
            (
                WaitStatus(wait["what"], wait["owners"], now - wait["since"], wait["seconds"])
                for wait in written.get("waits", ())
            ),
            key=lambda wait: -wait.seconds,
        ),
    )


def judge(written: dict[str, Any], summary: dict[str, Any], parts: list[PartStatus], now: float) -> tuple[State, str]:
    """`written`: status.json, which is newer than summary.json where a run goes on after an interruption."""
    if not written:
        outcome = summary.get("status", "")
        if not outcome:
            return "not started", ""
        return ("finished", "") if outcome == "finished" else ("failed", outcome.partition(": ")[2] or outcome)
    if written["state"] != "running":
        return written["state"], written["cause"] or ""
    age = f"status.json is {now - written['written']:.0f} s old"
    if written["host"] != socket.gethostname():
        return "on another host", f"its driver is on {written['host']}; {age}"
    driver = next((part.state for part in parts if part.name == DRIVER), "gone")
    if driver == "gone":
        return "driver gone", "it was killed; go on with `megatron-vespo train CONFIG --resume auto`"
    if driver == "stopped":
        return "running", "its driver is stopped (SIGSTOP or a debugger)"
    return "running", ""


def part_states(written: dict[str, Any]) -> list[PartStatus]:
    """Processes known now; of a driver that is gone, those that it knew last. Those of other hosts are as the driver was told."""
    here = written.get("host") == socket.gethostname()
    known = [
        Process(part["name"], part["pid"], part["created"], Path(written["parts_folder"]))
        for part in written.get("parts", ())
    ]
    if here and written.get("parts_folder") and Path(written["parts_folder"]).exists():
        known = processes(Path(written["parts_folder"]))
    name = written.get("host", "")
    own = [PartStatus(part.name, part.pid, part.state() if here else "unknown", name) for part in known]
    fresh = time.time() - written.get("written", 0.0) < FRESH_SECONDS
    return own + [
        PartStatus(part["name"], part["pid"], part["state"] if fresh else "unknown", part["host"])
        for part in written.get("elsewhere", ())
    ]


def last_step(metrics: Path) -> tuple[int | None, float | None]:
    """Optimizer steps done and when the last was (Unix seconds), from the end of metrics.jsonl."""
    if not metrics.exists():
        return None, None
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    for line in reversed(lines):
        if '"kind": "step"' in line and line.endswith("}") and line.startswith("{"):
            row = json.loads(line)
            return row["step"], row["timestamp"]
    return None, None


def planned_steps(config: Path) -> int | None:
    if not config.exists():
        return None
    settings = yaml.safe_load(config.read_text())
    return settings.get("algorithm", settings).get("steps")


def read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path}: not readable as JSON: {error}") from None
