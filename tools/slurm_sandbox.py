"""A Slurm cluster of several nodes on this host, for trying job scripts: the real slurmctld, munged and slurmd.

python tools/slurm_sandbox.py up --folder /tmp/sandbox --nodes 2
python tools/slurm_sandbox.py run --folder /tmp/sandbox -- sbatch --nodes 2 my_job.sbatch
python tools/slurm_sandbox.py kill-node 2 --folder /tmp/sandbox
python tools/slurm_sandbox.py boot-node 2 --folder /tmp/sandbox
python tools/slurm_sandbox.py down --folder /tmp/sandbox

`source FOLDER/env.sh` does for a shell what `run` does for one command. Made for Slurm 22.05 (Debian 12); `make slurm-deps`
installs what it needs. Nodes have GPUs for the scheduler's eyes: files that stand for devices.

Two modes. `namespaces` (root, with the right to make namespaces): every node is a set of namespaces with its own host
name, address, processes, /dev/shm and local scratch, and `kill-node` ends its first process, which is what a machine that
loses power looks like. `loopback` (any user): nodes are addresses in 127/8; they share the host's name, its processes and
its files.

Everything lies in FOLDER; keep its path short, since sockets are made below it. Several sandboxes do not meet: each takes a
network of its own.
"""

import ctypes
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import psutil
import typer

from megatron_vespo.cli import exit_code
from megatron_vespo.errors import ConfigError, RunError

Mode = Literal["auto", "namespaces", "loopback"]

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "sinfo")
SYSTEM_PATH = "/usr/sbin:/sbin"
"""Where Debian keeps daemons; not on every user's path."""
MOST_NODES = 8
NETWORKS = range(100)
DEADLINE_SECONDS = 90.0
POLL_SECONDS = 0.05
LONGEST_FOLDER = 60
"""The path of a socket has at most 107 bytes."""
PR_SET_CHILD_SUBREAPER = 36
CLOCK_SECONDS = 3.0
STATE = "sandbox.json"
EXPORTS = "env.sh"
OWN_FOLDERS = ("etc", "run", "log", "state", "local", "dev", "nodes", "spool")

# A requeued job waits for `cred_expire`. A node that is silent for SlurmdTimeout is down, and back when it registers again.
# proctrack/linuxproc does not follow processes that leave their parents, so what a job leaves behind stays to be seen.
SLURM_CONF = """\
ClusterName=sandbox
SlurmctldHost={host}({network}.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.socket,cred_expire=10
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1,batch_sched_delay=0,defer_batch
PriorityType=priority/basic
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
JobRequeue=1
ReturnToService=2
SlurmdParameters=config_overrides
SlurmctldTimeout=10
SlurmdTimeout=15
MessageTimeout=10
KillWait=5
MinJobAge=3600
BatchStartTimeout=10
MailProg=/bin/true
GresTypes=gpu
{nodes}
PartitionName=sandbox Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=10 State=UP OverSubscribe=NO
"""

# bash stays the first process, and not slurmd, since bash reaps processes whose parents are gone.
NODE_START = """\
set -e
read -r _
hostname {node}
mount --bind {own}/hosts /etc/hosts
mount --bind {own}/local {folder}/local
mount -t tmpfs tmpfs /dev/shm
ip link set lo up
ip address add {address}/24 dev eth0
ip link set eth0 up
ip route add default via {network}.1
slurmd -D -N {node} -f {folder}/etc/slurm.conf &
sleep infinity &
wait
"""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass
class Sandbox:
    """What `up` made, as it is kept in FOLDER/sandbox.json.

    Attributes:
        number: its network's; no other sandbox of this host has it.
        processes: by name ("slurmctld", "node1"): process number, and when it started in Unix seconds.
    """

    folder: Path
    mode: Mode
    nodes: int
    gpus: int
    cpus: int
    number: int = 0
    processes: dict[str, tuple[int, float]] = field(default_factory=dict)

    @property
    def network(self) -> str:
        # 198.18/15 is for tests of devices (RFC 2544), so no host has a route there that could be lost.
        return f"{'198.18' if self.mode == 'namespaces' else '127.77'}.{self.number}"

    @property
    def bridge(self) -> str:
        return f"slurmbox{self.number}"

    @property
    def environment(self) -> dict[str, str]:
        """For Slurm's commands, and whatever calls them."""
        return {"SLURM_CONF": str(self.folder / "etc" / "slurm.conf"), "SANDBOX_LOCAL": str(self.folder / "local")}

    @property
    def port(self) -> int:
        """slurmctld's; it and every slurmd listen on all addresses of the host, or of their node."""
        return (26000 if self.mode == "namespaces" else 26100) + self.number

    def port_of(self, node: str) -> int:
        return 6818 if self.mode == "namespaces" else 26200 + MOST_NODES * self.number + int(node.removeprefix("node"))

    def names(self) -> list[str]:
        return [f"node{number}" for number in range(1, self.nodes + 1)]

    def address(self, node: str) -> str:
        return f"{self.network}.{10 + int(node.removeprefix('node'))}"

    def save(self) -> None:
        unfinished = self.folder / f"{STATE}.unfinished"
        unfinished.write_text(json.dumps(asdict(self) | {"folder": str(self.folder)}, indent=1) + "\n")
        unfinished.rename(self.folder / STATE)

    def process(self, name: str) -> psutil.Process | None:
        """None where it has ended, even if its parent has not asked yet."""
        pid, created = self.processes.get(name, (0, 0.0))
        try:
            found = psutil.Process(pid) if pid else None
            if found is None or abs(found.create_time() - created) > CLOCK_SECONDS:
                return None
            return None if found.status() == psutil.STATUS_ZOMBIE else found
        except psutil.NoSuchProcess:
            return None

    def slurm(self, *command: str) -> str:
        """Output of a Slurm command.

        Raises:
            RunError: it failed; with what it said.
        """
        done = subprocess.run(command, env=os.environ | self.environment, capture_output=True, text=True)
        if done.returncode:
            raise RunError(f"{shlex.join(command)}: {done.stderr.strip() or f'exit code {done.returncode}'}")
        return done.stdout

    def state_of(self, node: str) -> str:
        """As sinfo has it: "idle", "down*"; "unknown" while slurmctld does not answer."""
        try:
            return self.slurm("sinfo", "-h", "-N", "-n", node, "-o", "%T").strip()
        except RunError:
            return "unknown"


def load(folder: Path) -> Sandbox:
    """The sandbox in `folder`.

    Raises:
        ConfigError: there is none.
    """
    try:
        values = json.loads((folder / STATE).read_text())
    except FileNotFoundError:
        raise ConfigError(f"--folder {folder}: no sandbox was started here (up)") from None
    values["processes"] = {name: tuple(known) for name, known in values["processes"].items()}
    return Sandbox(**values | {"folder": Path(values["folder"])})


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


def with_daemons() -> dict[str, str]:
    return os.environ | {"PATH": f"{os.environ['PATH']}:{SYSTEM_PATH}"}


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
    try:
        take_network(sandbox)
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


def write_files(sandbox: Sandbox) -> None:
    folder, names = sandbox.folder, sandbox.names()
    for name in OWN_FOLDERS:  # of the sandbox that was here before
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in (*OWN_FOLDERS, *(f"spool/{node}" for node in names)):
        (folder / name).mkdir(parents=True, exist_ok=True)
    # Daemons refuse a key or a state that others may write to.
    (folder / "etc" / "munge.key").write_bytes(os.urandom(128))
    (folder / "etc" / "munge.key").chmod(0o600)
    for name in ("", "etc", "run", "log", "state"):
        (folder / name).chmod(0o755)
    hosts = ["127.0.0.1 localhost", f"{sandbox.network}.1 {host_name()}"]
    hosts += [f"{sandbox.address(node)} {node}" for node in names]
    lines = []
    for node in names:
        own = folder / "nodes" / node
        (own / "local").mkdir(parents=True)
        (own / "hosts").write_text("\n".join(hosts) + "\n")
        shared = f" NodeHostname={host_name()}" if sandbox.mode == "loopback" else ""
        lines.append(
            f"NodeName={node}{shared} NodeAddr={sandbox.address(node)} Port={sandbox.port_of(node)} CPUs={sandbox.cpus} Boards=1"
            f" SocketsPerBoard=1 CoresPerSocket={sandbox.cpus} ThreadsPerCore=1 RealMemory=4000"
            + (f" Gres=gpu:{sandbox.gpus}" if sandbox.gpus else "")
            + " State=UNKNOWN"
        )
    user = psutil.Process().username()
    text = SLURM_CONF.format(
        folder=folder,
        host=host_name(),
        network=sandbox.network,
        port=sandbox.port,
        user=user,
        nodes="\n".join(lines),
    )
    (folder / "etc" / "slurm.conf").write_text(text)
    (folder / "etc" / "cgroup.conf").write_text("CgroupAutomount=no\n")
    for number in range(sandbox.gpus):
        make_device(folder / "dev" / f"nvidia{number}")
    devices = f"NodeName=node[1-{sandbox.nodes}] Name=gpu File={folder}/dev/nvidia[0-{sandbox.gpus - 1}]\n"
    (folder / "etc" / "gres.conf").write_text(devices if sandbox.gpus else "")
    exports = [f"export {name}={shlex.quote(value)}" for name, value in sandbox.environment.items()]
    (folder / EXPORTS).write_text("\n".join(exports) + "\n")
    sandbox.save()


def make_device(path: Path) -> None:
    """A second /dev/null, or a file where devices may not be made; the scheduler only counts them."""
    if quiet("mknod", str(path), "c", "1", "3") != 0:
        path.touch()


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
    try:
        process.kill()
        process.wait(DEADLINE_SECONDS)
    except psutil.NoSuchProcess:
        pass


def stop_sandbox(sandbox: Sandbox) -> None:
    """End every process and take the network away. Logs and job output stay in the folder."""
    for node in sandbox.names():
        kill_node(sandbox, node)
    for name in ("slurmctld", "munged"):
        if process := sandbox.process(name):
            kill(process)
    if sandbox.mode == "namespaces":
        quiet("ip", "link", "delete", sandbox.bridge)
    (sandbox.folder / STATE).unlink(missing_ok=True)


def boot_node(sandbox: Sandbox, node: str) -> None:
    """Start a killed node, and wait until slurmctld has it back."""
    if sandbox.process(node) is not None:
        raise ConfigError(f"{node} is up")
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


def host_name() -> str:
    return socket.gethostname().partition(".")[0]


def quiet(*command: str) -> int:
    return subprocess.run(command, capture_output=True, env=with_daemons()).returncode


def checked(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env=with_daemons())
    if done.returncode:
        raise RunError(f"{shlex.join(command)}: {done.stderr.strip()}")


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
