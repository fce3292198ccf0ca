"""Putting the Hugging Face tensors of an entry together into its Megatron tensor, and taking it apart.

Pure functions on full, unsharded tensors; both are exact, each is the other's inverse.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_vespo.checkpoint.hf_config import Architecture
from megatron_vespo.checkpoint.mapping import Entry, Form


def merge(entry: Entry, tensors: Sequence[Tensor], architecture: Architecture) -> Tensor:
    """Hugging Face tensors, in the entry's order and shapes -> Megatron tensor `[sum of rows, ...]`.

    Form WHOLE returns the tensor itself. Raises ValueError on a wrong number or shape.
    """
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if shapes != list(entry.hf.values()):
        raise ValueError(f"{entry.megatron[0]}: expected tensors of shapes {list(entry.hf.values())}, found {shapes}")
    match entry.form:
        case Form.WHOLE:
            return tensors[0]
        case Form.STACKED:
            return torch.cat(list(tensors))
        case Form.QKV:
            groups = architecture.num_query_groups
            grouped = [tensor.unflatten(0, (groups, -1)) for tensor in tensors]
            return torch.cat(grouped, dim=1).flatten(0, 1)


def split(entry: Entry, tensor: Tensor, architecture: Architecture) -> list[Tensor]:
    """Megatron tensor -> Hugging Face tensors in the entry's order, contiguous; views of it where that is possible.

    Raises ValueError on a wrong shape.
    """
    if tuple(tensor.shape) != entry.megatron_shape:
        raise ValueError(f"{entry.megatron[0]}: expected shape {entry.megatron_shape}, found {tuple(tensor.shape)}")
    rows = [shape[0] for shape in entry.hf.values()]
    match entry.form:
        case Form.WHOLE:
            return [tensor]
        case Form.STACKED:
            return list(tensor.split(rows))
        case Form.QKV:
            groups = architecture.num_query_groups
            parts = tensor.unflatten(0, (groups, -1)).split([count // groups for count in rows], dim=1)
            return [part.flatten(0, 1).contiguous() for part in parts]
