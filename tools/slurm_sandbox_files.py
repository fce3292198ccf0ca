"""What a Slurm sandbox is and what lies in its folder (tools/slurm_sandbox.py): its state, Slurm's configuration, devices."""

import json
import os
import shlex
import shutil
import socket
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import psutil

from megatron_vespo.errors import ConfigError, RunError

Mode = Literal["auto", "namespaces", "loopback"]

SYSTEM_PATH = "/usr/sbin:/sbin"
"""Where Debian keeps daemons; not on every user's path."""
MOST_NODES = 8
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
KillWait=30
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
        # The scheduler wants devices of this name, and only counts them.
        (folder / "dev" / f"nvidia{number}").symlink_to("/dev/null")
    devices = f"NodeName=node[1-{sandbox.nodes}] Name=gpu File={folder}/dev/nvidia[0-{sandbox.gpus - 1}]\n"
    (folder / "etc" / "gres.conf").write_text(devices if sandbox.gpus else "")
    exports = [f"export {name}={shlex.quote(value)}" for name, value in sandbox.environment.items()]
    (folder / EXPORTS).write_text("\n".join(exports) + "\n")
    sandbox.save()


def with_daemons() -> dict[str, str]:
    return os.environ | {"PATH": f"{os.environ['PATH']}:{SYSTEM_PATH}"}


def host_name() -> str:
    return socket.gethostname().partition(".")[0]


def quiet(*command: str) -> int:
    return subprocess.run(command, capture_output=True, env=with_daemons()).returncode


def checked(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env=with_daemons())
    if done.returncode:
        raise RunError(f"{shlex.join(command)}: {done.stderr.strip()}")
