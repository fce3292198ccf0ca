"""Weights through memory that engines on the same host open themselves: POSIX shared memory, or CUDA IPC handles.

An engine copies from it into its parameters, so nothing is copied on the way. What it is told is what SGLang's
`/update_weights_from_tensor` takes as a flattened bucket: a pickle of names, shapes and a handle of the memory. SGLang
reads it with an unpickler that admits a fixed list of harmless types.
"""

import base64
import io
import shutil
from collections.abc import Sequence
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from typing import Any

import torch
from torch.multiprocessing import reductions

from megatron_vespo.errors import RunError
from megatron_vespo.weights.buckets import Bucket
from megatron_vespo.weights.sender import Sender

SHARED_MEMORY = "/dev/shm"
CUDA_DEVICE_INDEX = 6
"""Of the device among the arguments of torch's rebuild_cuda_tensor."""


class SharedMemorySender(Sender):
    def __init__(self, buckets: Sequence[Bucket], device: torch.device) -> None:
        super().__init__(buckets, device)
        # Memory by name: the default hands over open files, which only processes of one family can receive.
        torch.multiprocessing.set_sharing_strategy("file_system")
        self._slot_of: dict[int, torch.Tensor] = {}

    def new_slot(self, num_bytes: int) -> torch.Tensor:
        """Raises RunError if the host has no room for it."""
        if self.device.type == "cuda":
            return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        if (free := shutil.disk_usage(SHARED_MEMORY).free) < num_bytes:
            raise RunError(
                f"{SHARED_MEMORY} has {free / 2**20:.0f} MiB left, a bucket takes {num_bytes / 2**20:.0f}: lower "
                "weight_sync.bucket_mb, or set weight_sync.transport: collective"
            )
        storage = torch.UntypedStorage._new_using_filename_cpu(num_bytes)
        return torch.empty(0, dtype=torch.uint8).set_(storage)  # pyright: ignore[reportCallIssue, reportArgumentType]

    def publish(self, index: int, slot: torch.Tensor, weight_version: int, since: int | None) -> None:
        self._slot_of = {number: held for number, held in self._slot_of.items() if number > index - 2} | {index: slot}

    def describe(self, index: int, copies: int) -> list[str]:
        """One for each process: each counts as one use of the memory."""
        payload = {"flattened_tensor": _Shared(self._slot_of[index]), "metadata": metadata_of(self.buckets[index])}
        return [pickled(payload) for _ in range(copies)]

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


class _Shared:
    """Pickled as a handle of the tensor's memory."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def __reduce__(self):
        rebuild, arguments = reductions.reduce_tensor(self._tensor)
        if self._tensor.is_cuda:
            # Another process may count its GPUs in another way: SGLang finds them by what is printed on them.
            uuid = str(torch.cuda.get_device_properties(self._tensor.device).uuid)
            arguments = (*arguments[:CUDA_DEVICE_INDEX], uuid, *arguments[CUDA_DEVICE_INDEX + 1 :])
        return rebuild, arguments


def pickled(value: Any) -> str:
    """Base64, as SGLang's HTTP interface takes it."""
    content = io.BytesIO()
    ForkingPickler(content).dump(value)
    return base64.b64encode(content.getvalue()).decode()
