"""Weights through memory that engines on the same host open themselves: POSIX shared memory, or CUDA IPC handles.

An engine copies from it into its parameters, so nothing is copied on the way. What it is told is what SGLang's
`/update_weights_from_tensor` takes as a flattened bucket: a pickle of names, shapes and a handle of the memory. SGLang
reads it with an unpickler that admits a fixed list of harmless types.
"""

import base64
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from megatron_vespo.weights.buckets import Bucket
from megatron_vespo.weights.sender import Sender
from megatron_vespo.weights.slots import Shared, pickled


class SharedMemorySender(Sender):
    def __init__(self, buckets: Sequence[Bucket], device: torch.device) -> None:
        super().__init__(buckets, device)
        self._slot_of: dict[int, torch.Tensor] = {}

    def publish(self, index: int, slot: torch.Tensor, weight_version: int, since: int | None) -> None:
        self._slot_of = {number: held for number, held in self._slot_of.items() if number > index - 2} | {index: slot}

    def describe(self, index: int, copies: int) -> list[str]:
        """One for each process, in base64 as SGLang's HTTP interface takes it."""
        payload = {"flattened_tensor": Shared(self._slot_of[index]), "metadata": metadata_of(self.buckets[index])}
        return [base64.b64encode(pickled(payload)).decode() for _ in range(copies)]

    def close(self) -> None:
        self._slot_of = {}

    def take(self, index: int, copies: int, released: int) -> Any:
        if released == len(self.buckets):
            self._slot_of = {}
        return super().take(index, copies, released)


def metadata_of(bucket: Bucket) -> list[SimpleNamespace]:
    """As SGLang's FlattenedTensorMetadata, by attributes, so that its module need not be imported."""
    metadata, offset = [], 0
    for spec in bucket.specs:
        end = offset + spec.num_bytes
        dtype = getattr(torch, spec.dtype)
        metadata.append(
            SimpleNamespace(
                name=spec.name, shape=spec.shape, dtype=dtype, start_idx=offset, end_idx=end, numel=spec.num_bytes
            )
        )
        offset = end
    return metadata
