"""What a parallel layout asks of micro-batches. Without torch, so that a plan needs none."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class PackingRules:
    """What a layout asks of the micro-batches of a step.

    Attributes:
        ranks: data-parallel ranks.
        token_budget: positions of one micro-batch, padding included, over all its context-parallel ranks. A sequence
            that is longer has a micro-batch of its own.
        segment_multiple: each packed sequence is padded at its end to a multiple of so many positions (twice the ranks,
            with context parallelism).
        total_multiple: the positions of a micro-batch are a multiple of this (what context and sequence parallelism
            divide by).
        count_multiple: the micro-batches of a rank are a multiple of this (pipeline stages, with a virtual pipeline).
        minimum_count: micro-batches of a rank, at least.
        equal_totals: all micro-batches of the step get the same number of positions (the allgather dispatcher).
        attention_cost: a sequence of n positions costs n + attention_cost * n^2.
    """

    ranks: int
    token_budget: int
    segment_multiple: int = 1
    total_multiple: int = 1
    count_multiple: int = 1
    minimum_count: int = 1
    equal_totals: bool = False
    attention_cost: float = 0.0

    def __post_init__(self):
        for name in ("ranks", "segment_multiple", "total_multiple", "count_multiple", "minimum_count"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.token_budget < self.positions_multiple:
            raise ValueError(
                f"token_budget must be at least {self.positions_multiple}, of which a micro-batch's positions are a "
                f"multiple, found {self.token_budget}"
            )
        if self.attention_cost < 0:
            raise ValueError(f"attention_cost must not be negative, found {self.attention_cost}")

    @property
    def positions_multiple(self) -> int:
        """Of a micro-batch's positions: `total_multiple` and `segment_multiple` in one."""
        return math.lcm(self.segment_multiple, self.total_multiple)

    def padded(self, positions: int) -> int:
        """Positions of a packed sequence with its padding."""
        return round_up(positions, self.segment_multiple)

    def cost(self, positions: int) -> float:
        return positions + self.attention_cost * positions**2


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
