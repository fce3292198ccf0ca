"""Which rank and which engine goes to which node."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vespo.config import ClusterConfig, ConfigError


@dataclass(frozen=True)
class Placement:
    """Numbers of nodes."""

    ranks: list[int]
    """Of each rank of the trainer."""
    engines: list[int]


def place(cluster: ClusterConfig, gpus: Sequence[int], ranks: int, engines: int, engine_gpus: int) -> Placement:
    """
    Args:
        gpus: of each node.
        engine_gpus: that an engine needs, all on one node; 0 where there are no GPUs, and a rank needs none either.

    Raises:
        ConfigError: they do not fit; says what there is.
    """
    count = len(gpus)
    if cluster.split_nodes > count:
        raise ConfigError(
            f"cluster.policy_nodes and cluster.engine_nodes ask for {cluster.split_nodes} nodes, this run has {count}: "
            "start it on more (slurm/train.sbatch), or leave both out"
        )
    trainers, samplers = range(count), range(count)
    if cluster.policy_nodes is not None:
        trainers, samplers = range(cluster.policy_nodes), range(cluster.policy_nodes, cluster.split_nodes)
    if not engine_gpus:
        return Placement(_spread(ranks, trainers), _spread(engines, samplers))
    free = list(gpus)
    return Placement(
        _fill(ranks, 1, trainers, free, "policy.ranks"),
        _fill(engines, engine_gpus, samplers, free, "rollout.engine.count"),
    )


def _spread(count: int, nodes: range) -> list[int]:
    """Neighbours stay together."""
    return [nodes[number * len(nodes) // count] for number in range(count)]


def _fill(count: int, size: int, nodes: range, free: list[int], key: str) -> list[int]:
    """Node after node, `size` GPUs for each; takes them from `free`."""
    before, found = [free[node] for node in nodes], []
    for node in nodes:
        while free[node] >= size and len(found) < count:
            free[node] -= size
            found.append(node)
    if len(found) < count:
        raise ConfigError(
            f"{key}: {count} with {size} GPU{'s' if size > 1 else ''} each, but the {len(nodes)} nodes for them have "
            f"{before} GPUs free, which is room for {len(found)}: lower it, or give it more nodes"
        )
    return found
