"""Go on with a run from one of its checkpoints, as if it had not been interrupted."""

import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megatron_vespo.config import ConfigError, TrainConfig
from megatron_vespo.observability.console import RunConsole
from megatron_vespo.observability.status import MARKER
from megatron_vespo.orchestration.checkpoints import (
    EXPORTS,
    PROGRESS_FILE,
    ROW_FILES,
    complete_checkpoints,
    load_trainer,
    of_steps,
    remove,
    require_whole,
    step_of,
)
from megatron_vespo.orchestration.engine_weights import deliver
from megatron_vespo.orchestration.run_folder import CONFIG_COPY
from megatron_vespo.orchestration.session import Session, Tally
from megatron_vespo.rollout.trajectory_file import read_trajectories

FREE = (
    *("run_dir", "overwrite", "observability", "checkpoint", "weight_sync", "reward.workers", "cluster"),
    *(
        "evaluation.every_steps",
        "evaluation.samples_per_prompt",
        "algorithm.steps",
        "algorithm.gradient_variance_every",
    ),
    *("rollout.engine", "rollout.concurrent_groups", "policy"),
)
"""Settings, or groups of them, that a run may change between its parts: they are not part of what it computes."""
NOT_FREE = (
    *("policy.reference", "policy.router_aux_loss", "policy.router_z_loss", "policy.router_dtype"),
    *("rollout.engine.dtype", "rollout.engine.extra_arguments", "rollout.engine.router_noise"),
    "weight_sync.flush_cache",
)


def find_checkpoint(config: TrainConfig, resume: str) -> Path | None:
    """`never`: None. `auto`: the newest complete checkpoint in run_dir, None without one. Else a checkpoint's folder.

    Raises:
        ConfigError: the folder is no checkpoint, or is not whole.
    """
    if resume == "never":
        return None
    if resume == "auto":
        found = complete_checkpoints(Path(config.run_dir))
        checkpoint = found[-1] if found else None
    else:
        checkpoint = Path(resume)
        if checkpoint not in complete_checkpoints(checkpoint.parent.parent):
            raise ConfigError(f"--resume {resume}: not a complete checkpoint (RUN_DIR/checkpoints/step_...)")
        if checkpoint.parent.parent.resolve() != Path(config.run_dir).resolve():
            raise ConfigError(f"--resume {resume}: not a checkpoint of run_dir {config.run_dir}")
    if checkpoint is not None:
        require_whole(checkpoint)
    return checkpoint


def continue_run_folder(config: TrainConfig, checkpoint: Path, allow_changes: bool, console: RunConsole) -> Path:
    """The run's folder as it was at `checkpoint`: rows, checkpoints and exports of later steps are taken away.

    Raises:
        ConfigError: settings changed that change what the run computes; lists them. Or the metrics were cut.
    """
    folder = Path(config.run_dir)
    if not (folder / MARKER).exists():
        raise ConfigError(f"run_dir {folder}: not a run of ours")
    now = config.model_dump(mode="json")
    changes = list(changed(settings_of(folder), now))
    refused = [
        change for change in changes if not is_free(change[0], constant_rate=config.optimizer.schedule == "constant")
    ]
    if refused and not allow_changes:
        raise ConfigError(
            f"{folder}: these settings are not those of the interrupted run, and change what it computes:\n"
            + "\n".join(f"  {key}: {was} -> {is_now}" for key, was, is_now in refused)
            + "\nStart another run (run_dir), or go on with them: --allow-changes"
        )
    saved = read_progress(checkpoint)
    if config.algorithm.steps < saved["step"]:
        raise ConfigError(f"algorithm.steps: {config.algorithm.steps}, but {checkpoint} is of step {saved['step']}")
    for name, size in saved["metrics"].items():
        if (folder / name).stat().st_size < size:
            raise ConfigError(f"{folder / name}: shorter than when {checkpoint} was saved ({size} bytes)")
    for key, was, is_now in changes:
        console.event(f"changed since the run was interrupted: {key}: {was} -> {is_now}")
    for name in ROW_FILES:
        if (folder / name).exists():
            os.truncate(folder / name, saved["metrics"].get(name, 0))
    for later in (*of_steps(checkpoint.parent), *of_steps(folder / EXPORTS)):
        if step_of(later) > saved["step"]:
            remove(later)
    return folder


def is_finished(folder: Path) -> bool:
    """Whether a run in `folder` came to its end."""
    summary = folder / "summary.json"
    return summary.exists() and json.loads(summary.read_text())["status"] == "finished"


def settings_of(folder: Path) -> dict[str, Any]:
    """Of the run in `folder`. Those that are younger than the run have their defaults, which are what it did."""
    written = yaml.safe_load((folder / CONFIG_COPY).read_text())
    try:
        return TrainConfig.model_validate(written).model_dump(mode="json")
    except ValidationError:
        # A setting is gone since, or means something else: it will be named as one that differs.
        return written


def is_free(key: str, constant_rate: bool = True) -> bool:
    """`constant_rate`: of learning; else the number of steps decides what each step's rate is."""
    if key == "algorithm.steps" and not constant_rate:
        return False

    def within(groups: tuple[str, ...]) -> bool:
        return any(key == group or key.startswith(f"{group}.") for group in groups)

    return within(FREE) and not within(NOT_FREE)


def changed(before: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key.path, value before, value now) of every setting that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in dict.fromkeys([*before, *now]):
            yield from changed(before.get(name), now.get(name), f"{key}.{name}" if key else name)
    elif before != now:
        yield key, before, now


def read_progress(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / PROGRESS_FILE).read_text())


async def restore(session: Session, checkpoint: Path) -> None:
    """Bring trainer, prompts, trajectories and tally to where they were.

    The engine gets the version that it held if that is the trainer's own; else nothing: what it had sampled under an
    older one is in the checkpoint, and before it samples again it gets new weights anyway.
    """
    saved = read_progress(checkpoint)
    session.console.phase(f"going on after step {saved['step']}")
    await load_trainer(session, checkpoint)
    trajectories = iter(read_trajectories(checkpoint))
    session.progress.step = saved["step"]
    session.progress.mini_batches = [list(islice(trajectories, count)) for count in saved["mini_batches"]]
    session.prompts.load_state_dict(saved["prompts"])
    session.progress.drawn = saved["drawn"]
    session.tally = Tally(**saved["tally"])
    session.elapsed_before = saved["elapsed_seconds"]
    if saved["weights"]["version"] == saved["step"]:
        await deliver(session, lambda: session.engines.present)
    session.weights.syncs = saved["weights"]["syncs"]
    session.weights.mismatches = saved["weights"]["mismatches"]
    session.console.event(f"resumed after step {saved['step']} from {checkpoint}")
