"""Ray on one node of a job: `python -m megatron_vespo.orchestration.ray_node`, once on each node.

It lasts until SIGTERM, or until Ray ends by itself, which is a failure; Ray that does not come up is started again. However
it ends, nothing that descends from it is left, nor are its folder and its shared memory.
"""

import argparse
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from megatron_vespo.errors import ConfigError
from megatron_vespo.interface import own_address
from megatron_vespo.rollout import process_tree

PR_SET_CHILD_SUBREAPER = 36
LOOK_SECONDS = 5.0
"""How often it is noted which shared memory is in use."""
POLL_SECONDS = 0.1
ATTEMPTS = 10
"""To start Ray. It gives up where its head does not serve within 40 s, or itself is not up within 30 s. The driver's patience
(`cluster.start_timeout_seconds`) may end before."""
WRITTEN_BY_RAY_WHEN_STARTED = "ray_current_cluster"
LONGEST_SCRATCH = 40
"""Sockets lie deep in it, and their paths have at most 107 characters."""


def main() -> int:
    """Exit codes: 0 ended by SIGTERM, 1 Ray ended by itself, 2 a mistake in the arguments."""
    options = _options()
    try:
        return run(options)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(options: argparse.Namespace) -> int:
    scratch = Path(options.scratch)
    if len(str(scratch)) > LONGEST_SCRATCH:
        raise ConfigError(f"--scratch {scratch}: longer than {LONGEST_SCRATCH} characters; Ray's sockets lie in it")
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    # What Ray's processes leave behind comes to this one, which can end it then.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for attempt in range(1, ATTEMPTS + 1):
        code, started = hold(options, scratch, asked)
        if asked:
            return 0
        print(f"Ray on this node ended by itself, with exit code {code}", file=sys.stderr)
        if started:
            break
        print(f"it had not started (attempt {attempt} of {ATTEMPTS})", file=sys.stderr)
    if options.then:
        subprocess.run(["bash", "-c", options.then])
    return 1


def hold(options: argparse.Namespace, scratch: Path, asked: list[int]) -> tuple[int | None, bool]:
    """Ray, until it ends or something is in `asked`; nothing is left of it then. Its exit code, and whether it had started."""
    shutil.rmtree(scratch, ignore_errors=True)  # of this job on this node before it was lost
    scratch.mkdir(mode=0o700, parents=True)
    memory: set[Path] = set()
    ray = subprocess.Popen(command(options), env=environment(options, scratch))
    try:
        looked = time.monotonic()
        while ray.poll() is None and not asked:
            time.sleep(POLL_SECONDS)
            if time.monotonic() - looked > LOOK_SECONDS:
                memory |= process_tree.shared_memory_of(psutil.Process().children(recursive=True))
                looked = time.monotonic()
        return ray.returncode, (scratch / "r" / WRITTEN_BY_RAY_WHEN_STARTED).exists()
    finally:
        family = psutil.Process().children(recursive=True)
        memory |= process_tree.shared_memory_of(family)
        while family:  # a process may have started another meanwhile
            process_tree.kill(family)
            family = process_tree.running(psutil.Process().children(recursive=True))
        process_tree.remove(memory, scratch)


def command(options: argparse.Namespace) -> list[str]:
    """`ray start`. The head takes the given port, and the next one for its client server, which it always has."""
    head, _, port = options.address.rpartition(":")
    own = own_address(options.address)
    if own == head and not options.join:
        role = ["--head", f"--port={port}", "--include-dashboard=false", '--system-config={"worker_niceness":0}']
    else:
        role = [f"--address={options.address}"]
    return [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *role),
        *(f"--node-ip-address={own}", f"--node-name={options.name}"),
        *(f"--temp-dir={options.scratch}/r", "--disable-usage-stats", "--num-cpus=0"),
        # Without these, jobs on one node would meet at Ray's fixed ports.
        *("--min-worker-port=0", "--max-worker-port=0", f"--ray-client-server-port={int(port) + 1}"),
        *("--dashboard-agent-listen-port=0", "--dashboard-agent-grpc-port=0", "--metrics-export-port=0"),
        *([f"--object-store-memory={options.object_store_bytes}"] if options.object_store_bytes else []),
    ]


def environment(options: argparse.Namespace, scratch: Path) -> dict[str, str]:
    """Of Ray's processes, which hand it on to the run's actors."""
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": options.token_file, "TMPDIR": str(scratch)}
    # This package's own setting is for a Ray on loopback.
    own["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "1"
    return {name: value for name, value in os.environ.items() if name != "RAY_AUTH_TOKEN"} | own


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--address", required=True, help="ADDRESS:PORT of the head; the host with that address starts it"
    )
    parser.add_argument("--join", action="store_true", help="join a head on this very host")
    parser.add_argument("--name", required=True, help="what the run calls this node")
    parser.add_argument("--scratch", required=True, help="a folder of this node, made anew, and gone at the end")
    parser.add_argument("--token-file", required=True)
    parser.add_argument("--then", help="a line for bash, run when Ray has ended by itself, as it does without its head")
    parser.add_argument("--object-store-bytes", type=int, help="default: Ray's, a share of the node's memory")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
