"""Write the model as a Hugging Face folder that transformers and SGLang load. Complete under its name, or not there."""

import shutil
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from megatron_vespo.architecture.hf_config import CONFIG_FILE, Architecture, read_config_json
from megatron_vespo.checkpoint.gather import gather_hf_tensors
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


class BackgroundExport:
    """A Hugging Face folder, written by a thread of rank 0 while training goes on."""

    def __init__(
        self, model_chunks: Sequence[Any], architecture: Architecture, source: str | Path, target: str | Path
    ) -> None:
        """Every rank calls it. Rank 0 copies the whole model into host memory, and begins to write when it has it.

        A `target` that exists is replaced once the new one is complete.
        """
        tensors = gather_hf_tensors(model_chunks, architecture)
        if dist.get_rank() == 0:
            copies = [(name, tensor.detach().to("cpu", copy=True)) for name, tensor in tensors]
        else:
            copies = []
            for _ in tensors:
                pass
        self._failure: Exception | None = None
        self._write = partial(
            write_hf_folder,
            copies,
            architecture,
            source,
            target,
            dtype=next(iter(model_chunks[0].parameters())).dtype,
            overwrite=True,
        )
        self._thread = Thread(target=self._run, name="export", daemon=True)
        if dist.get_rank() == 0:
            self._thread.start()

    def done(self) -> bool:
        """Whether this rank has nothing left to write."""
        return not self._thread.is_alive()

    def finish(self) -> None:
        """Wait for this rank's writing. Raises ConfigError as `export_hf_folder`."""
        if self._thread.ident is not None:
            self._thread.join()
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            self._write()
        except Exception as error:
            self._failure = error  # raised by `finish`


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
    unfinished = target.parent / f".{target.name}.incomplete"
    try:
        require_replaceable(target, source, CONFIG_FILE, overwrite)
        require_room(target, sum(sizes.values()))
        if unfinished.exists():  # of an export that was killed
            shutil.rmtree(unfinished)
        unfinished.mkdir(parents=True)
        try:
            write_config(config, unfinished, dtype)
            write_shards(tensors, unfinished, sizes, dtype, shard_bytes)
            for file in unfinished.glob("*.safetensors"):  # safetensors makes them readable by their owner only
                shutil.copymode(unfinished / CONFIG_FILE, file)
            copy_companions(source, unfinished)
            give_name(unfinished, target)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{target}: the model can't be written: {error}") from error
