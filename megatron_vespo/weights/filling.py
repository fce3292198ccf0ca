"""How the trainer's ranks together fill a bucket."""

import operator
import pickle
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist

from megatron_vespo.weights.buckets import Bucket, fill_bucket, require_end, tensors_in
from megatron_vespo.weights.slots import Shared, pickled

Part = tuple[str, tuple[slice, ...], torch.Tensor]
"""Of a Hugging Face tensor: its name, where in it, and the numbers."""


class Filling(ABC):
    """Of one sync, on every rank: rank 0 calls `begin`, `fill` for each bucket in turn, and `finish`; all others `follow`."""

    @abstractmethod
    def begin(self, slots: Sequence[torch.Tensor]) -> None:
        """`slots`: the memory that will be filled, whole."""

    @abstractmethod
    def fill(self, index: int, bucket: Bucket, slots: Sequence[torch.Tensor]) -> None:
        """Bucket `index` goes into the beginning of slot `index` modulo their number. Raises ValueError if the tensors are
        not those of the plan."""

    @abstractmethod
    def finish(self, complete: bool) -> None:
        """Let the others go: after the last bucket, or before (not `complete`). Raises ValueError if tensors are left that
        no bucket was planned for."""

    @abstractmethod
    def follow(self) -> None:
        """What a rank other than 0 does."""


class Gathered(Filling):
    """Ranks send to rank 0."""

    def __init__(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        """`tensors`: collective, and yields on rank 0 alone; it has to be exhausted on every rank."""
        self._tensors = tensors

    def begin(self, slots: Sequence[torch.Tensor]) -> None: ...

    def fill(self, index: int, bucket: Bucket, slots: Sequence[torch.Tensor]) -> None:
        fill_bucket(bucket, self._tensors, slots[index % len(slots)])

    def finish(self, complete: bool) -> None:
        try:
            if complete:
                require_end(self._tensors)
        finally:
            self.follow()

    def follow(self) -> None:
        for _ in self._tensors:
            pass


class Placed(Filling):
    """All ranks are on one host and on CPU: each puts what it holds into the shared bucket, and nothing is sent."""

    def __init__(self, buckets: Sequence[Bucket], parts: Iterator[Part], opened: list[torch.Tensor]) -> None:
        """
        Args:
            parts: what this rank holds, in the order of the buckets' tensors.
            opened: the slots that this rank knows; kept by the caller from sync to sync, empty at first. Opening memory anew
                takes as long as writing to it.
        """
        self._buckets = buckets
        self._parts = parts
        self._opened = opened
        self._order = torch.zeros(1, dtype=torch.int64)

    def begin(self, slots: Sequence[torch.Tensor]) -> None:
        known = len(slots) == len(self._opened) and all(map(operator.is_, slots, self._opened))
        others = range(1, dist.get_world_size())
        told = [None if known else {rank: [pickled(Shared(slot)) for slot in slots] for rank in others}]
        dist.broadcast_object_list(told, src=0)
        self._opened[:] = slots

    def fill(self, index: int, bucket: Bucket, slots: Sequence[torch.Tensor]) -> None:
        self._tell(index)
        self._place(bucket, slots[index % len(slots)])

    def finish(self, complete: bool) -> None:
        self._tell(len(self._buckets))
        if complete:
            require_end((name, tensor) for name, _, tensor in self._parts)

    def follow(self) -> None:
        told: list[Any] = [None]
        dist.broadcast_object_list(told, src=0)
        if told[0] is not None:
            self._opened[:] = [pickle.loads(handle) for handle in told[0][dist.get_rank()]]
        while (index := self._told()) < len(self._buckets):
            self._place(self._buckets[index], self._opened[index % len(self._opened)])

    def _place(self, bucket: Bucket, slot: torch.Tensor) -> None:
        places = {spec.name: tensor for spec, tensor in tensors_in(bucket, slot[: bucket.num_bytes])}
        for name, cut, tensor in self._parts:
            if name not in places:
                self._parts = chain([(name, cut, tensor)], self._parts)
                break
            place = places[name][cut]
            if (place.shape, place.dtype) != (tensor.shape, tensor.dtype):
                raise ValueError(
                    f"weight sync planned {name} {place.shape} {place.dtype}, not {tensor.shape} {tensor.dtype}"
                )
            place.copy_(tensor)
        dist.barrier()

    def _tell(self, index: int) -> None:
        self._order.fill_(index)
        dist.broadcast(self._order, src=0)

    def _told(self) -> int:
        dist.broadcast(self._order, src=0)
        return int(self._order)
