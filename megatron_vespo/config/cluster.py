"""The hosts of a run."""

from collections.abc import Iterator

from megatron_vespo.config.section import Section

ALL_INTERFACES = ("", "0.0.0.0", "::", "*")


class ClusterConfig(Section):
    interface: str = "lo"
    """Network interface, by its name or its address, on which engines and trainer listen for each other; `lo` is the
    loopback, which other hosts don't reach. Decides GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME too. Ray listens on loopback
    as long as a run is on one host."""

    def own_problems(self) -> Iterator[tuple[str, str]]:
        if self.interface.strip() in ALL_INTERFACES:
            yield (
                "interface",
                f"'{self.interface}' would listen on every interface of the host: name one (`ip address`)",
            )
