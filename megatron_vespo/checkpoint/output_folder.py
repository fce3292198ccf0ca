"""A folder that is complete under its name, or not there; and what stands in a model's folder beside its weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from megatron_vespo.architecture.hf_config import CONFIG_FILE
from megatron_vespo.config import ConfigError

COPIED_FILES = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates",
    "LICENSE*",
)
"""What stands beside the weights and is no weight (shell patterns)."""


def require_replaceable(target: Path, source: Path, marker: str, overwrite: bool) -> None:
    """`marker`: a file that is in every folder of the kind that may be replaced.

    Raises:
        ConfigError: `target` exists, and was not to be replaced or is something else.
    """
    if target.exists() and not overwrite:
        raise ConfigError(f"{target}: exists already; choose another folder, or remove it")
    if target.exists() and not (target.is_dir() and (target / marker).exists()):
        raise ConfigError(f"{target}: exists and is not a model folder, so it is not replaced")
    if target.exists() and target.samefile(source):
        raise ConfigError(f"{target}: is the source of the tokenizer; choose another folder")


def require_room(target: Path, needed: int) -> None:
    """Raises ConfigError if the file system of `target`, which need not exist, has not `needed` bytes free."""
    parent = target.parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise ConfigError(
            f"{target}: not enough disk space: {needed / 1e9:.3g} GB are needed, {free / 1e9:.3g} GB are free"
        )


def write_config(config: dict[str, Any], folder: Path, dtype: torch.dtype | None) -> None:
    """The source's config.json with the dtype that was written: transformers casts the weights to what stands there.

    `dtype` None leaves what it says.
    """
    if dtype is not None:
        keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
        config = config | dict.fromkeys(keys, str(dtype).removeprefix("torch."))
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_companions(source: Path, folder: Path) -> None:
    for pattern in COPIED_FILES:
        for path in source.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
            else:
                shutil.copyfile(path, folder / path.name)


def give_name(partial: Path, target: Path) -> None:
    """Rename `partial`. What stood there goes aside first and is removed last."""
    old = target.parent / f".{target.name}.replaced"
    if target.exists():
        if old.exists():
            shutil.rmtree(old)
        target.rename(old)
    partial.rename(target)
    if old.exists():
        shutil.rmtree(old)
