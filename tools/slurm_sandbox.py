"""A Slurm cluster of several nodes on this host, for trying job scripts: the real slurmctld, munged and slurmd.

python tools/slurm_sandbox.py up --folder /tmp/sandbox --nodes 2
python tools/slurm_sandbox.py run --folder /tmp/sandbox -- sbatch --nodes 2 my_job.sbatch
python tools/slurm_sandbox.py kill-node 2 --folder /tmp/sandbox
python tools/slurm_sandbox.py boot-node 2 --folder /tmp/sandbox
python tools/slurm_sandbox.py down --folder /tmp/sandbox

`source FOLDER/env.sh` does for a shell what `run` does for one command. Made for Slurm 22.05 (Debian 12); `make slurm-deps`
installs what it needs. Nodes have GPUs that only the scheduler believes in.

Two modes. `namespaces` (root, with the right to make namespaces): every node is a set of namespaces with its own host
name, address, processes, /dev/shm and local scratch, and `kill-node` ends its first process, which is what a machine that
loses power looks like. `loopback` (any user): nodes are addresses in 127/8; they share the host's name, its processes and
its files.

Everything lies in FOLDER; keep its path short, since sockets are made below it. Several sandboxes do not meet: each takes a
network of its own.
"""

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import psutil
import typer
from slurm_sandbox_files import (
    EXPORTS,
    MOST_NODES,
    NODE_START,
    STATE,
    SYSTEM_PATH,
    Mode,
    Sandbox,
    checked,
    load,
    quiet,
    with_daemons,
    write_files,
)

from megatron_vespo.cli import exit_code
from megatron_vespo.errors import ConfigError, RunError

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "sinfo")
NETWORKS = range(100)
DEADLINE_SECONDS = 90.0
POLL_SECONDS = 0.05
LONGEST_FOLDER = 60
"""The path of a socket has at most 107 bytes."""
PR_SET_CHILD_SUBREAPER = 36

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def missing() -> list[str]:
    """Programs that a sandbox needs and this host lacks."""
    path = f"{os.environ['PATH']}:{SYSTEM_PATH}"
    return [name for name in DAEMONS if shutil.which(name, path=path) is None]


def can_make_namespaces() -> bool:
    probe = "ip link add probe type bridge && mount -t tmpfs tmpfs /dev/shm"
    command = ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--mount-proc", "bash", "-c", probe]
    try:
        return subprocess.run(command, capture_output=True, env=with_daemons()).returncode == 0
    except FileNotFoundError:
        return False


def start_sandbox(folder: Path, nodes: int = 2, mode: Mode = "auto", gpus: int = 8, cpus: int = 8) -> Sandbox:
    """Start munged, slurmctld and `nodes` nodes, and wait until all are idle.

    Args:
        gpus, cpus: of each node, as the scheduler counts them; the host need not have them.

    Raises:
        ConfigError: Slurm is not installed, the mode is not possible here, or a sandbox runs in `folder`.
        RunError: something did not start; nothing is left then but the logs.
    """
    folder = folder.resolve()
    if lacking := missing():
        raise ConfigError(f"not installed: {', '.join(lacking)}. `make slurm-deps` (as root) installs them")
    if len(str(folder)) > LONGEST_FOLDER:
        raise ConfigError(f"--folder {folder}: longer than {LONGEST_FOLDER} characters; sockets are made below it")
    if (folder / STATE).exists():
        raise ConfigError(f"--folder {folder}: holds a sandbox; `down` ends it")
    if folder.exists() and any(folder.iterdir()) and not (folder / EXPORTS).exists():
        raise ConfigError(f"--folder {folder}: not empty, and not of a sandbox. Choose another folder")
    possible = can_make_namespaces()
    if mode == "namespaces" and not possible:
        raise ConfigError("--mode namespaces: this user may not make namespaces; loopback needs no rights")
    settled: Mode = "namespaces" if mode != "loopback" and possible else "loopback"
    sandbox = Sandbox(folder, settled, nodes, gpus, cpus)
    take_network(sandbox)
    try:
        write_files(sandbox)
        start_daemons(sandbox)
        for node in sandbox.names():
            start_node(sandbox, node)
        for node in sandbox.names():
            wait_until(lambda node=node: sandbox.state_of(node) == "idle", f"{node} is idle", sandbox)
    except BaseException:
        stop_sandbox(sandbox)
        raise
    return sandbox


def take_network(sandbox: Sandbox) -> None:
    """A bridge is made, with its name and so its number taken, or not at all; on loopback a port is looked at."""
    for number in NETWORKS:
        sandbox.number = number
        if sandbox.mode == "namespaces":
            if quiet("ip", "link", "add", sandbox.bridge, "type", "bridge") == 0:
                checked("ip", "address", "add", f"{sandbox.network}.1/24", "dev", sandbox.bridge)
                checked("ip", "link", "set", sandbox.bridge, "up")
                return
        else:
            with socket.socket() as probe:
                try:
                    probe.bind(("", sandbox.port))
                    return
                except OSError:
                    continue
    raise RunError(f"all {len(NETWORKS)} networks are taken by other sandboxes")


def start_daemons(sandbox: Sandbox) -> None:
    run, log, etc = (sandbox.folder / name for name in ("run", "log", "etc"))
    munged = ["munged", "-F", "--force", f"--key-file={etc}/munge.key", f"--socket={run}/munge.socket"]
    munged += [f"--pid-file={run}/munged.pid", f"--log-file={log}/munged.log", f"--seed-file={run}/munge.seed"]
    start(sandbox, "munged", munged)
    answers = ("munge", "-n", "-S", f"{run}/munge.socket")
    wait_until(lambda: quiet(*answers) == 0, "munged answers", sandbox)
    start(sandbox, "slurmctld", ["slurmctld", "-D", "-f", f"{etc}/slurm.conf"])


def start(sandbox: Sandbox, name: str, command: list[str], stdin: int = subprocess.DEVNULL) -> subprocess.Popen:
    """In a session of its own, so that it outlives this command and its terminal."""
    environment = with_daemons() | sandbox.environment
    with (sandbox.folder / "log" / f"{name}.out").open("ab") as log:
        process = subprocess.Popen(
            command, stdin=stdin, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )
    sandbox.processes[name] = (process.pid, psutil.Process(process.pid).create_time())
    sandbox.save()
    return process


def start_node(sandbox: Sandbox, node: str) -> None:
    """Its slurmd, and around it what makes it a node; returns before slurmctld knows of it."""
    if sandbox.mode == "loopback":
        start(sandbox, node, [sys.executable, __file__, "hold-node", node, "--folder", str(sandbox.folder)])
        return
    text = NODE_START.format(
        node=node,
        folder=sandbox.folder,
        own=sandbox.folder / "nodes" / node,
        address=sandbox.address(node),
        network=sandbox.network,
    )
    command = ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"]
    machine = start(sandbox, node, [*command, "bash", "-c", text], stdin=subprocess.PIPE)
    own_network = os.readlink("/proc/self/ns/net")

    def has_network() -> bool:
        return os.readlink(f"/proc/{machine.pid}/ns/net") != own_network

    wait_until(has_network, f"{node} has a network of its own", sandbox)
    cable = f"sb{sandbox.number}n{node.removeprefix('node')}"
    quiet("ip", "link", "delete", cable)  # of the node before it was killed: the kernel takes it away in its own time
    peer = ["peer", "name", "eth0", "netns", str(machine.pid)]
    checked("ip", "link", "add", cable, "type", "veth", *peer)
    checked("ip", "link", "set", cable, "master", sandbox.bridge, "up")
    assert machine.stdin is not None
    machine.stdin.write(b"\n")
    machine.stdin.close()


def kill_node(sandbox: Sandbox, node: str) -> None:
    """All its processes at once, without a word to any of them."""
    machine = sandbox.process(node)
    if machine is None:
        return
    if sandbox.mode == "loopback":
        # What they start meanwhile, and whom they leave, is the holder's child or grandchild too (see `hold_node`).
        while children := machine.children(recursive=True):
            for child in children:
                kill(child)
    else:
        # The first process of the namespaces; the kernel ends the others with it, and `unshare` when all are gone.
        for child in machine.children():
            kill(child)
    kill(machine)
    sandbox.processes.pop(node)
    sandbox.save()


def kill(process: psutil.Process) -> None:
    """SIGKILL, and wait until it has ended; whose child it is may take its time to notice."""
    with suppress(psutil.NoSuchProcess):
        process.kill()
        while process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(POLL_SECONDS)


def stop_sandbox(sandbox: Sandbox) -> None:
    """End every process and take the network away. Logs and job output stay in the folder."""
    if (sandbox.folder / STATE).exists():  # a node may have been booted by another command since `sandbox` was read
        sandbox = load(sandbox.folder)
    for node in sandbox.names():
        kill_node(sandbox, node)
    for name in ("slurmctld", "munged"):
        if process := sandbox.process(name):
            kill(process)
    if sandbox.mode == "namespaces":
        quiet("ip", "link", "delete", sandbox.bridge)
    (sandbox.folder / STATE).unlink(missing_ok=True)


def boot_node(sandbox: Sandbox, node: str) -> None:
    """Start a killed node once slurmctld knows of its end, as after a reboot, and wait until it has it back.

    With a node that is back sooner, slurmctld 22.05 takes minutes to see that the node's jobs are gone.
    """
    if sandbox.process(node) is not None:
        raise ConfigError(f"{node} is up")
    wait_until(lambda: sandbox.state_of(node).startswith("down"), f"slurmctld misses {node}", sandbox)
    start_node(sandbox, node)
    good = ("idle", "mixed", "allocated", "completing")
    wait_until(lambda: sandbox.state_of(node) in good, f"slurmctld has {node} back", sandbox)


def wait_until(ready: Callable[[], bool], what: str, sandbox: Sandbox) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not ready():
        if time.monotonic() > deadline:
            raise RunError(f"not within {DEADLINE_SECONDS:.0f} s: {what}. Logs: {sandbox.folder}/log")
        if dead := [name for name in sandbox.processes if sandbox.process(name) is None]:
            tail = (sandbox.folder / "log" / f"{dead[0]}.out").read_text(errors="replace")[-1000:]
            raise RunError(f"{dead[0]} ended before {what}. Logs: {sandbox.folder}/log\n{tail}")
        time.sleep(POLL_SECONDS)


Folder = Annotated[Path, typer.Option("--folder", help="Where everything of the sandbox lies; a short path.")]
NodeNumber = Annotated[int, typer.Argument(min=1, help="1 is node1.", metavar="I")]


@app.command()
def up(
    folder: Folder,
    nodes: Annotated[int, typer.Option(min=1, max=MOST_NODES)] = 2,
    mode: Annotated[Mode, typer.Option(help="auto: namespaces where this user may make them, else loopback.")] = "auto",
    gpus: Annotated[int, typer.Option(min=0, help="Of each node, for the scheduler.")] = 8,
    cpus: Annotated[int, typer.Option(min=1, help="Of each node, for the scheduler.")] = 8,
) -> None:
    """Start a cluster and wait until its nodes are idle."""
    sandbox = start_sandbox(folder, nodes, mode, gpus, cpus)
    print(f"{sandbox.mode}: {', '.join(sandbox.names())} are idle. source {sandbox.folder}/env.sh")


@app.command()
def down(folder: Folder) -> None:
    """End every process of the sandbox; the folder keeps its logs."""
    stop_sandbox(load(folder))


@app.command(name="kill-node")
def kill_node_command(number: NodeNumber, folder: Folder) -> None:
    """A node loses power."""
    sandbox = load(folder)
    kill_node(sandbox, chosen(sandbox, number))


@app.command(name="boot-node")
def boot_node_command(number: NodeNumber, folder: Folder) -> None:
    """A killed node starts again."""
    sandbox = load(folder)
    boot_node(sandbox, chosen(sandbox, number))


@app.command()
def status(folder: Folder) -> None:
    """Nodes, daemons and jobs."""
    sandbox = load(folder)
    for name in ("munged", "slurmctld", *sandbox.names()):
        process = sandbox.process(name)
        state = sandbox.state_of(name) if name.startswith("node") else ""
        print(f"{name:12} {f'process {process.pid}' if process else 'gone':16} {state}")
    print(sandbox.slurm("squeue"), end="")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def run(command: Annotated[list[str], typer.Argument(metavar="COMMAND...")], folder: Folder) -> None:
    """Run a command with this sandbox as its Slurm."""
    os.execvpe(command[0], command, os.environ | load(folder).environment)


@app.command(name="hold-node", hidden=True)
def hold_node(node: str, folder: Folder) -> None:
    """The process around a node in loopback mode: children that lose their parents become its own."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise RunError(f"prctl: {os.strerror(ctypes.get_errno())}")
    subprocess.Popen(["slurmd", "-D", "-N", node, "-f", str(folder / "etc" / "slurm.conf")])
    while True:
        try:
            os.wait()
        except ChildProcessError:
            signal.pause()


def chosen(sandbox: Sandbox, number: int) -> str:
    if number > sandbox.nodes:
        raise ConfigError(f"node{number}: the sandbox has {sandbox.nodes} nodes")
    return f"node{number}"


if __name__ == "__main__":
    sys.exit(exit_code(app))
