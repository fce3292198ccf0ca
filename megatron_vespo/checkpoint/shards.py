"""Write named tensors, as they come, into safetensors files of bounded size with an index."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_vespo.checkpoint.mapping import Shape
from megatron_vespo.checkpoint.safetensors_folder import INDEX_FILE, SINGLE_FILE

DEFAULT_SHARD_BYTES = 5 * 1000**3


def plan_shards(sizes: dict[str, int], shard_bytes: int) -> list[list[str]]:
    """Cut `sizes` (name -> bytes), in their order, into shards of at most `shard_bytes`, unless one tensor is larger."""
    shards: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    return shards


def tensor_bytes(shapes: dict[str, Shape], dtype: torch.dtype) -> dict[str, int]:
    return {name: torch.Size(shape).numel() * dtype.itemsize for name, shape in shapes.items()}


def write_shards(
    tensors: Iterable[tuple[str, Tensor]], folder: Path, sizes: dict[str, int], dtype: torch.dtype, shard_bytes: int
) -> None:
    """Write `tensors` into `folder`, cast to `dtype`; one shard at a time is held in memory.

    Args:
        sizes: name -> bytes of each tensor once cast, in the order in which `tensors` yields them.

    Raises:
        RuntimeError: the tensors are not those of `sizes`, in that order.
        OSError, safetensors.SafetensorError: the file system refused.
    """
    shards = plan_shards(sizes, shard_bytes)
    files = shard_names(len(shards))
    coming = iter(tensors)
    for file, names in zip(files, shards, strict=True):
        shard: dict[str, Tensor] = {}
        for name in names:
            given, tensor = next(coming, (None, None))
            if given != name or tensor is None:
                raise RuntimeError(f"expected tensor {name} next, got {given}")
            if tensor.numel() * dtype.itemsize != sizes[name]:
                raise RuntimeError(f"{name}: shape {list(tensor.shape)} in {dtype} is not {sizes[name]} bytes")
            shard[name] = tensor.detach().to("cpu", dtype, copy=True).contiguous()
        save_file(shard, folder / file, metadata={"format": "pt"})
    if (extra := next(coming, None)) is not None:
        raise RuntimeError(f"unexpected tensor {extra[0]}")
    if len(shards) > 1:
        placed = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(placed.items()))}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def shard_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE_FILE]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
