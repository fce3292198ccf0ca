"""How the trainer computes: parallel layout, micro-batches, memory, precision, the frozen reference."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from megatron_vespo.config.section import Section


class LayoutConfig(Section):
    """Sizes of Megatron-Core's parallel axes. Data parallelism is what is left: ranks / (tp * pp * cp).

    Experts have axes of their own over the same ranks: their data parallelism is ranks / (etp * ep * pp).
    """

    tp: PositiveInt = 1
    """Tensor parallel: attention heads, dense feed-forward layers and the vocabulary are split."""
    etp: PositiveInt = 1
    """Expert tensor parallel: each expert's matrices are split."""
    ep: PositiveInt = 1
    """Expert parallel: whole experts are spread."""
    pp: PositiveInt = 1
    """Pipeline parallel: consecutive layers (1F1B schedule)."""
    vpp: PositiveInt = 1
    """Virtual pipeline: chunks of layers that each pipeline stage holds (interleaved schedule)."""
    cp: PositiveInt = 1
    """Context parallel: the positions of each packed sequence, in zigzag order."""
    sequence_parallel: bool = True
    """With tp > 1: split activations between the tensor-parallel regions over positions as well."""

    def own_problems(self) -> Iterator[tuple[str, str]]:
        if self.vpp > 1 and self.pp == 1:
            yield "vpp", f"{self.vpp} chunks need pipeline stages to interleave: set pp above 1, or vpp to 1"

    @property
    def model_ranks(self) -> int:
        """Ranks that together hold one copy of what is not an expert."""
        return self.tp * self.pp * self.cp

    @property
    def expert_model_ranks(self) -> int:
        """Ranks that together hold one copy of the experts."""
        return self.etp * self.ep * self.pp


class RecomputeConfig(Section):
    """Activations that are computed again in the backward pass instead of kept."""

    granularity: Literal["none", "selective", "full"] = "none"
    """`full`: whole layers; `selective`: `modules` of each layer."""
    modules: tuple[Literal["core_attn", "layernorm", "mlp", "moe", "moe_act"], ...] = ("core_attn",)
    """Of `selective`, in Megatron's names. `moe_act` and `layernorm` need Transformer Engine's layers (CUDA, bfloat16)."""
    layers: PositiveInt = 1
    """Of `full`: layers that are kept and computed again as one unit. Divides the layers of each pipeline chunk."""

    def own_problems(self) -> Iterator[tuple[str, str]]:
        if self.granularity == "selective" and not self.modules:
            yield "modules", "selective recomputation of no module; set granularity to none"


class ReferenceConfig(Section):
    """The frozen model of a KL term. It has the policy's architecture and layout."""

    path: str | None = None
    """Folder in Hugging Face format; None: the policy's own start, `model.path`."""
    offload: bool = True
    """Keep its weights in host memory and bring them to the device only while it computes."""


class PolicyConfig(Section):
    ranks: PositiveInt = 1
    """Number of trainer processes (one GPU each, or one core each on CPU)."""
    layout: LayoutConfig = LayoutConfig()
    micro_batch_tokens: PositiveInt = 8192
    """Token budget of one forward/backward pass on one rank (with context parallelism a micro-batch has cp times as
    many); a longer sequence gets a micro-batch of its own."""
    head_chunk_tokens: PositiveInt = 1024
    """Tokens that go through the output layer at once; bounds the memory of logits."""
    vocabulary_multiple: PositiveInt = 1
    """Rows of the output layer on each tensor-parallel rank are padded to a multiple of this."""
    token_dispatcher: Literal["alltoall", "allgather", "flex"] = "alltoall"
    """How tokens reach their experts. `flex` is DeepEP's kernels, on CUDA only."""
    recompute: RecomputeConfig = RecomputeConfig()
    distributed_optimizer: bool = True
    """Megatron's distributed optimizer: optimizer state is spread over data-parallel ranks."""
    overlap_gradient_reduction: bool = False
    """Reduce gradients over data-parallel ranks while the backward pass still runs."""
    overlap_parameter_gathering: bool = False
    """Gather updated parameters while the next forward pass runs; needs the distributed optimizer."""
    optimizer_cpu_offload: float = Field(default=0.0, ge=0, le=1)
    """Share of the optimizer's state that lives and steps in host memory, on CUDA only."""
    router_dtype: Literal["float32", "model"] = "float32"
    """Precision of the router's logits and of the gate weights."""
    router_aux_loss: float = Field(default=0.0, ge=0)
    """Coefficient of the load-balancing loss, 0 in RL: it is not linear in micro-batches. Megatron sums it over all
    positions and divides by the loss's count, so prompts make it (positions / response tokens) times stronger."""
    router_z_loss: float = Field(default=0.0, ge=0)
    """Coefficient of the router's z loss."""
    reference: ReferenceConfig | None = None
    """A frozen model beside the policy, for a KL term."""
    startup_timeout_seconds: PositiveFloat = 1800.0
    """Longest that building the model and loading its weights may take before the run is ended."""
    step_timeout_seconds: PositiveFloat = 1800.0
    """Longest that one call to the trainer may take; then its processes are taken for dead."""
    max_restarts: int = Field(default=3, ge=0)
    """When a trainer process dies or hangs, all are started again from the last complete checkpoint, and the steps since
    are taken again on the same batches: so many times until the next checkpoint is complete. 0, or without
    `checkpoint.save_every`: the run ends."""

    def own_problems(self) -> Iterator[tuple[str, str]]:
        layout = self.layout
        if self.ranks % layout.model_ranks:
            yield (
                "ranks",
                f"{self.ranks} is not a multiple of layout.tp * pp * cp ({layout.tp} * {layout.pp} * {layout.cp} = "
                f"{layout.model_ranks}): each copy of the model takes that many",
            )
        if self.ranks % layout.expert_model_ranks:
            yield (
                "ranks",
                f"{self.ranks} is not a multiple of layout.etp * ep * pp ({layout.etp} * {layout.ep} * {layout.pp} = "
                f"{layout.expert_model_ranks}): each copy of the experts takes that many",
            )
        if self.overlap_parameter_gathering and not (self.distributed_optimizer and self.overlap_gradient_reduction):
            yield (
                "overlap_parameter_gathering",
                "needs distributed_optimizer and overlap_gradient_reduction",
            )
        if self.optimizer_cpu_offload and not self.distributed_optimizer:
            yield "optimizer_cpu_offload", "needs distributed_optimizer"

    @property
    def data_parallel_size(self) -> int:
        return self.ranks // self.layout.model_ranks
