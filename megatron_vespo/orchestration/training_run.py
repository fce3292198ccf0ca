"""A training run from the checks to the report, around whatever loop trains."""

import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from megatron_vespo.config import TrainConfig
from megatron_vespo.observability.console import RunConsole
from megatron_vespo.observability.open_metrics import open_metrics
from megatron_vespo.observability.report import write_report
from megatron_vespo.observability.summary import write_summary
from megatron_vespo.orchestration.interruption import run_interruptible
from megatron_vespo.orchestration.preflight import prepare_training
from megatron_vespo.orchestration.run_folder import create_run_folder
from megatron_vespo.orchestration.runtime import Runtime
from megatron_vespo.orchestration.session import Session, start_session

Loop = Callable[[Session], Awaitable[None]]


def run_training_loop(config: TrainConfig, console: RunConsole, loop: Loop) -> str:
    """Check, start, run `loop`, stop; write summary.json and report.html also when it fails.

    Returns:
        Where the outputs are and what to do next.

    Raises:
        ConfigError: before anything was started.
        RunError: the run failed or was stopped; everything of it is gone but its folder.
    """
    started = time.monotonic()
    prepared = prepare_training(config)
    folder = create_run_folder(config, config.run_dir, config.overwrite, prepared.checkpoint_bytes)
    sessions: list[Session] = []

    async def main() -> None:
        console.phase("starting Ray")
        async with Runtime(config.policy.ranks + 1, folder) as runtime:
            session = await start_session(runtime, config, prepared, folder, metrics, console)
            sessions.append(session)
            await loop(session)
            console.phase("stopping")

    def write_outputs(status: str) -> Path:
        if sessions:
            write_summary(folder, summary(sessions[0], status, time.monotonic() - started))
        return write_report(folder)

    with open_metrics(folder, config.observability.tensorboard) as metrics:
        try:
            run_interruptible(main)
        except Exception as error:
            try:
                console.event(f"what there is of the run: {write_outputs(f'failed: {error}')}")
            except Exception as second:
                # The run's own failure is the one to be told last.
                console.event(f"the report could not be written: {second}")
            raise
    return _what_next(folder, write_outputs("finished"))


def summary(session: Session, status: str, wall_seconds: float) -> dict:
    tally = session.tally
    return {
        "status": status,
        "eval_accuracy_before": tally.accuracy.get("before"),
        "eval_accuracy_after": tally.accuracy.get("after"),
        "steps": tally.steps,
        "staleness": session.config.algorithm.staleness,
        "generated_tokens": tally.generated_tokens,
        "trained_tokens": tally.trained_tokens,
        "wall_seconds": round(wall_seconds, 1),
        "weight_syncs": session.weights.syncs,
        "weight_sync_mismatches": session.weights.mismatches,
        "mean_abs_logprob_diff": tally.mean_abs_logprob_diff,
    }


def _what_next(folder: Path, report: Path) -> str:
    return (
        f"\nreport       {report}\nsummary      {folder / 'summary.json'}\ncheckpoint   {folder / 'checkpoint'}\n"
        f"metrics      {folder / 'metrics.jsonl'}, explained in docs/metrics.md\n\n"
        f"Next: open the report in a browser; evaluate the checkpoint on tasks of your choice with\n"
        f"  megatron-vespo eval {folder / 'checkpoint'} examples/tiny_base.eval.yaml\n"
        f"or change a setting on the command line, e.g. algorithm.staleness=8 run_dir=runs/staleness_8"
    )
