"""A grid of training runs, one after the other, with Ray, trainer processes, engine and graders kept between them."""

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_vespo.config import PlannedRun
from megatron_vespo.errors import ConfigError, RunError
from megatron_vespo.observability.comparison import comparison_rows, write_comparison
from megatron_vespo.observability.comparison_grid import Variant
from megatron_vespo.observability.console import RunConsole
from megatron_vespo.observability.run_folder import read_run
from megatron_vespo.orchestration.cluster import interface_of
from megatron_vespo.orchestration.interruption import Interrupted, run_interruptible
from megatron_vespo.orchestration.parts import Parts
from megatron_vespo.orchestration.preflight import prepare_training
from megatron_vespo.orchestration.resume import changed, settings_of
from megatron_vespo.orchestration.resume import is_finished as finished
from megatron_vespo.orchestration.run_folder import create_run_folder
from megatron_vespo.orchestration.runtime import Runtime
from megatron_vespo.orchestration.training import loop_of
from megatron_vespo.orchestration.training_run import recorded, run_once

PAGE = "comparison.html"
FIGURES = "comparison.json"
CONSOLE_LOG = "console.log"
WHERE = ("run_dir", "cluster", "observability")
"""Settings that say where a run is and how it is watched: a finished run may differ in them."""

Also = Callable[[list[Variant]], None]
"""Given all runs that have begun, whenever they are compared: writes a comparison of its own."""


def run_ablation(
    title: str, planned: list[PlannedRun], out: Path, minutes: float | None = None, also: Also | None = None
) -> str:
    """`megatron-vespo ablate`: train what is not finished in `out`, then compare all.

    A run that fails is named at the end, and the others go on. After `minutes` no further run is started; the same
    command goes on later.

    Returns:
        Where the comparison is, and what is left to do.

    Raises:
        ConfigError: a run's inputs are wrong, or `out` holds runs of another grid.
        RunError: some runs failed, or the command was stopped.
    """
    started = time.monotonic()
    todo = [run for run in planned if not is_finished(run)]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be made a folder ({error.strerror})") from None
    print(f"{len(planned)} runs, {len(planned) - len(todo)} of them finished before; in {out}", flush=True)
    failed: list[str] = []

    def in_time() -> bool:
        return minutes is None or time.monotonic() - started < 60 * minutes

    async def train_on() -> None:
        cluster = todo[0].config.cluster
        processes = max(run.config.policy.ranks + run.config.rollout.engine.count for run in todo)
        async with Runtime(processes, out, interface_of(cluster), cluster) as runtime:
            parts = Parts(runtime)
            while todo and in_time():
                await train_one(parts, todo[0], f"[{len(planned) - len(todo) + 1}/{len(planned)}]")
                todo.pop(0)
                compare(title, planned, out, also)

    while todo and in_time():
        try:
            run_interruptible(train_on)
        except Interrupted:
            compare(title, planned, out, also)
            raise
        except RunError as error:
            # What is left of a failed run is not built upon: the next one starts everything anew.
            run = todo.pop(0)
            failed.append(f"{run.variant}, seed {run.seed}: {error}")
            print(f"  failed: {error}", flush=True)
    compare(title, planned, out, also)
    page = out / PAGE
    if failed:
        raise RunError(f"{len(failed)} of {len(planned)} runs failed; {page} compares the others\n" + "\n".join(failed))
    if not (out / FIGURES).exists():
        return "no run has begun: nothing to compare"
    left = f"\n{len(todo)} runs are left: the same command goes on with them" if todo else ""
    figures = json.loads((out / FIGURES).read_text())
    return f"\n{table(figures)}\n\ncomparison   {page}\nfigures      {out / FIGURES}{left}"


def table(rows: list[dict[str, Any]]) -> str:
    """A line a variant: accuracy as mean (least to largest) over seeds."""
    width = max(len(row["name"]) for row in rows)
    lines = [f"{'':{width}}  seeds  collapsed  before  final accuracy          best"]
    for row in rows:
        before, final, best = (row[f"accuracy_{name}"] for name in ("before", "final", "best"))
        if final["n"]:
            spread = f"{final['mean']:.3f} ({final['min']:.3f} to {final['max']:.3f})  {best['mean']:.3f}"
        else:
            spread = "none finished"
        first = f"{before['mean']:.3f}" if before["n"] else "    -"
        lines.append(f"{row['name']:{width}}  {row['seeds']:5d}  {row['collapsed']:9d}   {first}  {spread}")
    return "\n".join(lines)


def is_finished(run: PlannedRun) -> bool:
    """Raises ConfigError where the folder holds a finished run with other settings."""
    folder = Path(run.config.run_dir)
    if not finished(folder):
        return False
    differ = changed(settings_of(folder), run.config.model_dump(mode="json"))
    if found := [f"{key}: {was} -> {now}" for key, was, now in differ if key.partition(".")[0] not in WHERE]:
        raise ConfigError(
            f"{folder}: holds a finished run with other settings ({'; '.join(found)}). Choose another --out, or remove it"
        )
    return True


async def train_one(parts: Parts, run: PlannedRun, number: str) -> None:
    """Its console output goes to its folder; one line about it is printed."""
    started, config = time.monotonic(), run.config
    print(f"{number} {run.variant}, seed {run.seed} ...", flush=True)
    prepared = prepare_training(config)
    folder = create_run_folder(config, config.run_dir, config.overwrite, prepared.checkpoint_bytes)
    with ExitStack() as stack:
        log = stack.enter_context((folder / CONSOLE_LOG).open("w"))
        console = RunConsole(
            run.variant,
            config.algorithm.steps,
            config.algorithm.sync_every,
            "plain",
            Console(file=log, highlight=False),
        )
        stack.enter_context(console)
        record = stack.enter_context(recorded(config, folder, console, started))
        await run_once(parts, config, prepared, record, console, loop_of(config))
        assert record.session is not None
        accuracy = record.session.tally.accuracy
    seconds = time.monotonic() - started
    print(f"  accuracy {accuracy['before']:.3f} -> {accuracy['after']:.3f} in {seconds:.0f} s", flush=True)


def compare(title: str, planned: list[PlannedRun], out: Path, also: Also | None) -> None:
    """Write the page and the figures of all runs that have begun."""
    if variants := _variants(planned):
        (out / FIGURES).write_text(json.dumps(comparison_rows(variants), indent=1) + "\n")
        write_comparison(out / PAGE, title, variants)
        if also is not None:
            also(variants)


def _variants(planned: list[PlannedRun]) -> list[Variant]:
    begun: dict[str, list[PlannedRun]] = {}
    for run in planned:
        if (Path(run.config.run_dir) / "metrics.jsonl").exists():
            begun.setdefault(run.variant, []).append(run)
    names = dict.fromkeys(run.variant for run in planned if run.variant in begun)
    return [
        Variant(
            name, [read_run(run.config.run_dir) for run in begun[name]], begun[name][0].method, begun[name][0].point
        )
        for name in names
    ]
