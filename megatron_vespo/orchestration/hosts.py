"""The hosts of a run: where parts are put, and what is asked of a host on which the driver is not."""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from megatron_vespo import presence
from megatron_vespo.interface import Interface, choose_interface
from megatron_vespo.orchestration.stacks import Found, collect
from megatron_vespo.presence import Process
from megatron_vespo.weights.slots import remove_slots

CPU_ENVIRONMENT = {
    # One thread a process: with more, small matrices on CPU are slower, and sums would depend on the thread count.
    "OMP_NUM_THREADS": "1",
    # Megatron's jit fusers are torch.compile, which is slower than eager at CPU sizes.
    "TORCHDYNAMO_DISABLE": "1",
}
"""Of actors where there is no GPU."""


@dataclass(frozen=True)
class Host:
    """
    Attributes:
        interface: where parts on it listen.
        scratch: a folder for sockets and the like, gone after the run; its path is short.
        node: Ray's id of it; None where Ray has no other.
        keeper: the actor that does things there; None where the driver is.
    """

    name: str
    interface: Interface
    scratch: Path
    gpus: int = 0
    node: str | None = None
    keeper: Any = None

    @property
    def parts(self) -> Path:
        """The folder where processes of the run make themselves known (`presence`)."""
        return self.scratch / "parts"

    def actor_options(self, gpus: int) -> dict[str, Any]:
        """Ray options of an actor on it, with `gpus` GPUs."""
        environment = self.interface.environment() | ({} if gpus else CPU_ENVIRONMENT)
        options = {"num_cpus": 1, "num_gpus": gpus, "runtime_env": {"env_vars": environment}}
        if self.node is None:
            return options
        return options | {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(self.node, soft=False)}

    def remove_slots(self, pids: list[int]) -> None:
        """What processes on it that were ended by force have left in shared memory."""
        if self.keeper is not None:
            self.keeper.remove_slots.remote(pids)
            return
        for pid in pids:
            remove_slots(pid)


@ray.remote(max_restarts=0)
class HostKeeper:
    """On a host without the driver, for the time of the run."""

    def __init__(self, interface: str, known_as: str) -> None:
        """`interface`: as `cluster.interface`. `known_as`: the host's address, for Ray."""
        self._interface = choose_interface(interface, known_as)
        self._scratch = Path(tempfile.mkdtemp(prefix="mv-"))
        (self._scratch / "parts").mkdir()

    def opened(self) -> tuple[Interface, Path]:
        return self._interface, self._scratch

    def processes(self) -> list[tuple[Process, str]]:
        """That are known here, and the state of each."""
        return [(process, process.state()) for process in presence.processes(self._scratch / "parts")]

    def collect(self, target: str) -> list[Found]:
        """Stacks of the processes here, as files in `target`."""
        return collect(presence.processes(self._scratch / "parts"), Path(target))

    def remove_slots(self, pids: list[int]) -> None:
        for pid in pids:
            remove_slots(pid)

    def close(self, keep_logs_in: str | None) -> None:
        """Remove the folder; keep the actors' own output, if so asked."""
        if keep_logs_in is not None:
            keep_logs(Path(keep_logs_in))
        shutil.rmtree(self._scratch, ignore_errors=True)


def keep_logs(target: Path) -> None:
    """Copy what actors on this host have printed."""
    from ray._private.worker import global_worker

    assert global_worker.node is not None
    target.mkdir(parents=True, exist_ok=True)
    for log in Path(global_worker.node.get_logs_dir_path()).glob("worker-*"):
        if log.stat().st_size:
            shutil.copy(log, target / log.name)
