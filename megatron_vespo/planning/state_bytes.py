"""Bytes of parameters, gradients and optimizer state on one trainer rank."""

from dataclasses import dataclass

from megatron_vespo.architecture.hf_config import Architecture
from megatron_vespo.config import PolicyConfig
from megatron_vespo.planning.gradient_buffers import GradientBuffer, chunk_buffers
from megatron_vespo.planning.parameters import rank_parameters

FLOAT32 = 4
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
MOMENTS = 2


@dataclass(frozen=True)
class RankPlace:
    """Where a rank stands: its pipeline stage, and its number among those that share one stage's parameters and experts."""

    stage: int
    data_rank: int
    expert_data_rank: int


@dataclass(frozen=True)
class StateBytes:
    """Of one rank.

    Attributes:
        elements: of parameters, without padding.
        stepped: of these, those whose optimizer state is here.
        host_optimizer: what `policy.optimizer_cpu_offload` keeps in host memory instead: state, gradients and updated
            parameters on their way. Megatron moves whole parameters, so this is a share and not exact.
    """

    elements: int
    stepped: int
    parameters: int
    gradients: int
    optimizer: int
    host_optimizer: int

    @property
    def total(self) -> int:
        """On the device."""
        return self.parameters + self.gradients + self.optimizer


def rank_place(policy: PolicyConfig, rank: int) -> RankPlace:
    """In Megatron's order of axes: tensor, context, data, pipeline; of experts tensor, expert, data, pipeline."""
    layout = policy.layout
    of_stage = policy.ranks // layout.pp
    return RankPlace(
        stage=rank // of_stage,
        data_rank=rank % of_stage // layout.tp,
        expert_data_rank=rank % of_stage // (layout.etp * layout.ep),
    )


def state_bytes(
    architecture: Architecture, policy: PolicyConfig, dtype: str, place: RankPlace, transformer_engine: bool
) -> StateBytes:
    """On the rank at `place`, once a step was taken."""
    width = DTYPE_BYTES[dtype]
    chunks = rank_parameters(architecture, policy, place.stage, transformer_engine)
    elements = stored = buffered = stepped = 0
    for number, parameters in enumerate(chunks):
        own = sum(parameter.elements for parameter in parameters)
        buffers = chunk_buffers(parameters, policy, place.stage, number)
        padded = sum(buffer.elements for buffer in buffers if buffer)
        elements += own
        buffered += padded
        stored += padded if policy.distributed_optimizer else own
        if policy.distributed_optimizer:
            stepped += sum(_stepped(buffer, place) for buffer in zip(buffers, (False, True), strict=True))
        else:
            stepped += own
    per_element = FLOAT32 * (MOMENTS + (width < FLOAT32))
    moved = round(stepped * policy.optimizer_cpu_offload)
    return StateBytes(
        elements=elements,
        stepped=stepped,
        parameters=stored * width,
        gradients=buffered * FLOAT32,
        optimizer=(stepped - moved) * per_element,
        host_optimizer=moved * (FLOAT32 * (MOMENTS + 1) + FLOAT32 + width),
    )


def _stepped(buffer: tuple[GradientBuffer | None, bool], place: RankPlace) -> int:
    found, experts = buffer
    return 0 if found is None else found.stepped_by(place.expert_data_rank if experts else place.data_rank)
