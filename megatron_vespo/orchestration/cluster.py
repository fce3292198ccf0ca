"""Ray on this host for one run: started private to the run, ended without a trace."""

import logging
import shutil
import signal
import tempfile
from pathlib import Path

import psutil
import ray

from megatron_vespo.config import ConfigError
from megatron_vespo.interface import LOOPBACK, Interface
from megatron_vespo.orchestration.ray_token import private_token
from megatron_vespo.rollout import process_tree

OBJECT_STORE_BYTES = 256 * 2**20
HELPER_SECONDS = 1.0
TOKEN_FILE = "ray_token"
SESSIONS = "r"
"""Short, since Ray's sockets lie in it."""

CPU_ENVIRONMENT = {
    # One thread a process: with more, small matrices on CPU are slower, and sums would depend on the thread count.
    "OMP_NUM_THREADS": "1",
    # Megatron's jit fusers are torch.compile, which is slower than eager at CPU sizes.
    "TORCHDYNAMO_DISABLE": "1",
}
"""Of actors where there is no GPU."""


class LocalCluster:
    """A Ray head with room for `processes` actors. Its session folder is removed at the end.

    It listens on loopback: on any other address Ray's servers would listen on all interfaces of the host, whatever
    address they are given. Its token keeps other users of this host out.
    """

    def __init__(self, processes: int) -> None:
        self._processes = processes
        self._folder: Path | None = None
        self._others: list[psutil.Process] = []

    @property
    def folder(self) -> Path:
        if self._folder is None:
            raise RuntimeError("the cluster was not started")
        return self._folder

    def start(self) -> None:
        # Unix socket paths are limited to about 107 characters, so the folder is not inside the run's.
        self._folder = Path(tempfile.mkdtemp(prefix="mv-"))
        self._others = psutil.Process().children(recursive=True)
        # Ray puts its own SIGTERM handler in place, which would end this process before its cleanup.
        handler = signal.getsignal(signal.SIGTERM)
        with private_token(self._folder / TOKEN_FILE):
            ray.init(
                address="local",
                num_cpus=self._processes,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=OBJECT_STORE_BYTES,
                # Ray opens its folder, with its sockets, to every user of the host; the one around it stays closed.
                _temp_dir=str(self._folder / SESSIONS),
                _node_ip_address=LOOPBACK.address,
                # Else Ray's processes, the trainer among them, yield the processor to the engines.
                _system_config={"worker_niceness": 0},
            )
        signal.signal(signal.SIGTERM, handler)

    def stop(self, keep_logs_in: Path | None = None) -> None:
        """End all of it; on a failure the actors' own output is kept in `keep_logs_in`.

        Called last of all parts, so what descends from this process and was not there before is Ray's.
        """
        family = [process for process in psutil.Process().children(recursive=True) if process not in self._others]
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


def gpus_per_process(processes: int) -> int:
    """How many GPUs each of a run's `processes` gets: 1 where there are GPUs, else 0.

    Raises:
        ConfigError: there are GPUs, but not enough.
    """
    there = int(ray.cluster_resources().get("GPU", 0))
    if 0 < there < processes:
        raise ConfigError(
            f"the run needs {processes} GPUs (policy.ranks, and rollout.engine.count times rollout.engine.tensor_parallel), "
            f"there are {there}: lower one of these"
        )
    return 1 if there else 0


def actor_options(gpus: int, interface: Interface) -> dict:
    """Ray options of an actor with `gpus` GPUs, whose process groups listen on `interface`."""
    environment = interface.environment() | ({} if gpus else CPU_ENVIRONMENT)
    return {"num_cpus": 1, "num_gpus": gpus, "runtime_env": {"env_vars": environment}}


def communication_backend(gpus: int) -> str:
    return "nccl" if gpus else "gloo"
