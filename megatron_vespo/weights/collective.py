"""Weights to engines by collective broadcast: the trainer's rank 0 and every engine rank are in one process group."""

from collections.abc import Iterable
from datetime import timedelta

import torch
from torch.distributed import PrefixStore, ProcessGroup  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.distributed_c10d import Backend, GroupName, _new_process_group_helper, _world

from megatron_vespo.rendezvous import host_store, listen, port_of
from megatron_vespo.weights.buckets import Bucket, fill_buckets


class CollectiveSender:
    """The trainer's end of the group.

    The engines build their end with `sglang.srt.utils.init_custom_process_group`: a group outside torch's default one,
    met through a TCP store under the group's name. `connect` makes the same group from this side.
    """

    def __init__(self, address: str, name: str) -> None:
        """Listen on `address` (an interface of this host); engines are then told `address` and `port`."""
        self._listener = listen(address)
        self._name = name
        self._group: ProcessGroup | None = None

    @property
    def port(self) -> int:
        return port_of(self._listener)

    def connect(self, *, world_size: int, backend: str, timeout_seconds: float) -> None:
        """Block until all engine ranks (`world_size` - 1 of them) have joined."""
        timeout = timedelta(seconds=timeout_seconds)
        store = host_store(self._listener, world_size, timeout)
        self._group, _ = _new_process_group_helper(
            world_size,
            0,
            [],
            Backend(backend),
            PrefixStore(self._name, store),
            group_name=GroupName(self._name),
            backend_options=None,
            timeout=timeout,
        )
        _world.pg_group_ranks[self._group] = {rank: rank for rank in range(world_size)}

    def send(self, buckets: list[Bucket], tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Broadcast each bucket; a broadcast blocks until the engines have asked for that bucket."""
        if self._group is None:
            raise RuntimeError("weights can be sent only after connect()")
        for _, flat in fill_buckets(buckets, tensors):
            torch.distributed.broadcast(flat, src=0, group=self._group)

    def close(self) -> None:
        if self._group is not None:
            torch.distributed.destroy_process_group(self._group)
            self._group = None
