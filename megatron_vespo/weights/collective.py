"""Weights by broadcast: the trainer's rank 0 and ranks of engines are in process groups of their own."""

import contextlib
import logging
import queue
import threading
from collections.abc import Sequence
from datetime import timedelta

import torch
from torch.distributed import PrefixStore, ProcessGroup  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.distributed_c10d import Backend, GroupName, _new_process_group_helper, _world

from megatron_vespo.rendezvous import host_store, listen, port_of
from megatron_vespo.weights.buckets import Bucket
from megatron_vespo.weights.sender import Sender, stream_of_its_own

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 1.0


class CollectiveSender(Sender):
    """Broadcasts each bucket to every group at once. Engines must ask for the same buckets in the same order."""

    released_by_take = False

    def __init__(self, buckets: Sequence[Bucket], device: torch.device, address: str, names: Sequence[str]) -> None:
        """Listen on `address` (an interface of this host) for each of the groups."""
        super().__init__(buckets, device)
        self._groups = [BroadcastGroup(address, name, device, self._sent) for name in names]

    @property
    def ports(self) -> list[int]:
        """Where each group meets."""
        return [group.port for group in self._groups]

    def connect(self, world_sizes: Sequence[int], backend: str, timeout_seconds: float) -> dict[str, str]:
        """Wait until all ranks of all groups have come, or will not; `abandon` ends that.

        Returns:
            Why, by the name of each group that did not come together.
        """
        for group, size in zip(self._groups, world_sizes, strict=True):
            group.start(size, backend, timeout_seconds)
        if not self._wait(lambda: all(group.connected or group.failure for group in self._groups)):
            return {}
        return {group.name: str(group.failure) for group in self._groups if group.failure is not None}

    def publish(self, index: int, slot: torch.Tensor, weight_version: int, since: int | None) -> None:
        for group in self._groups:
            group.jobs.put(slot)

    def describe(self, index: int, copies: int) -> bool:
        return True

    def close(self) -> None:
        for group in self._groups:
            group.jobs.put(None)
        for group in self._groups:
            group.join(CLOSE_SECONDS)

    def _sent(self) -> None:
        """A group connected, or sent a bucket, or failed."""
        with self._changed:  # together: a count of a sending that has ended must not reach the next one
            self._set(released=min((group.sent for group in self._groups), default=0))

    def forget_sent(self) -> None:
        for group in self._groups:
            group.sent = 0


class BroadcastGroup:
    """One process group, and the thread that uses it, which alone may hang when an engine does.

    The engines build their end with `sglang.srt.utils.init_custom_process_group`: a group outside torch's default one, met
    through a TCP store under the group's name. The thread makes the same group from this side. A broadcast to a process
    that does not receive ends with the group's timeout, or when that process dies: nothing else ends it in gloo.
    """

    def __init__(self, address: str, name: str, device: torch.device, changed) -> None:
        self.name = name
        self.jobs: queue.SimpleQueue[torch.Tensor | None] = queue.SimpleQueue()
        self.sent = 0
        self.connected = False
        self.failure: Exception | None = None
        self._listener = listen(address)
        self.port = port_of(self._listener)
        self._device = device
        self._changed = changed
        self._thread: threading.Thread | None = None

    def start(self, world_size: int, backend: str, timeout_seconds: float) -> None:
        arguments = (world_size, backend, timedelta(seconds=timeout_seconds))
        self._thread = threading.Thread(target=self._run, args=arguments, daemon=True, name=self.name)
        self._thread.start()

    def join(self, seconds: float) -> None:
        if self._thread is None:
            self._listener.close()
        else:
            self._thread.join(seconds)

    def _run(self, world_size: int, backend: str, timeout: timedelta) -> None:
        try:
            with self._joined(world_size, backend, timeout) as group, stream_of_its_own(self._device):
                self.connected = True
                self._changed()
                while (slot := self.jobs.get()) is not None:
                    torch.distributed.broadcast(slot, src=0, group=group)
                    if self._device.type == "cuda":
                        torch.cuda.current_stream(self._device).synchronize()
                    del slot  # while this waits for the next one, it must keep no memory
                    self.sent += 1
                    self._changed()
        except Exception as error:  # its engines fail with it, and are told apart by the driver
            logger.warning("weight group %s ended: %s", self.name, error)
            self.failure = error
            self._changed()

    @contextlib.contextmanager
    def _joined(self, world_size: int, backend: str, timeout: timedelta):
        store = host_store(self._listener, world_size, timeout)
        group: ProcessGroup
        group, _ = _new_process_group_helper(
            world_size,
            0,
            [],
            Backend(backend),
            PrefixStore(self.name, store),
            group_name=GroupName(self.name),
            backend_options=None,
            timeout=timeout,
        )
        _world.pg_group_ranks[group] = {rank: rank for rank in range(world_size)}
        try:
            yield group
        finally:
            torch.distributed.destroy_process_group(group)
