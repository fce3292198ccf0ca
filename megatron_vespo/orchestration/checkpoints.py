"""Checkpoints of a run in `run_dir/checkpoints`: written beside training, complete under their name or not there."""

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_vespo.config import CheckpointConfig, ConfigError, TrainConfig
from megatron_vespo.orchestration.interruption import SAVE_SIGNAL, Interrupted
from megatron_vespo.orchestration.session import Session
from megatron_vespo.rollout.trajectory_file import write_trajectories

FOLDER = "checkpoints"
EXPORTS = "exports"
PREFIX = "step_"
PARTIAL = ".partial"
PROGRESS_FILE = "progress.json"
COMPLETE_FILE = "complete.json"
"""Written last; names every other file with its size."""
FORMAT = 1
ROW_FILES = ("metrics.jsonl", "weights.jsonl", "routing.jsonl")
"""In a run's folder, to which rows are added; the last only where routes are recorded."""


@dataclass
class Pending:
    """A checkpoint whose files are being written."""

    step: int
    folder: Path
    started: float
    copy_seconds: float


class Checkpoints:
    def __init__(self, session: Session, note_progress: Callable[[], None] = lambda: None) -> None:
        """`note_progress` brings `session.progress` up to date; called at the moment that is saved."""
        self._session = session
        self._note_progress = note_progress
        self._config = session.config.checkpoint
        self._folder = session.folder / FOLDER
        self._pending: Pending | None = None
        session.writers.append(self)
        for left in self._folder.glob(f"*{PARTIAL}"):  # of a run that was killed while it wrote
            shutil.rmtree(left)

    async def after_step(self) -> None:
        """Complete what is written by now, and begin a new one if it is due.

        Raises:
            Interrupted: the run was asked to save and stop, and has saved.
        """
        await self.settle(wait=False)
        stopping = self._session.stop.asked
        if stopping or (self._config.save_every > 0 and self._session.progress.step % self._config.save_every == 0):
            await self.begin()
        if stopping:
            await self.settle(wait=True)
            raise Interrupted(SAVE_SIGNAL, f", after a checkpoint of step {self._session.progress.step}")

    async def begin(self) -> None:
        """Copy the state of now; it is written while training goes on. One that is still being written is waited for."""
        await self.settle(wait=True)
        session, started = self._session, time.monotonic()
        step = session.progress.step
        session.console.phase("copying the state")
        folder = self._folder / f"{name_of(step)}{PARTIAL}"
        folder.mkdir(parents=True)
        # From here to the copy of the driver's state nothing is awaited, so all of it is of one moment.
        self._note_progress()
        left = session.progress.mini_batches
        write_trajectories([trajectory for mini_batch in left for trajectory in mini_batch], folder)
        (folder / PROGRESS_FILE).write_text(json.dumps(progress_of(session), indent=1) + "\n")
        await session.policy.retried(lambda: self._copy(folder))
        self._pending = Pending(step, folder, started, time.monotonic() - started)

    async def _copy(self, folder: Path) -> None:
        await self._session.policy.on_all(
            "copy the state to be saved",
            lambda actor, _: actor.begin_save.remote(str(folder)),
            self._config.timeout_seconds,
        )

    async def begin_again(self, step: int) -> None:
        """Over the files of the processes that are gone; the driver's own files are those of that moment."""
        if self._pending is not None and self._pending.step == step:
            await self._copy(self._pending.folder)

    async def settle(self, *, wait: bool) -> None:
        """Complete the checkpoint that is being written if its files are there; `wait`: until they are."""
        if self._pending is None:
            return
        session, pending = self._session, self._pending
        if not await session.policy.retried(lambda: self._written(wait)):
            return
        sizes = complete(pending.folder)
        self._pending = None
        if session.journal is not None:
            session.journal.drop_before(pending.step)
        prune(session.folder, self._config)
        session.console.event(f"checkpoint of step {pending.step} is complete")
        session.record(
            "checkpoint",
            pending.step,
            {
                "bytes": sum(sizes.values()),
                "time/copy": pending.copy_seconds,
                "time/written": time.monotonic() - pending.started,
            },
        )

    async def _written(self, wait: bool) -> bool:
        """Whether all ranks have written what is theirs; `wait`: until they have."""
        policy, seconds = self._session.policy, self._config.timeout_seconds
        if not wait and not all(await policy.on_all("look at the save", lambda actor, _: actor.saved.remote())):
            return False
        await policy.on_all("finish the save", lambda actor, _: actor.finish_save.remote(), seconds)
        return True


async def load_trainer(session: Session, checkpoint: Path) -> None:
    """Into policy processes that were just built."""
    await session.policy.on_all(
        "load the saved state",
        lambda actor, _: actor.load_saved.remote(str(checkpoint), step_of(checkpoint)),
        session.config.checkpoint.timeout_seconds,
    )


def prune(run_dir: Path, config: CheckpointConfig) -> None:
    """Remove what neither `keep_last` nor `keep_every` keeps, oldest first."""
    for folder in complete_checkpoints(run_dir)[: -config.keep_last]:
        if not (config.keep_every and step_of(folder) % config.keep_every == 0):
            remove(folder)


def remove(folder: Path) -> None:
    """Half of a checkpoint never bears its name."""
    doomed = folder.with_name(f"{folder.name}.removed{PARTIAL}")
    folder.rename(doomed)
    shutil.rmtree(doomed)


def disk_bytes(config: TrainConfig, model_bytes: int) -> int:
    """What the run's models and checkpoints take: `model_bytes` is one exported model."""
    checkpoint, steps = config.checkpoint, config.algorithm.steps
    exported = 1 + (steps // checkpoint.export_every if checkpoint.export_every else 0)
    if checkpoint.save_every == 0:
        return model_bytes * exported
    # Two moments in float32; beside bfloat16 weights also float32 masters, each twice as large as the weights.
    models = 3 if config.model.dtype == "float32" else 7
    kept = checkpoint.keep_last + 1 + (steps // checkpoint.keep_every if checkpoint.keep_every else 0)
    return model_bytes * (exported + models * min(kept, steps // checkpoint.save_every + 1))


def name_of(step: int) -> str:
    return f"{PREFIX}{step:08d}"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix(PREFIX))


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """Oldest first."""
    return [folder for folder in of_steps(run_dir / FOLDER) if (folder / COMPLETE_FILE).exists()]


def of_steps(folder: Path) -> list[Path]:
    """What is named after a step in `folder`, oldest first."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=step_of)


def complete(partial: Path) -> dict[str, int]:
    """Give a checkpoint its name once every file is on disk. Returns the size of each.

    Raises:
        OSError: there is one of that name, which is left as it is.
    """
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    sizes = {str(path.relative_to(partial)): path.stat().st_size for path in files}
    for path in files:
        _to_disk(path)
    (partial / COMPLETE_FILE).write_text(json.dumps({"format": FORMAT, "files": sizes}, indent=1) + "\n")
    _to_disk(partial / COMPLETE_FILE)
    for folder in {path.parent for path in files} | {partial}:
        _to_disk(folder)
    final = partial.with_name(partial.name.removesuffix(PARTIAL))
    partial.rename(final)
    _to_disk(final.parent)
    return sizes


def require_whole(checkpoint: Path) -> None:
    """Raises ConfigError if a file of a complete checkpoint is missing or was cut since."""
    listed = json.loads((checkpoint / COMPLETE_FILE).read_text())
    if listed["format"] != FORMAT:
        raise ConfigError(f"{checkpoint}: format {listed['format']} is not of this version, which reads {FORMAT}")
    for name, size in listed["files"].items():
        path = checkpoint / name
        if not path.exists():
            raise ConfigError(f"{path}: missing from the checkpoint. Resume from another: --resume CHECKPOINT")
        if path.stat().st_size != size:
            raise ConfigError(f"{path}: {path.stat().st_size} bytes, was saved with {size}. Resume from another")


def progress_of(session: Session) -> dict[str, Any]:
    """What the driver knows; small. `metrics`: bytes of the files of rows that were written so far."""
    folder = session.folder
    return {
        "step": session.progress.step,
        "mini_batches": [len(mini_batch) for mini_batch in session.progress.mini_batches],
        "prompts": session.progress.prompts or session.prompts.state_dict(),
        "drawn": session.progress.drawn,
        "tally": asdict(session.tally),
        "weights": {
            "version": session.engines.weight_version,
            "syncs": session.weights.syncs,
            "mismatches": session.weights.mismatches,
        },
        "metrics": {name: (folder / name).stat().st_size for name in ROW_FILES if (folder / name).exists()},
        "elapsed_seconds": session.elapsed_seconds,
    }


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
