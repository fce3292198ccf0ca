"""Fill a Megatron model from a Hugging Face folder, in memory."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_vespo.checkpoint.check import checked_tensors
from megatron_vespo.checkpoint.forms import merge
from megatron_vespo.checkpoint.hf_config import Architecture
from megatron_vespo.checkpoint.local_parameters import local_parameters
from megatron_vespo.checkpoint.safetensors_folder import TensorReader
from megatron_vespo.checkpoint.tables import table_of
from megatron_vespo.config import ConfigError


@torch.no_grad()
def load_hf_weights(model_chunks: Sequence[Any], architecture: Architecture, folder: str | Path) -> None:
    """Copy the folder's tensors into this rank's parameters, in place, cast to the parameters' dtype.

    Every rank calls it; nothing is communicated. An optimizer that keeps fp32 masters must be made after this, or
    told to (`reload_model_params`).

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
            tensors = [reader.read(name) for name in local.hf_names]
            local.parameter.copy_(merge(local.entry, tensors, architecture))
