"""The hosts of a run's parts; those whose host is lost go to another one."""

import asyncio
import time
from collections.abc import Callable, Sequence

import ray
from ray.exceptions import RayError

from megatron_vespo.config import ClusterConfig
from megatron_vespo.errors import RunError
from megatron_vespo.orchestration.hosts import Host
from megatron_vespo.orchestration.placement import place, place_again
from megatron_vespo.orchestration.supervision import RunFailed

ANSWER_SECONDS = 120.0
"""Of a host. Ray takes up to about a minute to miss one."""
POLL_SECONDS = 1.0


class Places:
    """
    Attributes:
        tell: which hosts are lost, in a line each.
    """

    def __init__(
        self,
        cluster: ClusterConfig,
        hosts: Sequence[Host],
        ranks: int,
        engines: int,
        engine_gpus: int,
        forget: Callable[[Host], None] = lambda host: None,
    ) -> None:
        """`engine_gpus`, and what is raised: as in `place`. `forget`: is called with each host that is lost."""
        self._cluster = cluster
        self._hosts = list(hosts)
        self._gpus = [host.gpus for host in hosts]
        self._engine_gpus = engine_gpus
        self._forget = forget
        self._lost: set[int] = set()
        self._placed = place(cluster, self._gpus, ranks, engines, engine_gpus)
        self.tell: Callable[[str], None] = lambda line: None

    @property
    def ranks(self) -> list[Host]:
        """Of each of the trainer's."""
        return [self._hosts[node] for node in self._placed.ranks]

    @property
    def engines(self) -> list[Host | None]:
        """Of each engine; None: its host was lost, and no other has room."""
        return [None if node is None else self._hosts[node] for node in self._placed.engines]

    async def look(self) -> None:
        """Ask all hosts, and find another place for the parts of those that are lost since.

        Raises:
            RunFailed: the trainer has no room on the hosts that are left.
        """
        asked = [number for number in range(len(self._hosts)) if number not in self._lost]
        answers = await asyncio.gather(*(_is_lost(self._hosts[number]) for number in asked))
        # Another call may have found some of them meanwhile.
        lost = {number for number, gone in zip(asked, answers, strict=True) if gone} - self._lost
        self._lost |= lost
        for number in sorted(lost):
            self._forget(self._hosts[number])
            self.tell(f"{self._hosts[number].name} is lost: what was on it goes to the nodes that are left")
        if self._lost.isdisjoint([*self._placed.ranks, *self._placed.engines]):
            return
        try:
            self._placed = place_again(self._cluster, self._gpus, self._engine_gpus, self._placed, self._lost)
        except RunError as error:
            names = ", ".join(sorted(self._hosts[number].name for number in self._lost))
            raise RunFailed(f"lost {names}", str(error)) from None


async def _is_lost(host: Host) -> bool:
    """Whether Ray has no such host any more. One that is there and does not answer is not lost."""
    if host.keeper is None:
        return False
    deadline = time.monotonic() + ANSWER_SECONDS
    try:
        await asyncio.wait_for(host.keeper.opened.remote(), ANSWER_SECONDS)
        return False
    except (RayError, TimeoutError):
        # Ray misses an actor sooner than its host.
        while True:
            nodes = await asyncio.to_thread(ray.nodes)
            if not any(node["NodeID"] == host.node and node["Alive"] for node in nodes):
                return True
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(POLL_SECONDS)
