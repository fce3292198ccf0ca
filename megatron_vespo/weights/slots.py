"""Memory of buckets. On a CPU other processes of this host can open it."""

import io
import shutil
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing import reductions

from megatron_vespo.errors import RunError

SHARED_MEMORY = "/dev/shm"
CUDA_DEVICE_INDEX = 6
"""Of the device among the arguments of torch's rebuild_cuda_tensor."""


def new_slot(num_bytes: int, device: torch.device) -> torch.Tensor:
    """[num_bytes] uint8. Raises RunError if the host has no room for it."""
    if device.type == "cuda":
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)
    if (free := shutil.disk_usage(SHARED_MEMORY).free) < num_bytes:
        raise RunError(
            f"{SHARED_MEMORY} has {free / 2**20:.0f} MiB left, a bucket of weights takes {num_bytes / 2**20:.0f}: give it "
            "more room, or lower weight_sync.bucket_mb"
        )
    # Memory by name: the default hands over open files, which only processes of one family can receive.
    torch.multiprocessing.set_sharing_strategy("file_system")
    storage = torch.UntypedStorage._new_using_filename_cpu(num_bytes)
    return torch.empty(0, dtype=torch.uint8).set_(storage)  # pyright: ignore[reportCallIssue, reportArgumentType]


def remove_slots(pid: int) -> None:
    """Of a process that was ended by force. Torch names memory after the process; what it runs to remove it may be ended with
    it."""
    for file in Path(SHARED_MEMORY).glob(f"torch_{pid}_*"):
        file.unlink(missing_ok=True)


class Shared:
    """Pickled as a handle of the tensor's memory. Each unpickling counts as the use that a pickling announced."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def __reduce__(self):
        rebuild, arguments = reductions.reduce_tensor(self._tensor)
        if self._tensor.is_cuda:
            # Another process may count its GPUs in another way: SGLang finds them by what is printed on them.
            uuid = str(torch.cuda.get_device_properties(self._tensor.device).uuid)
            arguments = (*arguments[:CUDA_DEVICE_INDEX], uuid, *arguments[CUDA_DEVICE_INDEX + 1 :])
        return rebuild, arguments


def pickled(value: Any) -> bytes:
    content = io.BytesIO()
    ForkingPickler(content).dump(value)
    return content.getvalue()
