"""The model that is trained, and how the trainer computes it."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from megatron_vespo.config.section import Section


class ModelConfig(Section):
    path: str
    """Folder in Hugging Face format: config.json, tokenizer, safetensors."""
    initialization: Literal["pretrained", "random"] = "pretrained"
    """`random` reads only config.json and the tokenizer (to train a base from nothing)."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Parameters of the trainer, and of the engines unless `rollout.engine.dtype` says otherwise."""


class LayoutConfig(Section):
    """Sizes of the parallel axes. Data parallelism is what is left: ranks / (tp * pp * cp)."""

    ep: PositiveInt = 1
    """Expert parallel size: experts are spread over this many data-parallel ranks."""


class PolicyConfig(Section):
    ranks: PositiveInt = 1
    """Number of trainer processes (one GPU each, or one core each on CPU)."""
    layout: LayoutConfig = LayoutConfig()
    micro_batch_tokens: PositiveInt = 8192
    """Token budget of one forward/backward pass; a longer sequence gets a micro-batch of its own."""
    head_chunk_tokens: PositiveInt = 1024
    """Tokens that go through the output layer at once; bounds the memory of logits."""
    distributed_optimizer: bool = True
    """Megatron's distributed optimizer: optimizer state is spread over data-parallel ranks."""
    router_dtype: Literal["float32", "model"] = "float32"
    """Precision of the router's logits and of the gate weights."""
    router_aux_loss: float = Field(default=0.0, ge=0)
    """Coefficient of the load-balancing loss, 0 in RL: it is not linear in micro-batches. Megatron sums it over all
    positions and divides by the loss's count, so prompts make it (positions / response tokens) times stronger."""
    router_z_loss: float = Field(default=0.0, ge=0)
    """Coefficient of the router's z loss."""
    step_timeout_seconds: PositiveFloat = 1800.0
    """Longest that one call to the trainer may take before the run is ended."""

    def own_problems(self) -> Iterator[tuple[str, str]]:
        if self.ranks % self.layout.ep:
            yield (
                "ranks",
                f"{self.ranks} is not a multiple of layout.ep ({self.layout.ep}): experts are spread over "
                "data-parallel ranks",
            )

    @property
    def data_parallel_size(self) -> int:
        return self.ranks


Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Section):
    """AdamW."""

    learning_rate: PositiveFloat = 1e-6
    min_learning_rate: float = Field(default=0.0, ge=0)
    """Where `schedule` ends."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(default=0, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    epsilon: PositiveFloat = 1e-8
    weight_decay: float = Field(default=0.0, ge=0)
    weight_decay_exempt: tuple[str, ...] = ("*.bias", "*norm*.weight", "*layernorm*")
    """Megatron parameter names (shell patterns) that don't decay."""
    gradient_clip: float = Field(default=1.0, ge=0)
    """Largest global gradient norm; 0 does not clip."""

    def own_problems(self) -> Iterator[tuple[str, str]]:
        if self.min_learning_rate > self.learning_rate:
            yield "min_learning_rate", f"{self.min_learning_rate} is larger than learning_rate ({self.learning_rate})"

    def warmup_problems(self, steps: int) -> Iterator[tuple[str, str]]:
        """For a run of `steps` optimizer steps."""
        if self.warmup_steps >= steps:
            yield (
                "optimizer.warmup_steps",
                f"{self.warmup_steps} must be less than the steps of the run ({steps})",
            )
