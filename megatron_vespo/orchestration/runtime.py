"""Ray and the parts of a run that live on it; whatever ends the run, all of them are stopped."""

import asyncio
import secrets
import time
import traceback
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from ray.exceptions import RayError

from megatron_vespo import presence
from megatron_vespo.config import ClusterConfig
from megatron_vespo.config.cluster import LOCAL_RAY
from megatron_vespo.errors import RunError
from megatron_vespo.interface import Interface
from megatron_vespo.observability.status import DRIVER
from megatron_vespo.orchestration.attached_cluster import AttachedCluster
from megatron_vespo.orchestration.cluster import LocalCluster
from megatron_vespo.orchestration.hosts import Host
from megatron_vespo.orchestration.places import Places
from megatron_vespo.orchestration.stacks import ANSWER_SECONDS, Found, collect_run, in_few_words
from megatron_vespo.orchestration.status_file import Elsewhere, StatusFile
from megatron_vespo.orchestration.supervision import Supervisor, Wait, describe_waits
from megatron_vespo.presence import Process

STOP_SECONDS = 8.0
"""For all parts together; Ray then ends what is left. The whole stop stays under 15 s."""
STACKS = "stacks"
ASK_SECONDS = 5.0
"""How often other hosts are asked for their processes, and how long they may take to tell."""


class Runtime:
    """An async context manager. Parts register how they are stopped as soon as they exist."""

    def __init__(
        self, processes: int, folder: Path, interface: Interface, cluster: ClusterConfig | None = None
    ) -> None:
        """`processes`: Ray actors of the run. `folder`: gets status.json, logs/ and, on a failure, error.txt.
        `interface`: where the parts on this host listen for each other. `cluster`: None is this host alone."""
        self.interface = interface
        self.token = secrets.token_hex(32)
        """Requests to the run's engines need it."""
        self.supervisor = Supervisor(self._diagnose)
        self._settings = cluster or ClusterConfig()
        self._cluster = (
            LocalCluster(processes, interface) if self._settings.ray == LOCAL_RAY else AttachedCluster(self._settings)
        )
        self._folder = folder
        self._stops: dict[str, Callable[[], Awaitable[None]]] = {}
        self._status: StatusFile | None = None
        self._asking: asyncio.Task[None] | None = None

    @property
    def logs(self) -> Path:
        return self._folder / "logs"

    @property
    def here(self) -> Host:
        """Where the driver is."""
        return self._cluster.here

    @property
    def scratch(self) -> Path:
        """A folder for sockets and the like of this host, gone after the run; its path is short."""
        return self.here.scratch

    @property
    def parts(self) -> Path:
        """The folder where the run's processes on this host make themselves known (`presence`)."""
        return self.here.parts

    def place(self, ranks: int, engines: int, engine_gpus: int) -> Places:
        """Of the trainer's ranks, and of engines, on the run's hosts. `engine_gpus`, and what is raised, as in `place`."""
        return Places(self._settings, self._cluster.hosts, ranks, engines, engine_gpus, self._forget)

    def _forget(self, host: Host) -> None:
        """It is lost; nothing is asked of it any more."""
        self._cluster.hosts.remove(host)

    async def __aenter__(self) -> Self:
        try:
            await self._cluster.start()
            presence.announce(self.parts, DRIVER)
            self._status = StatusFile(self._folder, self.parts, self.supervisor)
            self._asking = asyncio.ensure_future(self._ask_hosts(self._status))
        except BaseException:
            self._cluster.stop()
            raise
        return self

    def follow(self, folder: Path) -> None:
        """The run in `folder` is the one whose status is written from now on."""
        assert self._status is not None
        self._status.follow(folder)

    def on_stop(self, part: str, stop: Callable[[], Awaitable[None]]) -> None:
        self._stops[part] = stop

    async def stop_part(self, part: str) -> None:
        """Stop one part now, on purpose; nothing is waited for from it any more."""
        self.supervisor.forget(part)
        presence.withdraw(self.parts, part)
        await self._stop_part(part, self._stops.pop(part), time.monotonic() + STOP_SECONDS)

    async def __aexit__(self, kind, error: BaseException | None, trace) -> None:
        if error is not None:
            self._write_error(error)
        if self._asking is not None:
            self._asking.cancel()
        stopping = asyncio.ensure_future(self._stop_all(failed=error is not None))
        while not stopping.done():
            # A signal now asks for what is already going on; the stop must reach its end.
            with suppress(asyncio.CancelledError):
                await asyncio.shield(stopping)
        assert self._status is not None
        self._status.end(error or stopping.exception())
        stopping.result()

    async def _ask_hosts(self, status: StatusFile) -> None:
        """For `megatron-vespo status`."""
        while elsewhere := [host for host in self._cluster.hosts if host.keeper is not None]:
            told = await asyncio.gather(*(_processes_there(host) for host in elsewhere))
            status.elsewhere = [process for processes in told for process in processes]
            await asyncio.sleep(ASK_SECONDS)
        status.elsewhere = []

    async def _diagnose(self, wait: Wait) -> str:
        assert self._status is not None
        target = self._status.folder / STACKS
        waits = describe_waits(self.supervisor.waits)
        keepers = {host.name: host.keeper for host in self._cluster.hosts if host.keeper is not None}
        asked = [_stacks_there(name, keeper, target) for name, keeper in keepers.items()]
        found, *others = await asyncio.gather(collect_run(self.parts, target, waits), *asked)
        for elsewhere in others:
            found += elsewhere
        return f"{in_few_words(found, wait.owners)}; stacks of all parts: {target}"

    async def _stop_all(self, failed: bool) -> None:
        self.supervisor.forget()
        deadline = time.monotonic() + STOP_SECONDS
        try:
            await asyncio.gather(
                *(self._stop_part(part, stop, deadline) for part, stop in reversed(self._stops.items()))
            )
        finally:
            self._cluster.stop(keep_logs_in=self.logs / "ray" if failed else None)

    async def _stop_part(self, part: str, stop: Callable[[], Awaitable[None]], deadline: float) -> None:
        try:
            await asyncio.wait_for(stop(), deadline - time.monotonic())
        except Exception as error:
            # The parts that are left must still be stopped, so this is written down, not raised.
            self._append(f"while stopping {part}: {type(error).__name__}: {error}\n")

    def _write_error(self, error: BaseException) -> None:
        details = error.details if isinstance(error, RunError) else ""
        self._append("".join(traceback.format_exception(error)) + details + "\n")

    def _append(self, text: str) -> None:
        self.logs.mkdir(parents=True, exist_ok=True)
        with (self._folder / "error.txt").open("a") as file:
            file.write(text)


async def _processes_there(host: Host) -> list[Elsewhere]:
    """On a host where the driver is not."""
    try:
        found = await asyncio.wait_for(host.keeper.processes.remote(), ASK_SECONDS)
    except (RayError, TimeoutError):
        return [Elsewhere(host.name, "all of it", 0, "without an answer")]
    return [Elsewhere(host.name, process.name, process.pid, state) for process, state in found]


async def _stacks_there(name: str, keeper: Any, target: Path) -> list[Found]:
    """Of the processes on another host; a host that does not answer is told like a process that does not."""
    try:
        return await asyncio.wait_for(keeper.collect.remote(str(target.absolute())), 3 * ANSWER_SECONDS)
    except (RayError, TimeoutError):
        return [Found(Process(f"host {name}", 0, 0.0, target), "gone or without an answer", "")]
