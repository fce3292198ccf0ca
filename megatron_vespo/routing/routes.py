"""Which experts the positions of one sequence went to: recorded by the engine (R3) or by the trainer (R2)."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Experts = NDArray[np.uint8 | np.uint16]


LEAST_AGREEMENT_FP32 = 0.99
"""Share of (position, layer) at which two that compute the same weights in float32 must choose the same experts: only
near ties may fall out otherwise."""
LEAST_AGREEMENT_OTHER = 0.8
"""In other precisions; wrong layers or shifted rows agree far less."""


def least_agreement(trainer_dtype: str, engine_dtype: str, noisy_router: bool) -> float:
    """Below which engine and trainer cannot be what they seem; 0 where the engine is wrong on purpose."""
    if noisy_router:
        return 0.0
    return LEAST_AGREEMENT_FP32 if trainer_dtype == engine_dtype == "float32" else LEAST_AGREEMENT_OTHER


def expert_dtype(num_experts: int) -> type[np.uint8] | type[np.uint16]:
    """The smallest that holds every expert's number.

    Raises:
        ValueError: more than 65,536 experts.
    """
    if num_experts > 2**16:
        raise ValueError(f"{num_experts} experts do not fit into 16 bits")
    return np.uint8 if num_experts <= 2**8 else np.uint16


@dataclass(frozen=True)
class RoutingShape:
    """Of a whole model.

    Attributes:
        moe_layers: of each layer, whether it has experts (else it is dense).
        topk: experts that a token goes to in each of them.
        num_experts: those that it has the choice of.
    """

    moe_layers: tuple[bool, ...]
    topk: int
    num_experts: int

    @property
    def num_moe_layers(self) -> int:
        return sum(self.moe_layers)

    @property
    def dtype(self) -> type[np.uint8] | type[np.uint16]:
        return expert_dtype(self.num_experts)

    @property
    def bytes_per_token(self) -> int:
        """Stored, and moved to all ranks together; a mark of one byte on each rank that holds the token comes on top."""
        return self.num_moe_layers * self.topk * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Routes:
    """Of a packed sequence, or of consecutive positions of one. Position i has token i as input and decides token i + 1.

    Attributes:
        experts: [positions, moe layers, topk], in the order in which the router chose them; without meaning where
            nothing is recorded. Dense layers have no place in it.
        recorded: [positions] bool. The others are routed natively.
        weight_versions: [positions] int32, whose weights chose; without meaning where nothing is recorded.
        wire_bytes: in which the engine sent them.
        masked: positions by the reason why they are not recorded although they were asked for.
    """

    experts: Experts
    recorded: NDArray[np.bool_]
    weight_versions: NDArray[np.int32]
    masked: dict[str, int] = field(default_factory=dict)
    wire_bytes: int = 0

    def __post_init__(self):
        positions = self.experts.shape[0]
        if self.experts.ndim != 3 or self.recorded.shape != (positions,) or self.weight_versions.shape != (positions,):
            raise ValueError(
                f"routes of shape {self.experts.shape} with recorded {self.recorded.shape} and weight_versions "
                f"{self.weight_versions.shape}: expected [positions, layers, topk] and twice [positions]"
            )

    def __len__(self) -> int:
        return len(self.experts)

    @property
    def num_bytes(self) -> int:
        """Of `experts` alone."""
        return self.experts.nbytes


def recorded_routes(experts: Experts, weight_version: int) -> Routes:
    """Every position was chosen under one weight version."""
    positions = len(experts)
    return Routes(experts, np.ones(positions, dtype=np.bool_), np.full(positions, weight_version, dtype=np.int32))


def masked_routes(positions: int, shape: RoutingShape, reason: str) -> Routes:
    """Nothing is recorded, for one reason."""
    return Routes(
        np.zeros((positions, shape.num_moe_layers, shape.topk), dtype=shape.dtype),
        np.zeros(positions, dtype=np.bool_),
        np.zeros(positions, dtype=np.int32),
        {reason: positions} if positions else {},
    )


def joined(parts: Sequence[Routes]) -> Routes:
    """Consecutive spans of one sequence, behind each other."""
    if len(parts) == 1:
        return parts[0]
    return Routes(
        np.concatenate([part.experts for part in parts]),
        np.concatenate([part.recorded for part in parts]),
        np.concatenate([part.weight_versions for part in parts]),
        dict(sum((Counter(part.masked) for part in parts), Counter())),
        sum(part.wire_bytes for part in parts),
    )
