"""Random weights for training from nothing: the same values in every layout, since each tensor has its own seed."""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_vespo.architecture.hf_config import Architecture
from megatron_vespo.checkpoint.forms import pad_rows, shard
from megatron_vespo.checkpoint.local_parameters import LocalParameter, local_parameters
from megatron_vespo.checkpoint.mapping import Place, Sharding
from megatron_vespo.checkpoint.tables import table_of

STANDARD_DEVIATION = 0.02


@torch.no_grad()
def initialise(model_chunks: Sequence[Any], architecture: Architecture, seed: int) -> None:
    """Fill every weight: norms with 1, matrices with a normal distribution of standard deviation 0.02.

    Matrices that write into the residual stream get 0.02 / sqrt(2 layers), as in GPT-2 and Megatron. The same
    architecture and seed give the same model in every layout: a rank draws whole tensors and takes its shards. Rows
    that fill up the vocabulary are zero.

    Raises:
        RuntimeError: the model is not this architecture's (as `local_parameters`).
    """
    for local in local_parameters(model_chunks, table_of(architecture), architecture):
        full = _drawn(local.place, architecture, seed)
        local.parameter.copy_(_shard_of(full, local, architecture))


def _drawn(place: Place, architecture: Architecture, seed: int) -> Tensor:
    """The whole Megatron tensor."""
    shape = place.entry.megatron_shape
    if len(shape) == 1:
        return torch.ones(shape)
    name = place.name.replace(".local_experts.", ".")
    writes_residual = ".linear_proj." in name or ".linear_fc2." in name
    deviation = STANDARD_DEVIATION / (math.sqrt(2 * architecture.num_layers) if writes_residual else 1.0)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.empty(shape, dtype=torch.float32).normal_(0.0, deviation, generator=generator)


def _shard_of(full: Tensor, local: LocalParameter, architecture: Architecture) -> Tensor:
    if local.place.entry.sharding is Sharding.VOCABULARY:
        full = pad_rows(full, local.parameter.shape[0] * local.size)
    return shard(local.place.entry, full, local.index, local.size, architecture)
