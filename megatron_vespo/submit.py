"""`megatron-vespo submit`: slurm/train.sbatch, filled for a configuration."""

import os
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

from megatron_vespo.config import TrainConfig
from megatron_vespo.errors import ConfigError, RunError

TEMPLATE = Path("slurm/train.sbatch")
SITE = Path("slurm/cluster.env")
MARK = "#SBATCH "


@dataclass(frozen=True)
class Request:
    """What a job asks of Slurm; None leaves what the template, or the site (SBATCH_*), says."""

    nodes: int | None = None
    gpus_per_node: int | None = None
    time: str | None = None
    partition: str | None = None

    def options(self, config: TrainConfig) -> dict[str, str]:
        """Of sbatch, by name."""
        asked = {
            "job-name": Path(config.run_dir).name,
            "nodes": self.nodes or nodes_of(config, self.gpus_per_node),
            "gpus-per-node": self.gpus_per_node,
            "time": self.time,
            "partition": self.partition,
        }
        return {name: str(value) for name, value in asked.items() if value is not None}


def nodes_of(config: TrainConfig, gpus_per_node: int | None) -> int:
    """Those of cluster.policy_nodes and engine_nodes; else as many as the run's GPUs (8 on a node) need.

    Raises:
        ConfigError: an engine does not fit on a node.
    """
    if config.cluster.split_nodes:
        return config.cluster.split_nodes
    each, engine = gpus_per_node or 8, config.rollout.engine
    if engine.tensor_parallel > each:
        raise ConfigError(f"rollout.engine.tensor_parallel: {engine.tensor_parallel}, but a node has {each} GPUs")
    # Engines lie on one node each, in what the trainer's last node has left and on nodes of their own.
    left, own = -config.policy.ranks % each, each // engine.tensor_parallel
    further = max(0, engine.count - left // engine.tensor_parallel)
    return -(-config.policy.ranks // each) + -(-further // own)


def filled(template: str, options: dict[str, str], words: list[str], site: Path | None = None) -> str:
    """`template` with these options, `words` as its arguments and `site` as CLUSTER_ENV: a script that sbatch takes as it is."""
    lines = template.splitlines()
    kept = [line for line in lines if not any(line.startswith(f"{MARK}--{name}=") for name in options)]
    last = max(number for number, line in enumerate(kept) if line.startswith(MARK))
    own = [f"{MARK}--{name}={shlex.quote(value)}" for name, value in options.items()]
    own += [] if site is None else [f"CLUSTER_ENV={shlex.quote(str(site))}"]
    return "\n".join([*kept[: last + 1], *own, f"set -- {shlex.join(words)}", *kept[last + 1 :]]) + "\n"


def script(config: TrainConfig, request: Request, words: list[str], site: Path | None = None) -> str:
    """
    Args:
        words: CONFIG and overrides, as they were given.
        site: the cluster.env of the job; None: as the template finds it.

    Raises:
        ConfigError: there is no template here, or no such site.
    """
    if not TEMPLATE.exists():
        raise ConfigError(f"{TEMPLATE}: not there. Call this in the folder of the repository, as the job runs in it")
    if site is not None and not site.is_file():
        raise ConfigError(f"--site {site}: no such file. Give a copy of {SITE}, filled for your cluster")
    return filled(TEMPLATE.read_text(), request.options(config), words, None if site is None else site.absolute())


def submit(config: TrainConfig, request: Request, words: list[str], site: Path | None = None) -> str:
    """What sbatch says. Raises RunError where it refuses, ConfigError as `script`."""
    text = script(config, request, words, site)
    sourced = os.environ.get("CLUSTER_ENV", str(SITE)) if site is None else str(site.absolute())
    # On the command line too: there they win over the site's SBATCH_*.
    options = [f"--{name}={value}" for name, value in request.options(config).items()]
    command = ["bash", "-c", 'source "$0" && exec sbatch "$@"', sourced, *options]
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True)
    except OSError as error:
        raise RunError(f"bash: {error.strerror}") from None
    if done.returncode:
        raise RunError(f"sbatch: {done.stderr.strip()}")
    return (done.stdout + done.stderr).strip()
