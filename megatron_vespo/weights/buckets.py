"""How the model's tensors are put into buckets for the way to the engines."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

import torch


@dataclass(frozen=True)
class TensorSpec:
    """Name (Hugging Face), shape and dtype (torch's name, e.g. "float32") of one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * getattr(torch, self.dtype).itemsize


@dataclass(frozen=True)
class Bucket:
    """Tensors that travel as one flat run of bytes, in this order."""

    specs: tuple[TensorSpec, ...]

    @property
    def num_bytes(self) -> int:
        return sum(spec.num_bytes for spec in self.specs)


def plan_buckets(specs: Iterable[TensorSpec], bucket_bytes: int) -> list[Bucket]:
    """Consecutive tensors of one dtype (so that none is unaligned), cut where `bucket_bytes` would be passed.

    A tensor larger than `bucket_bytes` gets a bucket of its own. The order of the tensors is kept.
    """
    buckets: list[Bucket] = []
    for _, run in groupby(specs, key=lambda spec: spec.dtype):
        filling: list[TensorSpec] = []
        filled = 0
        for spec in run:
            if filling and filled + spec.num_bytes > bucket_bytes:
                buckets.append(Bucket(tuple(filling)))
                filling, filled = [], 0
            filling.append(spec)
            filled += spec.num_bytes
        buckets.append(Bucket(tuple(filling)))
    return buckets


def fill_bucket(bucket: Bucket, stream: Iterator[tuple[str, torch.Tensor]], slot: torch.Tensor) -> None:
    """Copy the next tensors of `stream` behind each other into `slot`, [at least bucket.num_bytes] uint8.

    Raises:
        ValueError: the tensors are not those of the plan, in its order.
    """
    offset = 0
    for spec in bucket.specs:
        named = next(stream, None)
        found = None if named is None else specs_of([named])[0]
        if named is None or found != spec:
            raise ValueError(f"weight sync planned {spec}, the trainer holds {found or 'no further tensor'}")
        place = slot[offset : offset + spec.num_bytes].view(named[1].dtype).view(spec.shape)
        place.copy_(named[1].detach())
        offset += spec.num_bytes


def require_end(stream: Iterator[tuple[str, torch.Tensor]]) -> None:
    """Raises ValueError if tensors come that no bucket was planned for."""
    if (extra := next(stream, None)) is not None:
        raise ValueError(f"weight sync has no bucket for {extra[0]}")


def tensors_in(bucket: Bucket, flat: torch.Tensor) -> list[tuple[TensorSpec, torch.Tensor]]:
    """Views of a bucket's bytes, [num_bytes] uint8."""
    sizes = [spec.num_bytes for spec in bucket.specs]
    parts = zip(bucket.specs, flat.split(sizes), strict=True)
    return [(spec, part.view(getattr(torch, spec.dtype)).view(spec.shape)) for spec, part in parts]


def specs_of(tensors: Iterable[tuple[str, torch.Tensor]]) -> list[TensorSpec]:
    return [TensorSpec(name, tuple(tensor.shape), dtype_name(tensor.dtype)) for name, tensor in tensors]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
