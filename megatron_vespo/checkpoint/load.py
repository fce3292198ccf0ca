"""Fill a Megatron model from a Hugging Face folder, in memory."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vespo.architecture.hf_config import Architecture
from megatron_vespo.checkpoint.check import checked_tensors
from megatron_vespo.checkpoint.forms import merge, pad_rows
from megatron_vespo.checkpoint.local_parameters import LocalParameter, local_parameters
from megatron_vespo.checkpoint.mapping import Sharding
from megatron_vespo.checkpoint.safetensors_folder import TensorReader
from megatron_vespo.checkpoint.tables import table_of
from megatron_vespo.config import ConfigError


@torch.no_grad()
def load_hf_weights(model_chunks: Sequence[Any], architecture: Architecture, folder: str | Path) -> None:
    """Copy this rank's shards of the folder's tensors into its parameters, in place, cast to their dtype.

    Every rank calls it and reads no more than its shards; nothing is communicated. Rows that fill up the vocabulary
    become zero. An optimizer that keeps fp32 masters must be made after this, or told to (`reload_model_params`).

    Args:
        model_chunks: GPTModels, bare or wrapped in Megatron's DDP and Float16Module.

    Raises:
        ConfigError: the folder does not hold exactly this architecture's tensors (as `check.check_folder`).
        RuntimeError: the model is not this architecture's (as `local_parameters`).
    """
    table = table_of(architecture)
    headers = checked_tensors(folder, architecture)
    with TensorReader(headers) as reader:
        for copy, original in table.duplicates.items():
            if copy in headers and not torch.equal(reader.read(copy), reader.read(original)):
                raise ConfigError(f"{folder}: {copy} differs from {original}, but tie_word_embeddings is true")
        for local in local_parameters(model_chunks, table, architecture):
            local.parameter.copy_(_read_shard(reader, local, architecture))


def _read_shard(reader: TensorReader, local: LocalParameter, architecture: Architecture) -> Tensor:
    entry, names = local.place.entry, local.place.hf_names
    if entry.sharding is Sharding.VOCABULARY:
        rows = local.parameter.shape[0]
        first = local.index * rows  # slices end with the tensor, before the rows that only fill up
        return pad_rows(reader.read(names[0], (slice(first, first + rows),)), rows)
    cuts = entry.cuts(local.index, local.size)
    shards = [reader.read(name, cut) for name, cut in zip(names, cuts, strict=True)]
    return merge(entry.of_one_rank(local.size), shards, architecture)
