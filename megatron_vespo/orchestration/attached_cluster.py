"""A Ray on several hosts that a job has started for one run: attached to, and left as it was found."""

import asyncio
import logging
import re
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]
from ray.exceptions import AuthenticationError, RayError

from megatron_vespo.config import ClusterConfig, ConfigError
from megatron_vespo.errors import RunError
from megatron_vespo.interface import AUTO, LOOPBACK, choose_interface, own_address
from megatron_vespo.orchestration.hosts import Host, HostKeeper, keep_logs
from megatron_vespo.orchestration.ray_token import token_of

POLL_SECONDS = 0.2
ANSWER_SECONDS = 2
"""Of Ray's own list of nodes."""
OPEN_SECONDS = 120.0
CLOSE_SECONDS = 3.0
ALIVE = 0
"""In Ray's GcsNodeInfo."""


class AttachedCluster:
    """Nodes are those of `cluster.node_names`, in that order; else all, the driver's first."""

    def __init__(self, cluster: ClusterConfig) -> None:
        self._cluster = cluster
        self._folder: Path | None = None
        self.hosts: list[Host] = []

    @property
    def here(self) -> Host:
        """Where the driver is."""
        return next(host for host in self.hosts if host.keeper is None)

    async def start(self) -> None:
        """Wait for all nodes, and make a folder on each.

        Raises:
            RunError: nodes did not come in time; names them.
            ConfigError: an interface is not there, or this host is none of the nodes.
        """
        cluster = self._cluster
        assert cluster.ray_token is not None
        if not Path(cluster.ray_token).is_file():
            raise ConfigError(f"cluster.ray_token: {cluster.ray_token} is not there")
        address = own_address(cluster.ray)
        # Ray puts its own SIGTERM handler in place, which would end this process before its cleanup.
        handler = signal.getsignal(signal.SIGTERM)
        with token_of(Path(cluster.ray_token)):
            await self._nodes_are_there()
            ray.init(address=cluster.ray, _node_ip_address=address, log_to_driver=False, logging_level=logging.ERROR)
        signal.signal(signal.SIGTERM, handler)
        self._folder = Path(tempfile.mkdtemp(prefix="mv-"))
        await self._open_hosts(address)

    async def _nodes_are_there(self) -> None:
        wanted, deadline = set(self._cluster.node_names), time.monotonic() + self._cluster.start_timeout_seconds
        while True:
            there = await self._names()
            if there and wanted <= there:
                return
            if time.monotonic() > deadline:
                missing = ", ".join(sorted(wanted - there)) if there else f"its head, {self._cluster.ray}"
                raise RunError(
                    f"Ray is without {missing} after {self._cluster.start_timeout_seconds:.0f} s "
                    "(cluster.start_timeout_seconds): see the log of that node"
                )
            await asyncio.sleep(POLL_SECONDS)

    async def _names(self) -> set[str]:
        """Of the nodes that are there; none while Ray's head does not listen yet."""
        host, _, port = self._cluster.ray.rpartition(":")
        try:
            _, writer = await asyncio.wait_for(asyncio.open_connection(host, int(port)), ANSWER_SECONDS)
        except (OSError, TimeoutError):
            return set()
        writer.close()

        def ask() -> set[str]:
            nodes = GcsClient(address=self._cluster.ray).get_all_node_info(timeout=ANSWER_SECONDS).values()
            return {node.node_name for node in nodes if node.state == ALIVE}

        try:
            return await asyncio.to_thread(ask)
        except AuthenticationError as error:
            raise RunError(f"Ray at {self._cluster.ray} does not take cluster.ray_token: {error}") from None
        except (RayError, RuntimeError):  # it listens, and does not serve yet
            return set()

    async def _open_hosts(self, address: str) -> None:
        names = self._cluster.node_names
        nodes = [node for node in ray.nodes() if node["Alive"] and (not names or node["NodeName"] in names)]
        here = ray.get_runtime_context().get_node_id()
        if not any(node["NodeID"] == here for node in nodes):
            there = ", ".join(f"{node['NodeName']} ({node['NodeManagerAddress']})" for node in nodes)
            raise ConfigError(f"cluster.ray: the driver's host {address} is none of its nodes: {there}")
        if names:
            nodes.sort(key=lambda node: names.index(node["NodeName"]))
        else:
            nodes.sort(key=lambda node: (node["NodeID"] != here, _natural(node["NodeName"])))
        hosts = {node["NodeManagerAddress"] for node in nodes}
        if len(hosts) > 1 and choose_interface(self._cluster.interface, address) == LOOPBACK:
            raise ConfigError(
                f"cluster.interface: other hosts do not reach '{self._cluster.interface}': set it to {AUTO}"
            )
        self.hosts = list(await asyncio.gather(*(self._open(node, here) for node in nodes)))

    async def _open(self, node: dict[str, Any], here: str) -> Host:
        name, known_as, id_ = node["NodeName"], node["NodeManagerAddress"], node["NodeID"]
        gpus = int(node["Resources"].get("GPU", 0))
        if id_ == here:
            assert self._folder is not None
            (self._folder / "parts").mkdir()
            interface = choose_interface(self._cluster.interface, known_as)
            return Host(name, interface, self._folder, gpus, id_)
        options = Host(name, LOOPBACK, Path(), node=id_).actor_options(gpus=0)
        keeper = HostKeeper.options(**options).remote(  # pyright: ignore[reportAttributeAccessIssue]
            self._cluster.interface, known_as
        )
        try:
            interface, scratch = await asyncio.wait_for(keeper.opened.remote(), OPEN_SECONDS)
        except (RayError, TimeoutError) as error:
            cause = str(error).strip().splitlines() or [f"no answer within {OPEN_SECONDS:.0f} s"]
            raise RunError(f"{name}: {cause[-1]}") from None
        return Host(name, interface, scratch, gpus, id_, keeper)

    def stop(self, keep_logs_in: Path | None = None) -> None:
        """Let go of it; on a failure the actors' own output is kept in `keep_logs_in`."""
        if ray.is_initialized():
            if keep_logs_in is not None and self.hosts:
                keep_logs(keep_logs_in / self.here.name)
            keepers = {host.name: host.keeper for host in self.hosts if host.keeper is not None}
            closing = [
                keeper.close.remote(None if keep_logs_in is None else str(keep_logs_in.absolute() / name))
                for name, keeper in keepers.items()
            ]
            # A node that is gone, or does not answer, takes its folder with it; the job clears what it left.
            if closing:
                ray.wait(closing, num_returns=len(closing), timeout=CLOSE_SECONDS)
            for keeper in keepers.values():
                ray.kill(keeper)
            ray.shutdown()
        self.hosts = []
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


def _natural(name: str) -> list[tuple[int, str]]:
    """node2 comes before node10."""
    return [(int(part or 0), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]
