"""Clocks: of this host against its file server's, and of the nodes of a job against each other."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megatron_vespo.doctor.finding import Finding

TOLERATED = 1.0
"""Seconds."""
COARSE = 0.02
"""Seconds by which a kernel's file times lag behind its clock."""
PINGS = 5
ANSWER = "import sys, time\nfor line in sys.stdin: print(repr(time.time()), flush=True)"
COST = "times in logs and metrics of several hosts don't compare; the newest file may look old"
MEND = "chronyc makestep on the host that is off (timedatectl set-ntp true); ask the site"


@dataclass(frozen=True)
class Offset:
    """Seconds by which another clock is ahead of this one, within `uncertainty`."""

    seconds: float
    uncertainty: float

    @property
    def least(self) -> float:
        """Seconds by which they differ for certain."""
        return max(0.0, abs(self.seconds) - self.uncertainty)

    def __str__(self) -> str:
        return f"{self.seconds:+.3f} s (within {self.uncertainty:.3f} s)"


def file_offset(folder: Path, clock: Callable[[], float] = time.time) -> Offset:
    """Of the clock that stamps files in `folder`: the server's, where it is on one. `clock` is this host's."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
        before = clock()
        file.write(b"now")
        file.flush()
        stamped = Path(file.name).stat().st_mtime
        after = clock()
    middle = (before + after) / 2
    return Offset(stamped - middle, (after - before) / 2 + COARSE)


def check_file_clock(folder: Path) -> Finding:
    """`folder`: an existing one on the file system that the run's hosts share."""
    offset = file_offset(folder)
    found = f"files in {folder} are stamped {offset} against this host"
    if offset.least <= TOLERATED:
        return Finding("clock, files", "ok", found)
    return Finding("clock, files", "warning", found, f"at most {TOLERATED:g} s", COST, MEND)


def process_offset(command: Sequence[str], seconds: float) -> Offset:
    """Of the clock that `command` sees: a process that answers each line with its time. The quickest answer counts.

    Raises:
        RuntimeError: it did not answer within `seconds`, or not with a time.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process, ThreadPoolExecutor(1) as reader:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        offsets = []
        try:
            for _ in range(PINGS):
                before = time.time()
                process.stdin.write("?\n")
                process.stdin.flush()
                answer = reader.submit(process.stdout.readline).result(seconds)
                after = time.time()
                offsets.append(Offset(float(answer) - (before + after) / 2, (after - before) / 2))
            process.stdin.close()
        except (OSError, TimeoutError, ValueError) as error:
            process.kill()
            said = process.stderr.read().strip() or f"{type(error).__name__} {error}".strip()
            raise RuntimeError(f"{command[0]}: {said}") from None
    return min(offsets, key=lambda offset: offset.uncertainty)


def on_node(node: str) -> list[str]:
    """The command that answers with `node`'s time, from within a job."""
    step = ["srun", "--overlap", "--nodes=1", "--ntasks=1", f"--nodelist={node}", "--mem=0", "--gres=none"]
    return [*step, sys.executable, "-u", "-c", ANSWER]


def check_node_clocks(nodes: Sequence[str], seconds: float = 25.0) -> Finding:
    """Each node's clock against this host's, asked through srun as NTP asks: half of the round trip is uncertain."""
    if len(nodes) < 2:
        found = "not asked: this is no job of several nodes" if not nodes else "not asked: the job has one node"
        mend = "run it inside the job: srun --nodes=1 --ntasks=1 --overlap megatron-vespo doctor"
        return Finding("clock, nodes", "note", found, "", "", mend if not nodes else "")

    def ask(node: str) -> Offset | str:
        try:
            return process_offset(on_node(node), seconds)
        except (RuntimeError, OSError) as error:
            return str(error)

    with ThreadPoolExecutor(16) as pool:
        answers = dict(zip(nodes, pool.map(ask, nodes), strict=True))
    silent = {node: answer for node, answer in answers.items() if isinstance(answer, str)}
    offsets = {node: answer for node, answer in answers.items() if isinstance(answer, Offset)}
    if silent:
        node, why = next(iter(silent.items()))
        found = f"{len(silent)} of {len(nodes)} nodes did not tell their time; {node}: {why}"
        return Finding(
            "clock, nodes",
            "warning",
            found,
            "an answer",
            "the skew is not known",
            f"{' '.join(on_node(node)[:6])} date",
        )
    off = {node: offset for node, offset in offsets.items() if offset.least > TOLERATED}
    worst = max(offsets.items(), key=lambda item: abs(item[1].seconds))
    if not off:
        return Finding("clock, nodes", "ok", f"{len(nodes)} nodes; furthest from this host {worst[0]}: {worst[1]}")
    told = ", ".join(f"{node} {offset}" for node, offset in off.items())
    return Finding("clock, nodes", "warning", f"off against this host: {told}", f"at most {TOLERATED:g} s", COST, MEND)
