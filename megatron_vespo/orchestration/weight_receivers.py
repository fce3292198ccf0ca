"""How engines are told to load a bucket, for each transport: the other end of `weights.sender.Sender`."""

import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal
from urllib.parse import urlsplit

from megatron_vespo.rollout.client import EngineClient
from megatron_vespo.rollout.engine_http import EngineError
from megatron_vespo.weights.buckets import Bucket

Transport = Literal["collective", "shared_memory", "disk"]


class Receivers(ABC):
    """Of the engines that are connected at once."""

    names: Sequence[str] = ()
    """Of process groups with the trainer, where engines are in such."""

    async def begin(self, client: EngineClient) -> None:
        try:
            await client.begin_weight_update()
        except EngineError as error:
            if error.status is None:
                raise
            # An update was given up while the engine did not answer, and is still open there.
            await client.end_weight_update()
            await client.begin_weight_update()

    @abstractmethod
    async def load(
        self, client: EngineClient, bucket: Bucket, described: Any, uses: slice, weight_version: int | None
    ) -> None:
        """Let an engine load a bucket.

        Args:
            described: what the sender told of it.
            uses: which of the descriptions are this engine's, where each process has its own.
            weight_version: given with the last bucket alone: before, the engine has neither the old nor the new weights.
        """

    async def end(self, client: EngineClient) -> None:
        await client.end_weight_update()

    @abstractmethod
    async def leave(self, client: EngineClient) -> None:
        """Take an engine out of its group, where there is one."""


class CollectiveReceivers(Receivers):
    """Over gloo each engine has a group of its own, so that one that hangs holds up no other; over NCCL all are in one,
    since the trainer would else send the weights once for each engine."""

    def __init__(self, engines: Sequence[EngineClient], backend: str, address: str) -> None:
        self._backend = backend
        self._address = address
        self._groups: list[list[EngineClient]] = (
            [list(engines)] if backend == "nccl" else [[client] for client in engines]
        )
        # An engine's process may still be in a group that was given up, of this run or of one before it in a grid.
        self.names = [f"megatron_vespo_weights_{uuid.uuid4().hex}" for _ in self._groups]

    @property
    def world_sizes(self) -> list[int]:
        return [1 + sum(client.ranks for client in group) for group in self._groups]

    def of_group(self, name: str) -> list[EngineClient]:
        return self._groups[list(self.names).index(name)]

    async def join(self, client: EngineClient, ports: Sequence[int]) -> None:
        """Let an engine come to its group. `ports`: of the groups, in the order of `names`."""
        number = self._group_of(client)
        group = self._groups[number]
        await client.init_weights_update_group(
            master_address=self._address,
            master_port=ports[number],
            rank_offset=1 + sum(other.ranks for other in group[: group.index(client)]),
            world_size=self.world_sizes[number],
            group_name=self.names[number],
            backend=self._backend,
        )

    async def load(
        self, client: EngineClient, bucket: Bucket, described: Any, uses: slice, weight_version: int | None
    ) -> None:
        await client.update_weights_from_distributed(
            names=[spec.name for spec in bucket.specs],
            dtypes=[spec.dtype for spec in bucket.specs],
            shapes=[list(spec.shape) for spec in bucket.specs],
            group_name=self.names[self._group_of(client)],
            weight_version=weight_version,
        )

    async def leave(self, client: EngineClient) -> None:
        await client.destroy_weights_update_group(self.names[self._group_of(client)])

    def _group_of(self, client: EngineClient) -> int:
        return next(number for number, group in enumerate(self._groups) if client in group)


class SharedMemoryReceivers(Receivers):
    async def load(
        self, client: EngineClient, bucket: Bucket, described: Any, uses: slice, weight_version: int | None
    ) -> None:
        await client.update_weights_from_tensor(described[uses], weight_version)

    async def leave(self, client: EngineClient) -> None: ...


class DiskReceivers(Receivers):
    async def begin(self, client: EngineClient) -> None:
        """SGLang takes each folder as an update of its own."""

    async def load(
        self, client: EngineClient, bucket: Bucket, described: Any, uses: slice, weight_version: int | None
    ) -> None:
        await client.update_weights_from_disk(described, weight_version)

    async def end(self, client: EngineClient) -> None: ...

    async def leave(self, client: EngineClient) -> None: ...


def receivers(transport: Transport, engines: Sequence[EngineClient], backend: str, address: str) -> Receivers:
    """`address`: where the trainer's rank 0 listens."""
    match transport:
        case "collective":
            return CollectiveReceivers(engines, backend, address)
        case "shared_memory":
            return SharedMemoryReceivers()
        case "disk":
            return DiskReceivers()


def choose_transport(
    asked: Literal["auto", "collective", "shared_memory", "disk"],
    engines: Sequence[EngineClient],
    backend: str,
    address: str,
) -> Transport:
    """On CUDA an engine on GPUs of its own does not see the trainer's, so only NCCL reaches it."""
    if asked != "auto":
        return asked
    here = all(urlsplit(client.url).hostname == address for client in engines)
    return "shared_memory" if here and backend == "gloo" else "collective"
