"""The folder that a run writes: made before anything starts, never over somebody else's files."""

import shutil
from pathlib import Path

import yaml

from megatron_vespo.config import ConfigError, Section
from megatron_vespo.observability.status import MARKER

CONFIG_COPY = "config.yaml"
KEPT = "slurm"
"""Logs of the jobs that ran it: begun before the run, and kept by a run that replaces another."""
SPARE_BYTES = 256 * 2**20
"""For metrics, logs and the report."""


def create_run_folder(config: Section, run_dir: str, overwrite: bool, checkpoint_bytes: int) -> Path:
    """Make `run_dir`, with the resolved configuration in it.

    Args:
        checkpoint_bytes: what the run will export; checked against the free disk space.

    Raises:
        ConfigError: the folder holds a run and `overwrite` is off, or holds something else, or has no space.
    """
    folder = Path(run_dir)
    _require_space(folder, checkpoint_bytes + SPARE_BYTES)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"run_dir {folder}: is a file. Choose another folder")
    there = [path for path in folder.iterdir() if path.name != KEPT] if folder.exists() else []
    if there:
        if not (folder / MARKER).exists() or folder.absolute() in (Path.cwd(), *Path.cwd().parents):
            raise ConfigError(f"run_dir {folder}: not empty, and not a run of ours. Choose another folder")
        if not overwrite:
            raise ConfigError(f"run_dir {folder}: holds a run already. Choose another folder, or set overwrite=true")
    try:
        for path in there:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARKER).touch()
        write_config(config, folder)
    except OSError as error:
        raise ConfigError(f"run_dir {folder}: cannot be written ({error.strerror})") from None
    return folder


def write_config(config: Section, folder: Path) -> None:
    (folder / CONFIG_COPY).write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def _require_space(folder: Path, needed: int) -> None:
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ConfigError(
            f"run_dir {folder}: {free / 2**20:,.0f} MiB free, {needed / 2**20:,.0f} MiB needed for the exported "
            "checkpoint, metrics and logs. Free space, or choose a folder on another disk"
        )
