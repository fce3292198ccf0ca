"""What routes of one model look like."""

from dataclasses import dataclass

from megatron_vespo.routing.routes import Routes, masked_routes


@dataclass(frozen=True)
class RouteShape:
    """What is needed to read the engine's routes.

    Attributes:
        moe_layers: of each layer of the model: is it MoE (else dense)?
        topk: experts of a token in each of them.
        num_experts: to choose from, in each of them.
    """

    moe_layers: tuple[bool, ...]
    topk: int
    num_experts: int

    def masked(self, positions: int, reason: str) -> Routes:
        """Routes of which nothing is recorded."""
        return masked_routes(positions, sum(self.moe_layers), self.topk, self.num_experts, reason)
