"""The model that is trained, and its optimizer."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat

from megatron_vespo.config.section import Section


class ModelConfig(Section):
    path: str
    """Folder in Hugging Face format: config.json, tokenizer, safetensors."""
    initialization: Literal["pretrained", "random"] = "pretrained"
    """`random` reads only config.json and the tokenizer (to train a base from nothing)."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Parameters of the trainer, and of the engines unless `rollout.engine.dtype` says otherwise."""


Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Section):
    """AdamW."""

    learning_rate: PositiveFloat = 1e-6
    """The largest of the schedule."""
    min_learning_rate: float = Field(default=0.0, ge=0)
    """Where `schedule` ends."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """From `learning_rate` to `min_learning_rate` over the run."""
    warmup_steps: int = Field(default=0, ge=0)
    """Linear, before the schedule: of w such steps, step k from 0 has (k + 1) / (w + 1) of the rate, never 0."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """AdamW's."""
    epsilon: PositiveFloat = 1e-8
    """AdamW's."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's, decoupled from the gradient."""
    weight_decay_exempt: tuple[str, ...] = ("*.bias", "*norm*.weight", "*layernorm*")
    """Megatron parameter names (shell patterns) that don't decay."""
    gradient_clip: float = Field(default=1.0, ge=0)
    """Largest global gradient norm; 0 does not clip."""
    scale_by_kept_gradient: bool = False
    """Multiply each step's learning rate by the share of the gradient that the kernel lets through (exp of the metric
    `gradient/log_kept`), at most 1. A kernel shrinks the gradient of data that the policy has moved away from, but Adam,
    which divides by the gradient's size, takes steps of the old length again; this shortens them."""

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
