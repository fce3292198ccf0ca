"""Pure tensor functions: advantages, importance weights, the kernel, aggregation, diagnostics."""

from megatron_vespo.objective.loss import demonstration_loss, policy_loss
from megatron_vespo.objective.metrics import LossMetrics

__all__ = ["LossMetrics", "demonstration_loss", "policy_loss"]
