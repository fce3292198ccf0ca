"""A training run from the checks to the report, around whatever loop trains."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_vespo.config import TrainConfig
from megatron_vespo.observability.console import RunConsole
from megatron_vespo.observability.open_metrics import open_metrics
from megatron_vespo.observability.report import write_report
from megatron_vespo.observability.sinks import Metrics
from megatron_vespo.observability.summary import write_summary
from megatron_vespo.orchestration.checkpoints import disk_bytes, step_of
from megatron_vespo.orchestration.cluster import interface_of
from megatron_vespo.orchestration.interruption import StopRequest, run_interruptible
from megatron_vespo.orchestration.parts import Parts
from megatron_vespo.orchestration.preflight import Prepared, prepare_training
from megatron_vespo.orchestration.recovery import restarting_policy
from megatron_vespo.orchestration.resume import continue_run_folder, find_checkpoint, is_finished, restore
from megatron_vespo.orchestration.run_folder import create_run_folder, write_config
from megatron_vespo.orchestration.runtime import Runtime
from megatron_vespo.orchestration.session import Session

Loop = Callable[[Session], Awaitable[None]]


@dataclass(frozen=True)
class Resume:
    """What the command line says about going on with a run."""

    point: str = "never"
    """`never`, `auto` (the newest complete checkpoint, or from the start) or a checkpoint's folder."""
    allow_changes: bool = False
    """Also with settings that change what the run computes."""


def run_training_loop(config: TrainConfig, console: RunConsole, loop: Loop, resume: Resume) -> str:
    """Check, start, run `loop`, stop; write summary.json and report.html also when it fails.

    Returns:
        Where the outputs are and what to do next.

    Raises:
        ConfigError: before anything was started.
        RunError: the run failed or was stopped; everything of it is gone but its folder.
    """
    started = time.monotonic()
    interface = interface_of(config.cluster)
    checkpoint = find_checkpoint(config, resume.point)
    prepared = prepare_training(config)
    if checkpoint is not None:
        folder = continue_run_folder(config, checkpoint, resume.allow_changes, console)
    else:
        # Without a complete checkpoint there is nothing in an interrupted run to go on with.
        overwrite = config.overwrite or (resume.point == "auto" and not is_finished(Path(config.run_dir)))
        if resume.point == "auto" and config.checkpoint.save_every == 0:
            console.event("checkpoint.save_every is 0: nothing is saved that a later --resume could go on from")
        folder = create_run_folder(config, config.run_dir, overwrite, disk_bytes(config, prepared.checkpoint_bytes))

    stop = StopRequest()

    async def main() -> None:
        console.phase("starting Ray")
        processes = config.policy.ranks + config.rollout.engine.count
        async with Runtime(processes, folder, interface, config.cluster) as runtime:
            await run_once(Parts(runtime), config, prepared, record, console, loop, checkpoint, stop)
            console.phase("stopping")

    with recorded(config, folder, console, started, checkpoint) as record:
        run_interruptible(main, stop.ask)
    return _what_next(folder)


@dataclass
class Record:
    """Where a run writes, and what its summary is made of once it has started."""

    metrics: Metrics
    session: Session | None = None


@contextmanager
def recorded(
    config: TrainConfig, folder: Path, console: RunConsole, started: float, checkpoint: Path | None = None
) -> Iterator[Record]:
    """Around a run in `folder`: metrics are open, and however it ends, summary.json and report.html are written.

    `started`: time.monotonic() when the run began. `checkpoint`: where it goes on.
    """

    def write_outputs(status: str) -> Path:
        if record.session is not None:
            elapsed = record.session.elapsed_before + time.monotonic() - started
            write_summary(folder, summary(record.session, status, elapsed))
        return write_report(folder)

    resumed_after = None if checkpoint is None else step_of(checkpoint)
    with open_metrics(folder, config, console.event, resumed_after) as metrics:
        record = Record(metrics)
        try:
            yield record
        except (Exception, asyncio.CancelledError) as error:
            cause = str(error) or "stopped"
            try:
                console.event(f"what there is of the run: {write_outputs(f'failed: {cause}')}")
            except Exception as second:
                # The run's own failure is the one to be told last.
                console.event(f"the report could not be written: {second}")
            raise
    write_outputs("finished")


async def run_once(
    parts: Parts,
    config: TrainConfig,
    prepared: Prepared,
    record: Record,
    console: RunConsole,
    loop: Loop,
    checkpoint: Path | None = None,
    stop: StopRequest | None = None,
) -> None:
    """`checkpoint`: where to go on. `stop`: asks the loop to save and stop."""
    console.phase("starting engine, trainer and graders")
    record.session = await parts.session(config, prepared, record.metrics, console)
    record.session.stop = stop or record.session.stop
    if checkpoint is not None:
        await restore(record.session, checkpoint)
        write_config(config, Path(config.run_dir))
    async with restarting_policy(record.session):
        await loop(record.session)


def summary(session: Session, status: str, wall_seconds: float) -> dict:
    tally = session.tally
    return {
        "status": status,
        "eval_accuracy_before": tally.accuracy.get("before"),
        "eval_accuracy_after": tally.accuracy.get("after"),
        "steps": tally.steps,
        "staleness": session.config.algorithm.sync_every,
        "max_staleness": session.config.algorithm.max_staleness,
        "max_staleness_seen": tally.max_staleness_seen,
        **asynchronous_summary(session),
        "policy_restarts": tally.policy_restarts,
        "generated_tokens": tally.generated_tokens,
        "trained_tokens": tally.trained_tokens,
        "wall_seconds": round(wall_seconds, 1),
        "engine_restarts": session.engines.restarts,
        "weight_syncs": session.weights.syncs,
        "weight_sync_mismatches": session.weights.mismatches,
        "mean_abs_logprob_diff": tally.mean_abs_logprob_diff,
    }


def asynchronous_summary(session: Session) -> dict:
    """What became of every trajectory. Nothing is ever dropped for its age."""
    if session.config.algorithm.asynchronous is None:
        return {}
    tally = session.tally
    return {
        "updates_mid_generation": tally.updates_mid_generation,
        "trajectories_generated": tally.trajectories_generated,
        "trajectories_used": tally.trajectories_used,
        "trajectories_filtered": tally.trajectories_filtered,
        "trajectories_left": tally.trajectories_left,
        "dropped_for_age": (
            tally.trajectories_generated
            - tally.trajectories_used
            - tally.trajectories_filtered
            - tally.trajectories_left
        ),
        "overlap": round(tally.overlap, 3),
    }


def _what_next(folder: Path) -> str:
    return (
        f"\nreport       {folder / 'report.html'}\nsummary      {folder / 'summary.json'}\n"
        f"checkpoint   {folder / 'checkpoint'}\n"
        f"metrics      {folder / 'metrics.jsonl'}, explained in docs/metrics.md\n\n"
        f"Next: open the report in a browser; evaluate the checkpoint on the same questions, or on others, with\n"
        f"  megatron-vespo eval {folder / 'checkpoint'} {folder / 'config.yaml'}\n"
        f"or change a setting on the command line, e.g. algorithm.staleness=8 run_dir=runs/staleness_8"
    )
