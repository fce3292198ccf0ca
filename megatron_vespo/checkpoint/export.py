"""Write the model as a Hugging Face folder that transformers and SGLang load. Complete under its name, or not there."""

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from megatron_vespo.checkpoint.gather import gather_hf_tensors
from megatron_vespo.checkpoint.hf_config import CONFIG_FILE, Architecture, read_config_json
from megatron_vespo.checkpoint.output_folder import (
    copy_companions,
    give_name,
    require_replaceable,
    require_room,
    write_config,
)
from megatron_vespo.checkpoint.shards import DEFAULT_SHARD_BYTES, tensor_bytes, write_shards
from megatron_vespo.checkpoint.tables import table_of
from megatron_vespo.config import ConfigError


def export_hf_folder(
    model_chunks: Sequence[Any],
    architecture: Architecture,
    source: str | Path,
    target: str | Path,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Write the model to `target`; config, tokenizer and chat template are those of `source`. Every rank calls it.

    Rank 0 writes, to a folder beside `target` that gets its name once it is complete. If rank 0 fails, every rank
    raises; nothing is left behind.

    Args:
        dtype: of the written tensors; None keeps the parameters'.
        overwrite: replace a `target` that exists (only once the new one is complete).

    Raises:
        ConfigError: `target` exists, there is no room, no permission, or `source` can't be read.
    """
    tensors = gather_hf_tensors(model_chunks, architecture)
    failure: Exception | None = None
    try:
        if dist.get_rank() == 0:
            kept = dtype or next(iter(model_chunks[0].parameters())).dtype
            write_hf_folder(
                tensors, architecture, source, target, dtype=kept, overwrite=overwrite, shard_bytes=shard_bytes
            )
    except Exception as error:
        failure = error
    for _ in tensors:  # the other ranks' part; on rank 0, after a failure, what they still send
        pass
    _raise_on_every_rank(failure)


def _raise_on_every_rank(failure: Exception | None) -> None:
    """Raise rank 0's failure: there as it is, elsewhere as a ConfigError or RuntimeError with its message."""
    told: list[Any] = [None if failure is None else (isinstance(failure, ConfigError), str(failure))]
    dist.broadcast_object_list(told, src=0)
    if failure is not None:
        raise failure
    if told[0] is not None:
        users, message = told[0]
        raise ConfigError(message) if users else RuntimeError(f"rank 0 could not export the model: {message}")


def write_hf_folder(
    tensors: Iterable[tuple[str, Tensor]],
    architecture: Architecture,
    source: str | Path,
    target: str | Path,
    *,
    dtype: torch.dtype,
    overwrite: bool = False,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """As `export_hf_folder`, of tensors (name, full tensor) in the table's fixed order, in one process."""
    source, target = Path(source), Path(target)
    config = read_config_json(source)
    sizes = tensor_bytes(table_of(architecture).hf_shapes(architecture), dtype)
    partial = target.parent / f".{target.name}.incomplete"
    try:
        require_replaceable(target, source, CONFIG_FILE, overwrite)
        require_room(target, sum(sizes.values()))
        if partial.exists():  # of an export that was killed
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        try:
            write_config(config, partial, dtype)
            write_shards(tensors, partial, sizes, dtype, shard_bytes)
            for file in partial.glob("*.safetensors"):  # safetensors makes them readable by their owner only
                shutil.copymode(partial / CONFIG_FILE, file)
            copy_companions(source, partial)
            give_name(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{target}: the model can't be written: {error}") from error
