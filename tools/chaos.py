"""Kill and stop parts of an asynchronous run at random, and say whether it still did all that it was to do.

python tools/chaos.py --config examples/chaos.yaml --kills 20 --hangs 10 --out runs/chaos

A kill is SIGKILL, a hang is SIGSTOP, of an engine's server or scheduler, a policy rank, a grader, or (killed only) the
driver, which is then started again with `--resume auto`. Each deed waits until the run has moved since the last one.
Try this with a configuration of your own before a long run: what a cluster does to it in a month happens in minutes.
Hangs are found by deadlines, so lower these (see examples/chaos.yaml), and allow restarts.
"""

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import psutil
import typer
from rich.console import Console
from rich.table import Table

from megatron_vespo.cli import exit_code
from megatron_vespo.config import ConfigError, TrainConfig, load_config
from megatron_vespo.errors import RunError
from megatron_vespo.rollout import process_tree

POLL_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 3.0
"""Before a deed, so that it meets any moment of a step."""
SETTLE_SECONDS = 15.0
"""After the run's end, for its processes to be gone."""
PARTS = ("engine", "policy", "grader", "driver")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Deed:
    signal: str
    part: str
    process: str
    step: int
    seconds: float
    """Since the start."""


@dataclass
class Run:
    """A run that is started as often as its driver is killed."""

    command: list[str]
    folder: Path
    log: Path
    started: float = field(default_factory=time.monotonic)
    driver: psutil.Popen | None = None
    family: set[psutil.Process] = field(default_factory=set)
    """Every process that was ever seen below a driver."""
    starts: int = 0

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.driver = psutil.Popen(self.command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        self.family.add(psutil.Process(self.driver.pid))
        self.starts += 1

    def last_step(self) -> tuple[int, float]:
        """In metrics.jsonl, and when it was taken, in Unix seconds."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        rows = [row for row in map(_row, lines) if row.get("kind") == "step"]
        return (rows[-1]["step"], rows[-1]["timestamp"]) if rows else (0, 0.0)

    def ended(self) -> int | None:
        assert self.driver is not None
        return self.driver.poll()

    def processes(self) -> dict[str, list[psutil.Process]]:
        """Of each part, those that run."""
        assert self.driver is not None
        found: dict[str, list[psutil.Process]] = {part: [] for part in PARTS}
        found["driver"] = [psutil.Process(self.driver.pid)]
        for process in psutil.Process(self.driver.pid).children(recursive=True):
            self.family.add(process)
            try:
                name, words = process.name(), " ".join(process.cmdline())
            except psutil.NoSuchProcess:
                continue
            if name.startswith("sglang::") or "megatron_vespo.rollout.serve" in words:
                found["engine"].append(process)
            elif "PolicyRank" in words:
                found["policy"].append(process)
            elif "megatron_vespo.rewards" in words:
                found["grader"].append(process)
        return found


def _row(line: str) -> dict:
    try:
        return json.loads(line)
    except json.JSONDecodeError:  # half of the last line
        return {}


@app.command()
def command(
    config: Annotated[Path, typer.Option(help="YAML of an asynchronous run (TrainConfig).")],
    out: Annotated[Path, typer.Option(help="Folder of the run, replaced if it holds one.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings of the run, as key.path=value.", metavar="[KEY=VALUE]...")
    ] = None,
    kills: Annotated[int, typer.Option(min=0)] = 20,
    hangs: Annotated[int, typer.Option(min=0)] = 10,
    seed: Annotated[int, typer.Option(help="Of what is done to whom.")] = 1,
    minutes: Annotated[float, typer.Option(help="The whole must have ended by then.")] = 60,
    report: Annotated[Path | None, typer.Option("--json", help="Also write the outcome as JSON.")] = None,
) -> None:
    """Kill and stop parts of an asynchronous run at random, and say whether it still did all that it was to do."""
    settings = ["observability.console=plain", *(overrides or ()), f"run_dir={out}"]
    planned = load_config(TrainConfig, config, settings)
    if planned.algorithm.asynchronous is None or planned.algorithm.advantage.zero_variance_groups == "filter":
        raise ConfigError(
            f"{config}: chaos needs algorithm.asynchronous, and advantage.zero_variance_groups: keep, so that the prompts "
            "of the run are known beforehand"
        )
    train = [sys.executable, "-m", "megatron_vespo", "train", str(config), *settings, "overwrite=true"]
    out.parent.mkdir(parents=True, exist_ok=True)
    run = Run([*train, "--resume", "auto"], out, out.with_name(f"{out.name}.log"))
    run.log.unlink(missing_ok=True)
    deeds = torment(run, planned.algorithm.steps, kills, hangs, random.Random(seed), 60 * minutes)
    outcome = judge(run, planned, deeds)
    show(outcome, deeds)
    if report is not None:
        report.write_text(json.dumps(outcome | {"deeds": [asdict(deed) for deed in deeds]}, indent=1) + "\n")
    if outcome["wrong"]:
        raise RunError("; ".join(outcome["wrong"]))


def torment(run: Run, steps: int, kills: int, hangs: int, chance: random.Random, seconds: float) -> list[Deed]:
    """Run it to its end, through so many deeds. Raises RunError where it ends by itself, or not in time."""
    numbers = [signal.SIGKILL] * kills + [signal.SIGSTOP] * hangs
    chance.shuffle(numbers)
    todo, deeds, last_deed = list(numbers), [], time.time()
    run.start()
    while True:
        time.sleep(POLL_SECONDS)
        if time.monotonic() - run.started > seconds:
            raise RunError(f"not at its end after {seconds:.0f} s; {len(deeds)} deeds; its output is in {run.log}")
        code, (step, taken) = run.ended(), run.last_step()
        if code == 0 and not todo:
            return deeds
        if code is not None:
            raise RunError(
                f"it ended by itself (exit code {code}) after {len(deeds)} deeds; its output is in {run.log}"
            )
        due = steps * (len(deeds) + 1) / (kills + hangs + 1)
        run.processes()
        if not todo or step < due or taken < last_deed:
            continue
        time.sleep(chance.uniform(0, LONGEST_PAUSE_SECONDS))
        if (deed := do(run, todo[-1], chance)) is not None:
            todo.pop()
            deeds.append(deed)
            print(
                f"{deed.seconds:6.1f} s  step {deed.step:4d}  {deed.signal} of {deed.part} ({deed.process})", flush=True
            )
            last_deed = time.time()


def do(run: Run, number: signal.Signals, chance: random.Random) -> Deed | None:
    """To a part that is there, each as likely as the others; None: it was gone."""
    processes = run.processes()
    there = [part for part in PARTS if processes[part] and not (part == "driver" and number == signal.SIGSTOP)]
    part = chance.choice(there)
    victim, (step, _) = chance.choice(processes[part]), run.last_step()
    try:
        name = victim.name()
        victim.send_signal(number)
    except psutil.NoSuchProcess:
        return None
    if part == "driver":
        assert run.driver is not None
        run.driver.wait()
        run.start()
    return Deed(number.name, part, name, step, round(time.monotonic() - run.started, 1))


def judge(run: Run, planned: TrainConfig, deeds: list[Deed]) -> dict:
    """What became of steps, prompts and processes; `wrong` lists what should not be so."""
    summary = json.loads((run.folder / "summary.json").read_text())
    rows = [json.loads(line) for line in (run.folder / "weights.jsonl").read_text().splitlines()]
    used = Counter(prompt for row in rows for prompt in row["prompts"])
    expected = first_prompts(planned, planned.algorithm.steps * planned.algorithm.prompts_per_step)
    process_tree.wait(list(run.family), SETTLE_SECONDS)
    alive = process_tree.running(list(run.family))
    counts = Counter((deed.signal, deed.part) for deed in deeds)
    steps = [row["step"] for row in rows]
    wrong = []
    if summary["status"] != "finished" or steps != list(range(1, planned.algorithm.steps + 1)):
        wrong.append(f"status {summary['status']} with {len(steps)} of {planned.algorithm.steps} steps")
    if used != Counter(expected):
        lost, twice = set(expected) - set(used), [name for name, count in used.items() if count > 1]
        wrong.append(
            f"{len(lost)} prompts lost, {len(twice)} used twice, {len(set(used) - set(expected))} not expected"
        )
    if summary["max_staleness_seen"] > summary["max_staleness"] or summary["dropped_for_age"]:
        wrong.append(f"staleness {summary['max_staleness_seen']}, {summary['dropped_for_age']} dropped for age")
    if summary["weight_sync_mismatches"]:
        wrong.append(f"{summary['weight_sync_mismatches']} tensors differed on engines")
    if alive:
        wrong.append(f"still there: {', '.join(f'{p.pid} {p.name()}' for p in alive)}")
    return {
        "steps": len(steps),
        "prompts_used_once": sum(count == 1 for count in used.values()),
        "prompts_expected": len(expected),
        "max_staleness_seen": summary["max_staleness_seen"],
        "max_staleness": summary["max_staleness"],
        "starts_of_the_driver": run.starts,
        "orphans": len(alive),
        "seconds": round(time.monotonic() - run.started, 1),
        "done": {f"{name} {part}": count for (name, part), count in sorted(counts.items())},
        "wrong": wrong,
    }


def first_prompts(planned: TrainConfig, count: int) -> list[str]:
    """The prompts that a run uses which nothing happens to: the first of its stream."""
    from megatron_vespo.orchestration.preflight import prepare_training

    return [prompt.identity for prompt in prepare_training(planned).prompts.take(count)]


def show(outcome: dict, deeds: list[Deed]) -> None:
    table = Table("what", "figure")
    for name, value in outcome.items():
        if name not in ("done", "wrong"):
            table.add_row(name, str(value))
    for name, count in outcome["done"].items():
        table.add_row(name, str(count))
    Console(width=100).print(table)


if __name__ == "__main__":
    sys.exit(exit_code(app))
