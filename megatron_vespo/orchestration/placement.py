"""Which rank and which engine goes to which node, at first and when nodes are lost."""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from megatron_vespo.config import ClusterConfig, ConfigError
from megatron_vespo.errors import RunError


@dataclass(frozen=True)
class Placement:
    """Numbers of nodes."""

    ranks: list[int]
    """Of each rank of the trainer."""
    engines: list[int | None]
    """Of each engine; None: its node was lost, and no other had room."""


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
    trainers, samplers = _nodes_for(cluster, count)
    if not engine_gpus:
        return Placement(_spread(ranks, trainers), [*_spread(engines, samplers)])
    free = list(gpus)
    return Placement(
        _fill(ranks, 1, trainers, free, "policy.ranks"),
        [*_fill(engines, engine_gpus, samplers, free, "rollout.engine.count")],
    )


def place_again(
    cluster: ClusterConfig, gpus: Sequence[int], engine_gpus: int, placed: Placement, lost: AbstractSet[int]
) -> Placement:
    """Where the parts of lost nodes go; all others stay.

    Of the trainer all ranks move, since they start again together: to its own nodes that are left, then to GPUs that are
    free elsewhere. Engines come after it, each to where there is most room, on nodes for engines first.

    Args:
        gpus, engine_gpus: as in `place`, of the same nodes, lost ones too.
        lost: all nodes that were lost so far.

    Raises:
        RunError: the ranks don't fit; says how many would.
    """
    left = [node for node in range(len(gpus)) if node not in lost]
    trainers, samplers = _nodes_for(cluster, len(gpus))
    engines = [None if node in lost else node for node in placed.engines]
    ranks = placed.ranks
    if not lost.isdisjoint(ranks):
        free = [gpus[node] - engine_gpus * engines.count(node) if node in left else 0 for node in range(len(gpus))]
        ranks = _ranks_again(len(ranks), left, trainers, free if engine_gpus else None)

    def room(node: int) -> int:
        """GPUs; where there are none, the fewer parts are on it the more."""
        return gpus[node] - ranks.count(node) - max(engine_gpus, 1) * engines.count(node)

    for number, node in enumerate(placed.engines):
        if node in lost:
            fitting = [other for other in left if not engine_gpus or room(other) >= engine_gpus]
            order = sorted(fitting, key=lambda other: (other not in samplers, -room(other)))
            engines[number] = next(iter(order), None)
    return Placement(ranks, engines)


def _ranks_again(count: int, left: list[int], trainers: range, free: list[int] | None) -> list[int]:
    """`free`: GPUs of all nodes; None where there are no GPUs."""
    own = [node for node in left if node in trainers]
    if free is None:
        return _spread(count, own or left)
    before, elsewhere = list(free), [node for node in left if node not in trainers]
    found = _filled(count, 1, [*own, *elsewhere], free)
    if len(found) < count:
        raise RunError(
            f"policy.ranks: {count} with 1 GPU each, but the nodes that are left have {[before[node] for node in left]} "
            f"GPUs free: at most policy.ranks={len(found)}, with a layout of so many, would fit on them"
        )
    return found


def _nodes_for(cluster: ClusterConfig, count: int) -> tuple[range, range]:
    """Nodes for the trainer, and for engines."""
    if cluster.policy_nodes is None:
        return range(count), range(count)
    return range(cluster.policy_nodes), range(cluster.policy_nodes, cluster.split_nodes)


def _spread(count: int, nodes: Sequence[int]) -> list[int]:
    """Neighbours stay together."""
    return [nodes[number * len(nodes) // count] for number in range(count)]


def _fill(count: int, size: int, nodes: Sequence[int], free: list[int], key: str) -> list[int]:
    """As `_filled`; raises ConfigError where not all fit."""
    before = [free[node] for node in nodes]
    found = _filled(count, size, nodes, free)
    if len(found) < count:
        raise ConfigError(
            f"{key}: {count} with {size} GPU{'s' if size > 1 else ''} each, but the {len(nodes)} nodes for them have "
            f"{before} GPUs free, which is room for {len(found)}: lower it, or give it more nodes"
        )
    return found


def _filled(count: int, size: int, nodes: Sequence[int], free: list[int]) -> list[int]:
    """Node after node, `size` GPUs for each, as many of `count` as there is room for; takes them from `free`."""
    found = []
    for node in nodes:
        while free[node] >= size and len(found) < count:
            free[node] -= size
            found.append(node)
    return found
