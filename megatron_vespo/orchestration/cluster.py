"""Ray on this host for one run: started private to the run, ended without a trace."""

import logging
import os
import shutil
import tempfile
from pathlib import Path

import psutil
import ray

LOOPBACK = "127.0.0.1"
OBJECT_STORE_BYTES = 256 * 2**20
HELPER_SECONDS = 1.0

ACTOR_ENVIRONMENT = {
    # One thread a process: with more, small matrices on CPU are slower, and sums would depend on the thread count.
    "OMP_NUM_THREADS": "1",
    # Megatron's jit fusers are torch.compile, which is slower than eager at CPU sizes.
    "TORCHDYNAMO_DISABLE": "1",
    "GLOO_SOCKET_IFNAME": "lo",
}


class LocalCluster:
    """A Ray head with room for `processes` actors. Its session folder is removed at the end."""

    def __init__(self, processes: int) -> None:
        self._processes = processes
        self._folder: Path | None = None

    def start(self) -> None:
        # Unix socket paths are limited to about 107 characters, so the folder is not inside the run's.
        self._folder = Path(tempfile.mkdtemp(prefix="mv-"))
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        ray.init(
            num_cpus=self._processes,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=OBJECT_STORE_BYTES,
            _temp_dir=str(self._folder),
            _node_ip_address=LOOPBACK,
        )

    def stop(self, keep_logs_in: Path | None = None) -> None:
        """End all of it; on a failure the actors' own output is kept in `keep_logs_in`.

        Called last of all parts, so what still descends from this process is Ray's.
        """
        family = psutil.Process().children(recursive=True)
        if ray.is_initialized():
            ray.shutdown()
        # The raylet's helpers look for their parent's death only now and then; ended while they start, not at all.
        _, left = psutil.wait_procs(family, timeout=HELPER_SECONDS)
        for process in left:
            process.kill()
        psutil.wait_procs(left)
        if self._folder is None:
            return
        if keep_logs_in is not None:
            keep_logs_in.mkdir(parents=True, exist_ok=True)
            for log in self._folder.glob("session_2*/logs/worker-*"):
                if log.stat().st_size:
                    shutil.copy(log, keep_logs_in / log.name)
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder = None


def gpus_per_process() -> int:
    """1 where the cluster has GPUs, else 0."""
    return 1 if ray.cluster_resources().get("GPU", 0) else 0


def communication_backend() -> str:
    return "nccl" if gpus_per_process() else "gloo"
