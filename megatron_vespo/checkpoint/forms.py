"""Between the Hugging Face tensors of an entry and its Megatron tensor, and between that and its shards.

Pure functions, all exact: `split` inverts `merge`, `unshard` inverts `shard`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vespo.architecture.hf_config import Architecture
from megatron_vespo.checkpoint.mapping import Entry, Form, Sharding


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
            grouped = [tensor.unflatten(0, (query_groups(entry, architecture), -1)) for tensor in tensors]
            return torch.cat(grouped, dim=1).flatten(0, 1)


def split(entry: Entry, tensor: Tensor, architecture: Architecture) -> list[Tensor]:
    """Megatron tensor -> Hugging Face tensors in the entry's order; views of it where that is possible.

    They are contiguous if `tensor` is. Raises ValueError on a wrong shape.
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
            groups = query_groups(entry, architecture)
            parts = tensor.unflatten(0, (groups, -1)).split([count // groups for count in rows], dim=1)
            return [part.flatten(0, 1).contiguous() for part in parts]


def query_groups(entry: Entry, architecture: Architecture) -> int:
    """Query groups in a QKV entry, which may be one rank's. Raises ValueError if they are cut."""
    _, key_rows, _ = (shape[0] for shape in entry.hf.values())
    groups, rest = divmod(key_rows, architecture.head_dim)
    if rest:
        raise ValueError(f"{entry.megatron[0]}: {key_rows} rows of keys are not whole query groups")
    return groups


def shard(entry: Entry, full: Tensor, index: int, size: int, architecture: Architecture) -> Tensor:
    """What rank `index` of `size` tensor-parallel ranks holds of the Megatron tensor `full`.

    A vocabulary that does not divide is filled up with zero rows; one that was filled up further already (`pad_rows`)
    is shared as it is. Raises ValueError if the entry can't be shared by so many.
    """
    if entry.sharding is Sharding.VOCABULARY:
        return pad_rows(full, -(-full.shape[0] // size) * size).chunk(size)[index]
    if entry.sharding is Sharding.REPLICATED or size == 1:
        return full
    cut = [tensor[cut] for tensor, cut in zip(split(entry, full, architecture), entry.cuts(index, size), strict=True)]
    return merge(entry.of_one_rank(size), cut, architecture)


def unshard(entry: Entry, shards: Sequence[Tensor], architecture: Architecture) -> Tensor:
    """The Megatron tensor of which the tensor-parallel ranks hold `shards`, in their order (any one if REPLICATED).

    The vocabulary's zero rows are cut off. A view where there is only one shard. Raises ValueError on a wrong shape.
    """
    if entry.sharding is Sharding.VOCABULARY:
        whole = shards[0] if len(shards) == 1 else torch.cat(list(shards))
        return whole[: entry.megatron_shape[0]]
    if entry.sharding is Sharding.REPLICATED or len(shards) == 1:
        return shards[0]
    one = entry.of_one_rank(len(shards))
    parts = zip(*(split(one, shard, architecture) for shard in shards), strict=True)
    return merge(entry, [torch.cat(part, dim=entry.cut_axis) for part in parts], architecture)


def pad_rows(tensor: Tensor, rows: int) -> Tensor:
    """`tensor` with zero rows at its end, `rows` in all."""
    return F.pad(tensor, (0, 0, 0, rows - tensor.shape[0])) if rows != tensor.shape[0] else tensor
