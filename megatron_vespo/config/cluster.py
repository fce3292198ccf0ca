"""The hosts of a run."""

from collections.abc import Iterator

from pydantic import Field, PositiveInt

from megatron_vespo.config.section import Section

ALL_INTERFACES = ("", "0.0.0.0", "::", "*")
LOCAL_RAY = "local"


class ClusterConfig(Section):
    interface: str = "auto"
    """Network interface, by its name or its address, on which engines and trainer listen for each other; looked up on each
    host, so on several it must be a name. `lo` is the loopback, which other hosts don't reach. `auto`: the loopback, or
    with `ray` the interface of the address by which Ray knows the host. Decides GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME
    too. Ray itself listens on loopback as long as it is `local`."""
    ray: str = LOCAL_RAY
    """`local`: a private Ray on this host, for the time of the run. ADDRESS:PORT: one that a job has started on its nodes,
    for this run alone; slurm/train.sbatch does so and fills in this and the next two."""
    ray_token: str | None = None
    """File with the token that this Ray asks for."""
    node_names: tuple[str, ...] = ()
    """What the nodes of that Ray are called (`ray start --node-name`). The run waits for all of them, and counts them in
    this order. None given: those that are there, the driver's first."""
    policy_nodes: PositiveInt | None = None
    """The first so many nodes hold the trainer alone, the `engine_nodes` after them the engines alone. Without both, nodes
    are filled with the trainer's ranks, and engines get what is left; where there are no GPUs both are spread evenly."""
    engine_nodes: PositiveInt | None = None
    """See `policy_nodes`."""
    start_timeout_seconds: float = Field(default=300.0, gt=0)
    """How long nodes may take to come."""

    def own_problems(self) -> Iterator[tuple[str, str]]:
        if self.interface.strip() in ALL_INTERFACES:
            yield (
                "interface",
                f"'{self.interface}' would listen on every interface of the host: name one (`ip address`)",
            )
        if self.ray != LOCAL_RAY and not self.ray.rpartition(":")[2].isdigit():
            yield "ray", f"'{self.ray}' is neither '{LOCAL_RAY}' nor ADDRESS:PORT"
        if (self.ray == LOCAL_RAY) != (self.ray_token is None):
            yield "ray_token", f"belongs to a Ray that a job started, and only to it: cluster.ray is '{self.ray}'"
        if (self.policy_nodes is None) != (self.engine_nodes is None):
            yield "policy_nodes", "goes together with cluster.engine_nodes: give both, or none"
        elif self.node_names and self.split_nodes > len(self.node_names):
            yield (
                "policy_nodes",
                f"{self.policy_nodes} nodes for the trainer and {self.engine_nodes} for engines are {self.split_nodes}, "
                f"but the job has {len(self.node_names)}: ask for more (sbatch --nodes), or lower one of them",
            )

    @property
    def split_nodes(self) -> int:
        """Nodes that `policy_nodes` and `engine_nodes` ask for; 0 where they say nothing."""
        return (self.policy_nodes or 0) + (self.engine_nodes or 0)
