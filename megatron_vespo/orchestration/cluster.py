"""Ray on this host for one run: started private to the run, ended without a trace."""

import logging
import shutil
import signal
import socket
import tempfile
from pathlib import Path

import psutil
import ray

from megatron_vespo.config import ClusterConfig, ConfigError
from megatron_vespo.config.cluster import LOCAL_RAY
from megatron_vespo.errors import RunError
from megatron_vespo.interface import LOOPBACK, Interface, choose_interface, own_address
from megatron_vespo.orchestration.hosts import Host
from megatron_vespo.orchestration.ray_token import private_token
from megatron_vespo.rollout import process_tree

LEAST_STORE_BYTES = 256 * 2**20
MEMORY_SHARE, SHM_SHARE = 0.2, 0.5
"""Of the host's available memory, and of what is free in /dev/shm."""
HELPER_SECONDS = 1.0
ATTEMPTS = 5
TOO_SLOW = "The current node timed out during startup"
"""Of Ray's message."""
TOKEN_FILE = "ray_token"
SESSIONS = "r"
"""Short, since Ray's sockets lie in it."""


def object_store_bytes() -> int:
    """Room for the batches that go to the trainer's ranks: a bound, taken only as it is used.

    What does not fit goes over the disk, at its speed: a step of 2,048 long responses with their routes has gigabytes.
    """
    shared = psutil.disk_usage("/dev/shm").free
    return max(LEAST_STORE_BYTES, int(min(MEMORY_SHARE * psutil.virtual_memory().available, SHM_SHARE * shared)))


class LocalCluster:
    """A Ray head with room for `processes` actors. Its session folder is removed at the end.

    It listens on loopback: on any other address Ray's servers would listen on all interfaces of the host, whatever
    address they are given. Its token keeps other users of this host out.
    """

    def __init__(self, processes: int, interface: Interface) -> None:
        """`interface`: where the run's parts listen."""
        self._processes = processes
        self._interface = interface
        self._folder: Path | None = None
        self._others: list[psutil.Process] = []

    @property
    def here(self) -> Host:
        if self._folder is None:
            raise RuntimeError("the cluster was not started")
        gpus = int(ray.cluster_resources().get("GPU", 0))
        return Host(socket.gethostname(), self._interface, self._folder, gpus)

    @property
    def hosts(self) -> list[Host]:
        """This one alone."""
        return [self.here]

    async def start(self) -> None:
        # Unix socket paths are limited to about 107 characters, so the folder is not inside the run's.
        self._folder = Path(tempfile.mkdtemp(prefix="mv-"))
        self._others = psutil.Process().children(recursive=True)
        # Ray puts its own SIGTERM handler in place, which would end this process before its cleanup.
        handler = signal.getsignal(signal.SIGTERM)
        with private_token(self._folder / TOKEN_FILE):
            self._start_ray(self._folder)
        signal.signal(signal.SIGTERM, handler)
        self.here.parts.mkdir()

    def _start_ray(self, folder: Path) -> None:
        """Ray gives up where it is not up within 30 s, however slow the host is."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                ray.init(
                    address="local",
                    num_cpus=self._processes,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    object_store_memory=object_store_bytes(),
                    # Ray opens its folder, with its sockets, to every user of the host; the one around it stays closed.
                    _temp_dir=str(folder / SESSIONS),
                    _node_ip_address=LOOPBACK.address,
                    # Else Ray's processes, the trainer among them, yield the processor to the engines.
                    _system_config={"worker_niceness": 0},
                )
                return
            except Exception as error:  # it is of no narrower type
                if TOO_SLOW not in str(error):
                    raise
                process_tree.kill(self._family())
                if attempt == ATTEMPTS:
                    raise RunError(
                        f"Ray did not come up in {ATTEMPTS} attempts of 30 s: is this host overloaded?"
                    ) from None

    def _family(self) -> list[psutil.Process]:
        """What descends from this process and was not there before is Ray's."""
        return [process for process in psutil.Process().children(recursive=True) if process not in self._others]

    def stop(self, keep_logs_in: Path | None = None) -> None:
        """End all of it; on a failure the actors' own output is kept in `keep_logs_in`.

        Called last of all parts.
        """
        family = self._family()
        if ray.is_initialized():
            ray.shutdown()
        # The raylet's helpers look for their parent's death only now and then; ended while they start, not at all.
        process_tree.wait(family, HELPER_SECONDS)
        process_tree.kill(family)
        if self._folder is None:
            return
        if keep_logs_in is not None:
            keep_logs_in.mkdir(parents=True, exist_ok=True)
            for log in self._folder.glob(f"{SESSIONS}/session_2*/logs/worker-*"):
                if log.stat().st_size:
                    shutil.copy(log, keep_logs_in / log.name)
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder = None


def interface_of(cluster: ClusterConfig) -> Interface:
    """Where parts on this host listen. Raises ConfigError as `find_interface`."""
    return choose_interface(cluster.interface, None if cluster.ray == LOCAL_RAY else own_address(cluster.ray))


def gpus_per_process(processes: int) -> int:
    """How many GPUs each of a run's `processes` gets: 1 where there are GPUs, else 0.

    Raises:
        ConfigError: there are GPUs, but not enough.
    """
    there = int(ray.cluster_resources().get("GPU", 0))
    if 0 < there < processes:
        raise ConfigError(
            f"the run needs {processes} GPUs (policy.ranks, and rollout.engine.count times rollout.engine.tensor_parallel), "
            f"there are {there}: lower one of these, or give it more nodes"
        )
    return 1 if there else 0


def communication_backend(gpus: int) -> str:
    return "nccl" if gpus else "gloo"
